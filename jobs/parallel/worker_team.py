"""The workers of a run as one of them sees them: which rank holds which shards, and every collective of the job."""

import inspect
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.collectives.exchange import TreeExchange, sum_by_backend
from cluster.collectives.exchange_waits import ExchangeWaits
from cluster.collectives.groups import all_gather_flat, new_group
from cluster.collectives.topology import workers_by_host
from cluster.errors import LauncherError
from cluster.process.activity import Activity
from cluster.process.orders import LOOPBACK
from jobs.parallel.host_copies import to_host_later
from jobs.parallel.step_report import exact_sum
from jobs.shard_blocks import shard_blocks

_T = TypeVar("_T")

BUCKET_MB_BETWEEN_CPU_HOSTS = 3.0
"""So small that one bucket is on its way between hosts while the next one is summed inside them, and that the last one,
for which a step waits, is short. GPUs keep torch's size: a call costs them more than the bytes."""

_SMALL_BYTES = 2**16
"""A message of fewer bytes takes no longer for more of them."""

# DDP must not send buffers; share_buffers does, from the rank of shard 0. Up to torch 2.11 the argument has its old
# name.
_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
_WITHOUT_BUFFERS: dict[str, Any] = {
    name: False for name in ("forward_sync_buffers", "broadcast_buffers") if name in _DDP_ARGUMENTS
}
if len(_WITHOUT_BUFFERS) > 1:
    del _WITHOUT_BUFFERS["broadcast_buffers"]


class Team:
    """The process groups of a run and the collectives over them.

    Collective: every rank constructs it and calls its methods, but for ``set_aside_gradients``, in the same order.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        shards: int,
        exact: bool,
        device: torch.device,
        address: str = LOOPBACK,
        bucket_mb: float | None = None,
        timeout_s: float | None = None,
        activity: Activity | None = None,
    ) -> None:
        """Opens the groups; the default process group must exist.

        Args:
            rank: The number of this worker.
            world_size: The number of workers.
            shards: The number of shards in a step.
            exact: If True, sum gradients along the summation tree; if False, by the backend's all-reduce.
            device: Where the gradients are.
            address: The address of this worker's host: workers with the same one share a range of shards, and exchange
                gradients with each other before anything leaves the host.
            bucket_mb: The size of DDP's buckets in MiB; None: 3 for exact sums between hosts of CPUs, else
                torch's default.
            timeout_s: The longest wait for another worker, in seconds; None: torch's default.
            activity: Records how long this worker waits for the others.
        """
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.cpu_group = new_group(timeout_s, "gloo")
        hosts = workers_by_host(self.gather(address))
        self.blocks = shard_blocks(shards, hosts)
        self.block = self.blocks[rank]
        if bucket_mb is None and exact and device.type == "cpu" and len(hosts) > 1:
            bucket_mb = BUCKET_MB_BETWEEN_CPU_HOSTS
        self._bucket_mb = bucket_mb
        self._exchange = None
        if exact:
            self._exchange = TreeExchange(
                shards=shards, blocks=self.blocks, hosts=hosts, rank=rank, device=device, timeout_s=timeout_s
            )
        self._activity = activity or Activity()
        self._waits = ExchangeWaits(self._activity, device)

    def replicate(self, model: nn.Module) -> DistributedDataParallel:
        """Wraps a model in DDP, so that a backward pass ends with the gradients of the global batch in ``.grad``.

        Source: https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html
        """
        replica = DistributedDataParallel(
            model, bucket_cap_mb=self._bucket_mb, gradient_as_bucket_view=True, **_WITHOUT_BUFFERS
        )
        replica.register_comm_hook(None, self._sum_bucket)
        return replica

    def set_aside_gradients(self, shard: int, parameters: Sequence[nn.Parameter]) -> None:
        """Keeps the gradients of a shard; to be called after its backward pass, unless it is this worker's last shard.

        Shapes: reads and clears ``.grad`` of each parameter.
        """
        if self._exchange is not None:  # without it torch accumulates them in .grad
            self._exchange.set_aside(shard, parameters)

    def step_done(self) -> None:
        """Ends the exchange of a step; to be called after the backward pass of this worker's last shard."""
        if self.world_size > 1:
            self._waits.end()
        if self._exchange is not None:
            self._exchange.step_done()

    def share_buffers(self, buffers: Sequence[Tensor]) -> None:
        """Overwrites buffers of model and loss on every rank with those of rank 0, which holds shard 0.

        Sends one message.

        Shapes: buffers of any shape, the same on every rank.
        """
        if self.world_size == 1 or not buffers:
            return
        # The widest types first, so that each buffer begins at a multiple of its type's size.
        ordered = sorted(buffers, key=lambda buffer: (-buffer.itemsize, str(buffer.dtype)))
        flat = torch.cat([buffer.reshape(-1).view(torch.uint8) for buffer in ordered])
        self._waits.begin()
        dist.broadcast(flat, src=0)
        self._waits.end()
        parts = zip(ordered, flat.split([buffer.nbytes for buffer in ordered]))
        for dtype, of_type in groupby(parts, key=lambda part: part[0].dtype):
            targets, values = zip(*of_type)
            torch._foreach_copy_(targets, [value.view(dtype).view_as(like) for like, value in zip(targets, values)])

    def sum_over_shards(self, values: Sequence[float]) -> Callable[[], float]:
        """Begins the exact sum of one number per shard, over the shards of all ranks.

        Returns:
            Waits for all ranks and returns the sum; NaN if a number is not finite.

        Shapes: one number for each of this worker's shards, or a single NaN.
        """
        most = max(map(len, self.blocks))
        gathered = self.gather_later(torch.tensor([*values, *[0.0] * (most - len(values))], dtype=torch.float64))

        def wait() -> float:
            self._activity.begin_exchange()
            of_all = gathered()
            self._activity.end_exchange()
            return exact_sum(of_all.flatten().tolist())

        return wait

    def gather_later(self, values: Tensor) -> Callable[[], Tensor]:
        """Begins to gather values of all ranks.

        Values on a GPU are gathered on the GPU, after all work on its current stream, and then copied to the CPU.

        Returns:
            Waits for the values of all ranks and returns them.

        Shapes: [n], n the same on every rank -> [world_size, n], on the CPU.
        """
        gathered = values.new_empty(self.world_size * values.numel())
        work = all_gather_flat(gathered, values, None if values.is_cuda else self.cpu_group, async_op=True)
        assert work is not None, "an asynchronous collective returns its work"
        on_host = to_host_later(gathered, work)
        return lambda: on_host().view(self.world_size, -1)

    def gather_rows(self, rows: Sequence[Sequence[float]], width: int) -> list[list[float]]:
        """Returns the rows of all ranks, in rank order; ranks may have different numbers of rows.

        Shapes: rows [rows of this rank, width] -> [rows of all ranks, width], float64.
        """
        counts = self._gather(torch.tensor([len(rows)], dtype=torch.int64)).reshape(-1).tolist()
        padded = torch.zeros(max(counts), width, dtype=torch.float64)
        if rows:
            padded[: len(rows)] = torch.tensor(rows, dtype=torch.float64)
        gathered = self._gather(padded.reshape(-1)).view(self.world_size, max(counts), width)
        return [row for count, of_rank in zip(counts, gathered.tolist()) for row in of_rank[:count]]

    def gather_flags(self, flag: bool) -> list[bool]:
        """Returns the flag of each rank, in rank order; waits for all ranks."""
        if self.world_size == 1:
            return [flag]
        return [value == 1 for value in self._gather(torch.tensor([int(flag)])).tolist()]

    def from_rank_0(self, read: Callable[[], _T]) -> _T:
        """Calls ``read`` on rank 0; returns its result, or raises its ``LauncherError``, on every rank."""
        message: list[Any] = [None]
        if self.rank == 0:
            try:
                message = [read()]
            except LauncherError as error:
                message = [error]
        dist.broadcast_object_list(message, src=0, group=self.cpu_group)
        if isinstance(message[0], LauncherError):
            raise message[0]
        result: _T = message[0]
        return result

    def gather(self, value: _T) -> list[_T]:
        """Returns the value of every rank, in rank order; values are pickled."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def share(self, memory: Sequence[Tensor], source: int) -> None:
        """Overwrites memory on every rank with that of the rank ``source``.

        Small pieces go together.

        Shapes: uint8 [bytes] each, the same on every rank; on the CPU, or on the device of every rank.
        """
        if self.world_size == 1:
            return
        for on_gpu, group in ((True, None), (False, self.cpu_group)):
            of_group = [piece for piece in memory if piece.is_cuda == on_gpu and piece.numel()]
            small = [piece for piece in of_group if piece.numel() < _SMALL_BYTES]
            for piece in of_group:
                if piece.numel() >= _SMALL_BYTES:
                    dist.broadcast(piece, src=source, group=group)
            if small:
                together = torch.cat(small)
                dist.broadcast(together, src=source, group=group)
                torch._foreach_copy_(small, together.split([piece.numel() for piece in small]))

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier(group=self.cpu_group)

    def close(self) -> None:
        """Ends the exchange and the process groups."""
        if self._exchange is not None:
            self._exchange.close()
        dist.destroy_process_group()

    def _sum_bucket(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's communication hook: DDP calls it for each bucket, in order, once the bucket's gradients are computed.

        Shapes: a bucket float [numbers in the bucket] -> the same, summed over all shards.
        """
        total = sum_by_backend(bucket) if self._exchange is None else self._exchange.sum(bucket)
        if bucket.is_last() and self.world_size > 1:
            self._waits.begin()
        return total

    def _gather(self, values: Tensor) -> Tensor:
        """Returns the values of all ranks. Shapes: [n], n the same on every rank -> [world_size * n], on the CPU."""
        gathered = values.new_empty(self.world_size * values.numel())
        self._activity.begin_exchange()
        all_gather_flat(gathered, values, self.cpu_group)
        self._activity.end_exchange()
        return gathered
