"""Memory that an exchange receives into, kept for the next bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor

_LARGEST_KEPT = 64 * 2**20
"""Bytes. DDP has one bucket of all gradients in its first step, which needs memory just once."""


class BufferPool:
    """A few buffers, each lent to one bucket at a time and kept for the next one.

    New memory costs a CPU a page fault every 4 KiB. On a GPU the number of buffers bounds what buckets in flight take.

    Thread: any may borrow, and any may give back.
    """

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[tuple[Tensor | None, torch.cuda.Event | None]] = SimpleQueue()
        for _ in range(count):
            self._free.put((None, None))

    @contextmanager
    def lend(self, like: Tensor, length: int) -> Iterator[Tensor]:
        """Lends a buffer for a context; waits until one is free. On a GPU, the current stream waits instead.

        Shapes:
            like: a tensor of the same type and device -> [length], with any values.
        """
        buffer, given_back = self._free.get()
        try:
            if given_back is not None:
                torch.cuda.current_stream(like.device).wait_event(given_back)
            size = length * like.itemsize
            if buffer is None or buffer.numel() < size:
                buffer = like.new_empty(size, dtype=torch.uint8)
            yield buffer[:size].view(like.dtype)
        finally:
            self._give_back(buffer)

    def _give_back(self, buffer: Tensor | None) -> None:
        given_back = None
        if buffer is not None and buffer.is_cuda:  # this stream may be another one than the one it was lent to
            stream = torch.cuda.current_stream(buffer.device)
            buffer.record_stream(stream)
            given_back = stream.record_event()
        if buffer is not None and buffer.numel() > _LARGEST_KEPT:
            buffer = None
        self._free.put((buffer, given_back))
