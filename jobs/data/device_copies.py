"""Copies of batches on the device of a worker; a GPU makes each while it computes with the one before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def copied_ahead(batches: Iterable[_T], device: torch.device) -> Iterator[_T]:
    """Yields batches, trees with tensors in pinned memory, with their tensors on ``device``.

    On a GPU, the copy of the next batch has begun before a batch is yielded, on a stream of its own; neither the CPU
    nor the work on the current stream waits for it. At most two batches are on the GPU, besides those that the caller
    keeps. A caller that does not read all batches must compute nothing afterwards, for a copy may still be under way.

    On a CPU, it yields the batches themselves.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    begun = deque[tuple[_T, torch.cuda.Event]]()

    def begin(batch: _T) -> None:
        # The memory is of the current stream, whose earlier work may still use it, and which frees it.
        copying.wait_stream(torch.cuda.current_stream(device))
        begun.append((map_tensors(lambda tensor: _begin_copy(tensor, device, copying), batch), copying.record_event()))

    def finish() -> _T:
        batch, copied = begun.popleft()
        torch.cuda.current_stream(device).wait_event(copied)
        return batch

    for batch in batches:
        begin(batch)
        if len(begun) > 1:
            yield finish()
    if begun:
        yield finish()


def to_device(batch: Any, device: torch.device) -> Any:
    """Returns a batch, a tree of any structure, with its tensors on ``device``; does not wait for the copy."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Returns a batch, a tree of any structure, with what ``function`` makes of each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {name: map_tensors(function, value) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a namedtuple
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)([map_tensors(function, value) for value in batch])
    return batch


def _begin_copy(tensor: Tensor, device: torch.device, copying: torch.cuda.Stream) -> Tensor:
    copy = torch.empty_like(tensor, device=device)
    with torch.cuda.stream(copying):
        return copy.copy_(tensor, non_blocking=True)
