"""Copies of what collectives have gathered, in the memory of the host."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def to_host_later(values: Tensor, work: dist.Work) -> Callable[[], Tensor]:
    """Begins to copy to the CPU what ``work`` will have written; neither the CPU nor the GPU waits for it here.

    Returns:
        Waits for the values and returns them.

    Shapes: any -> the same, on the CPU.
    """
    if not values.is_cuda:

        def wait_for_work() -> Tensor:
            work.wait()
            return values

        return wait_for_work
    work.wait()  # NCCL: only the current stream waits
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait_for_copy() -> Tensor:
        copied.synchronize()
        return host

    return wait_for_copy
