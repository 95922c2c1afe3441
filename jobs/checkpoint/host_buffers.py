"""The host memory that a worker copies its share of a checkpoint into, allocated beside the training steps.

A GPU copies without waiting only into memory that is locked. torch's allocator for such memory takes powers of two and
never gives them back. Here a buffer has the size that is needed, and is given back when it is not.
"""

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch

_OUT_OF_MEMORY = 2
"""CUDA's error of a host that cannot lock more memory."""
_PORTABLE = 1
"""A flag of CUDA: the memory counts as locked in every context."""


class HostBuffer:
    """Memory of the host whose pages exist, so that nothing that writes to it waits for one.

    Attributes:
        data: uint8 [bytes].
    """

    def __init__(self, size: int, *, is_locked: bool) -> None:
        """Allocates the memory, which takes up to a second per GB.

        Args:
            size: In bytes, above 0.
            is_locked: Lock the memory for copies from a GPU.

        Raises:
            OSError, MemoryError: The host has too little memory.
        """
        self.data = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # whole pages, that it shares with nothing
        self._is_locked = is_locked
        if is_locked:
            error = torch.cuda.cudart().cudaHostRegister(self.data.data_ptr(), size, _PORTABLE)
            if int(error) == _OUT_OF_MEMORY:
                raise MemoryError(
                    f"the host cannot lock {size:,} bytes of memory for copies of checkpoints; give workers more memory"
                )
            torch.cuda.check_error(error)
        else:
            self.data.zero_()

    def close(self) -> None:
        """Frees the memory; nobody may use it any more."""
        if self._is_locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.data.data_ptr()))
        self.data = torch.empty(0, dtype=torch.uint8)


class HostBuffers:
    """Buffers for one copy after the other; at most one of them is kept while no copy needs it.

    Thread: one thread calls every method but ``give_back``, which any may call.
    """

    def __init__(self, *, are_locked: bool) -> None:
        """``are_locked``: whether a GPU copies into them."""
        self._are_locked = are_locked
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-memory")
        self._prepared: Future[None] | None = None
        self._lock = Lock()
        self._free: HostBuffer | None = None

    def prepare(self, size: int) -> None:
        """Begins to allocate a buffer of ``size`` bytes in the background, unless one is free."""
        self._wait()
        self._prepared = self._thread.submit(self._prepare, size)

    def take(self, size: int) -> HostBuffer:
        """Returns a buffer of at least ``size`` bytes; waits for it if it is not prepared.

        Raises:
            OSError, MemoryError: The host has too little memory.
        """
        self._wait()
        return self._take_free(size) or self._new(size)

    def give_back(self, buffer: HostBuffer) -> None:
        """Takes a buffer back: the larger one is kept, if there is another one."""
        with self._lock:
            if self._free is not None and self._free.data.numel() > buffer.data.numel():
                self._free, buffer = buffer, self._free
            unneeded, self._free = self._free, buffer
        if unneeded is not None:
            unneeded.close()

    def close(self) -> None:
        """Frees the buffer that no copy needs; that one could not be prepared does not matter any more."""
        if self._prepared is not None:
            self._prepared.exception()
        buffer = self._take_free(0)
        if buffer is not None:
            buffer.close()

    def _wait(self) -> None:
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            prepared.result()

    def _prepare(self, size: int) -> None:
        self.give_back(self._take_free(size) or self._new(size))

    def _take_free(self, size: int) -> HostBuffer | None:
        """Returns the free buffer if it is large enough; a smaller one is freed."""
        with self._lock:
            buffer, self._free = self._free, None
        if buffer is not None and buffer.data.numel() < size:
            buffer.close()
            return None
        return buffer

    def _new(self, size: int) -> HostBuffer:
        return HostBuffer(max(1, size), is_locked=self._are_locked)
