"""Process groups, and the names of collectives that differ between versions of torch."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


def new_group(
    timeout_s: float | None, backend: str | None = None, ranks: Sequence[int] | None = None
) -> dist.ProcessGroup:
    """Opens a process group.

    Args:
        timeout_s: The longest wait for other ranks, in seconds; None: torch's default.
        backend: None: that of the default group.
        ranks: Its members; None: all ranks.

    Collective: every member.
    """
    # A group without a timeout gets torch's default, not the default group's.
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    members = None if ranks is None else list(ranks)
    group = dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=ranks is not None)
    assert isinstance(group, dist.ProcessGroup), "this rank is a member"
    return group


# torch renames all_gather_into_tensor: 2.11 has only the old name, newer versions warn of it.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
