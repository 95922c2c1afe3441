"""The workers of a run as one of them sees it: who has which shards, and how tensors get across."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.collectives.exchange import ExchangeWaits, TreeExchange, all_gather_flat, new_group, sum_by_backend
from cluster.errors import LauncherError
from cluster.process.activity import Activity
from jobs.parallel.step_report import exact_sum
from jobs.sampling import shard_block

_T = TypeVar("_T")

# share_buffers sends them, by the rule for shards. torch renames the argument: 2.11 knows only the old name.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_LEAVE_BUFFERS: dict[str, Any] = {
    name: False for name in ("forward_sync_buffers", "broadcast_buffers") if name in _DDP_ARGUMENTS
}
if len(_LEAVE_BUFFERS) > 1:
    del _LEAVE_BUFFERS["broadcast_buffers"]


class Team:
    """Process groups and the exchange of gradients.

    Collective: every rank constructs it and calls its methods in the same order.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        shards: int,
        exact: bool,
        device: torch.device,
        timeout_s: float | None = None,
        activity: Activity | None = None,
    ) -> None:
        """The default process group must exist.

        Args:
            rank, world_size: This worker among all.
            shards: The shards of a step.
            exact: Sum gradients along the tree, or as the backend does.
            device: Where gradients live.
            timeout_s: The longest that this worker waits for the others; none: as long as torch does.
            activity: Is told when it waits for them.
        """
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.blocks = [shard_block(shards, world_size, other) for other in range(world_size)]
        self.block = self.blocks[rank]
        self.cpu_group = new_group(timeout_s, "gloo")
        self._exchange = None
        if exact:
            self._exchange = TreeExchange(
                shards=shards, blocks=self.blocks, rank=rank, device=device, timeout_s=timeout_s
            )
        self._activity = activity or Activity()
        self._waits = ExchangeWaits(self._activity, device)

    def replicate(self, model: nn.Module) -> DistributedDataParallel:
        """Wraps a model so that its backward pass ends with the gradients of the global batch."""
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True, **_LEAVE_BUFFERS)
        replica.register_comm_hook(None, self._sum_bucket)
        return replica

    def set_aside_gradients(self, shard: int, parameters: Sequence[nn.Parameter]) -> None:
        """After the backward pass of a shard that is not this worker's last of the step."""
        if self._exchange is not None:  # otherwise torch accumulates them in .grad
            self._exchange.set_aside(shard, parameters)

    def step_done(self) -> None:
        """After the backward pass of this worker's last shard of the step."""
        if self.world_size > 1:
            self._waits.end()
        if self._exchange is not None:
            self._exchange.step_done()

    def share_buffers(self, buffers: Sequence[Tensor]) -> None:
        """Gives everyone the buffers of the worker that has shard 0, one message per dtype."""
        if self.world_size == 1:
            return
        for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1) for buffer in same])
            self._waits.begin()
            dist.broadcast(flat, src=0)
            self._waits.end()
            values = flat.split([buffer.numel() for buffer in same])
            torch._foreach_copy_(same, [value.view_as(buffer) for value, buffer in zip(values, same)])

    def sum_over_shards(self, values: Sequence[Tensor]) -> float:
        """The exact sum over all shards of one number each; waits for everybody."""
        return exact_sum(row[0] for row in self.gather_rows([[float(value)] for value in values], width=1))

    def gather_rows(self, rows: Sequence[Sequence[float]], width: int) -> list[list[float]]:
        """Everybody's rows of ``width`` numbers, in rank order; ranks may have different counts."""
        counts = self._gather(torch.tensor([len(rows)], dtype=torch.int64)).reshape(-1).tolist()
        padded = torch.zeros(max(counts), width, dtype=torch.float64)
        if rows:
            padded[: len(rows)] = torch.tensor(rows, dtype=torch.float64)
        gathered = self._gather(padded.reshape(-1)).view(self.world_size, max(counts), width)
        return [row for count, of_rank in zip(counts, gathered.tolist()) for row in of_rank[:count]]

    def gather_flags(self, flag: bool) -> list[bool]:
        """The flag of each rank, in rank order; waits for everybody, if there are others."""
        if self.world_size == 1:
            return [flag]
        return [value == 1 for value in self._gather(torch.tensor([int(flag)])).tolist()]

    def from_rank_0(self, read: Callable[[], _T]) -> _T:
        """What ``read`` returns on rank 0, on every rank; an error of ours is raised on every rank too."""
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [read()]
            except LauncherError as error:
                told = [error]
        dist.broadcast_object_list(told, src=0, group=self.cpu_group)
        if isinstance(told[0], LauncherError):
            raise told[0]
        return told[0]

    def gather(self, value: _T) -> list[_T]:
        """What every rank has to say, in rank order."""
        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, value, group=self.cpu_group)
        return told

    def share(self, data: Tensor, own: Sequence[range]) -> None:
        """Fills in the bytes that others have.

        Args:
            data: uint8 [bytes] on the CPU.
            own: The stretch that each rank has.
        """
        for rank, stretch in enumerate(own):
            if stretch and self.world_size > 1:
                dist.broadcast(data[stretch.start : stretch.stop], src=rank, group=self.cpu_group)

    def barrier(self) -> None:
        """Waits for everybody."""
        dist.barrier(group=self.cpu_group)

    def close(self) -> None:
        """Ends the exchange and the process groups."""
        if self._exchange is not None:
            self._exchange.close()
        dist.destroy_process_group()

    def _sum_bucket(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook. DDP calls it in the order of its buckets, with each as soon as it is computed."""
        total = sum_by_backend(bucket) if self._exchange is None else self._exchange.sum(bucket)
        if bucket.is_last() and self.world_size > 1:
            self._waits.begin()
        return total

    def _gather(self, values: Tensor) -> Tensor:
        gathered = values.new_empty(self.world_size * values.numel())
        self._activity.begin_exchange()
        all_gather_flat(gathered, values, self.cpu_group)
        self._activity.end_exchange()
        return gathered
