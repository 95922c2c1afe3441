"""Process groups, and collectives that differ between backends or versions of torch."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_MOST_THREAD_BLOCKS = 16
"""Of a kernel of NCCL in a group of some ranks. An exchange has four to six such groups at once, whose kernels wait for
other GPUs: together they must fit on the multiprocessors (108 of an A100, 132 of an H100), or they wait for ever."""


def open_default_group(
    store: dist.Store, *, rank: int, world_size: int, on_gpu: bool, timeout_s: float | None = None
) -> None:
    """Opens the default process group, of NCCL for GPUs, else of gloo.

    Args:
        store: Where the ranks meet.
        rank: The rank of this worker.
        world_size: The number of workers.
        on_gpu: The tensors are on the current GPU.
        timeout_s: The longest wait for other ranks, in seconds; None: torch's default.

    Raises:
        RuntimeError: The ranks could not be connected.

    Collective: every rank.
    """
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    # Without device_id, with which torch splits every group from this one: a call of all ranks, which the members of a
    # group do not make at the same time.
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    if on_gpu and world_size > 1:
        dist.all_reduce(torch.zeros(1, device="cuda"))  # see _connect
        torch.cuda.synchronize()


def new_group(
    timeout_s: float | None, backend: str | None = None, ranks: Sequence[int] | None = None
) -> dist.ProcessGroup:
    """Opens a process group.

    Args:
        timeout_s: The longest wait for other ranks, in seconds; None: torch's default.
        backend: None: that of the default group, as it is if ``ranks`` are given.
        ranks: Its members; None: all ranks.

    Raises:
        RuntimeError: The members could not be connected.

    Collective: every member, and in one order of groups.
    """
    # A group without a timeout gets torch's default, not the default group's.
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    if ranks is None:
        group = dist.new_group(timeout=timeout, backend=backend)
    else:
        options = None
        if dist.get_backend() == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options.config.max_ctas = _MOST_THREAD_BLOCKS
            if timeout is not None:
                options._timeout = timeout  # else torch warns that the two differ
        group = dist.new_group(list(ranks), timeout=timeout, pg_options=options, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "this rank is a member"
    if ranks is not None and len(ranks) > 1 and dist.get_backend(group) == "nccl":
        _connect(group, torch.device("cuda"))
        torch.cuda.synchronize()
    return group


def _connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """Sends each peer a number.

    NCCL connects two ranks when they first exchange something. In the middle of a backward pass, that would take
    seconds, and a failure would look like one of the step.
    """
    numbers = torch.zeros(2, dist.get_world_size(group), 1, device=device)
    received, sent = (list(side.unbind()) for side in numbers)
    all_to_all(received, sent, group)


def all_to_all(received: Sequence[Tensor], sent: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sends a tensor to each other rank of a group, and receives one from each.

    NCCL has a call for this, and the CPU does not wait for it. Gloo has one for slices of one tensor alone, which does
    not send while it receives: it took 1.8 times as long between two hosts. So with gloo each tensor is a message of
    its own, and an empty one is none.

    Args:
        received: Where to receive, by rank in the group; this rank's is ignored.
        sent: What to send, likewise.
        group: The group.

    Shapes: flat, contiguous tensors of one type.

    Collective: every rank of the group.
    """
    own = dist.get_rank(group)
    if dist.get_backend(group) == "nccl":
        nothing = sent[own].new_empty(0)
        others = [[nothing if place == own else each for place, each in enumerate(side)] for side in (received, sent)]
        dist.all_to_all(others[0], others[1], group=group)
        return
    works = [
        start(tensor, group=group, **{to_or_from: place})
        for start, to_or_from, tensors in ((dist.irecv, "group_src", received), (dist.isend, "group_dst", sent))
        for place, tensor in enumerate(tensors)
        if place != own and tensor.numel()
    ]
    for work in works:
        assert work is not None, "this rank is a member of the group"
        work.wait()


# torch renames all_gather_into_tensor: 2.11 has only the old name, newer versions warn of it.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
