"""Sums gradients between workers in one fixed order, at the least traffic between hosts.

The order is that of ``summation_tree``. A worker folds the shards of its own block as far as the tree allows. Then the
peers of each level of ``topology`` exchange slices: each receives the partial sums of its slice and folds them further.
After the last level every slice is complete, and the levels pass the slices back in reverse order.

For gradients of B bytes on H hosts, 2 B (H - 1) / H bytes leave a host, if its block of shards is one subtree. That is
the least possible. A block of k subtrees sends k partial sums instead of one in the first half.
"""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.collectives.summation_tree import Fold, Node, complete_subtrees
from cluster.collectives.topology import Peers, exchange_levels
from cluster.process.activity import Activity

_SLICE_ALIGNMENT = 16
"""Slices begin at multiples of this many bytes, so that kernels and NCCL move whole vectors."""


class TreeExchange:
    """Sums gradients along the tree, as a communication hook of DDP.

    It sums where DDP averages: the loss must already be divided by the size of the global batch.

    Collective: every rank constructs it and runs every backward pass; bucket by bucket, in DDP's order.
    """

    def __init__(
        self,
        *,
        shards: int,
        blocks: Sequence[range],
        hosts: Sequence[int],
        rank: int,
        device: torch.device,
        timeout_s: float | None = None,
    ) -> None:
        """Opens its own process groups, so that its collectives never queue behind DDP's or the loop's.

        Args:
            shards: Number of shards of a step.
            blocks: The contiguous shards of each rank, in rank order.
            hosts: The number of workers on each host, in rank order.
            rank: This worker's rank.
            device: The device of the gradients.
            timeout_s: The longest wait for the other ranks; None: torch's default.
        """
        self._shards = shards
        self._last_leaf = (blocks[rank][-1], blocks[rank][-1] + 1)
        levels = exchange_levels(blocks, hosts)
        self._levels = [
            _SliceExchange(next(peers for peers in level if rank in peers.ranks), rank, shards, timeout_s)
            for level in levels
        ]
        self._num_pieces = math.prod(max(peers.num_slices for peers in level) for level in levels)
        self._fold_aside = Fold(shards)
        self._number_of: dict[Tensor, int] = {}
        self._on_gpu = device.type == "cuda"
        # A collective that waits inside DDP's own callbacks can deadlock, because ranks run callbacks in
        # different orders; one thread (or one stream) takes the buckets in the order of DDP's calls.
        self._thread = None if self._on_gpu else ThreadPoolExecutor(1, thread_name_prefix="exchange")
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None

    def set_aside(self, shard: int, parameters: Sequence[nn.Parameter]) -> None:
        """Takes the gradients of a shard that is not the last of the block, and sets them to None."""
        grads = [parameter.grad for parameter in parameters]
        assert None not in grads, "the plan has checked that every trained parameter gets a gradient"
        self._number_of = {parameter: number for number, parameter in enumerate(parameters)}
        self._fold_aside.push((shard, shard + 1), grads)
        for parameter in parameters:
            parameter.grad = None

    def step_done(self) -> None:
        """Drops the gradients set aside. Call it after the backward pass of the block's last shard."""
        self._fold_aside = Fold(self._shards)

    def sum(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Sums a bucket, which holds the gradients of the block's last shard, over all shards: the communication hook.

        Shapes:
            bucket.buffer(): [length of the bucket], as the result.
        """
        buffer = bucket.buffer()
        earlier = [self._as_bucket(bucket, grads) for grads in self._fold_aside.sums]
        nodes = list(self._fold_aside.nodes)
        if self._stream is not None:
            return self._run_on_stream(buffer, nodes, earlier)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        assert self._thread is not None
        self._thread.submit(self._run_in_thread, future, buffer, nodes, earlier)
        return future

    def _as_bucket(self, bucket: dist.GradBucket, grads: Sequence[Tensor]) -> Tensor:
        """Copies gradients that were set aside into the layout of the bucket.

        A bucket holds each gradient in the memory order of its parameter, which ``GradBucket.gradients`` does not know.
        The gradients of the last shard are views of the bucket by now, and have that order.

        Shapes:
            grads: as the parameters' -> [length of the bucket].
        """
        buffer = bucket.buffer()
        flat = torch.empty_like(buffer)
        parameters, begin = bucket.parameters(), buffer.storage_offset()
        places = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert all(place.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for place in places)
        assert sum(place.numel() for place in places) == buffer.numel(), "the bucket has nothing but gradients"
        torch._foreach_copy_(
            [flat.as_strided(place.shape, place.stride(), place.storage_offset() - begin) for place in places],
            [grads[self._number_of[parameter]] for parameter in parameters],
        )
        return flat

    def close(self) -> None:
        """Ends the thread.

        Collective: every rank, after its last backward pass.
        """
        if self._thread is not None:
            self._thread.shutdown()

    def _run_in_thread(
        self, future: torch.futures.Future[Tensor], buffer: Tensor, nodes: list[Node], earlier: list[Tensor]
    ) -> None:
        try:
            with torch.no_grad():
                self._sum(buffer, nodes, earlier)
            future.set_result(buffer)
        except Exception as error:  # the backward pass that waits for the future raises it
            future.set_exception(error)  # type: ignore[arg-type]  # the stub asks for a result

    def _run_on_stream(self, buffer: Tensor, nodes: list[Node], earlier: list[Tensor]) -> torch.futures.Future[Tensor]:
        """Enqueues the exchange behind the gradients. The future has a device, so DDP waits on the GPU, not here."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        for tensor in (buffer, *earlier):
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._sum(buffer, nodes, earlier)
            future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
            future.set_result(buffer)
        return future

    def _sum(self, buffer: Tensor, nodes: list[Node], earlier: list[Tensor]) -> None:
        """Replaces the bucket of the last shard by the sum over all shards, in place.

        Shapes:
            buffer, each of earlier: [length of the bucket].
        """
        fold = Fold(self._shards)
        for node, partial in zip(nodes, earlier):
            fold.push(node, partial)
        fold.push(self._last_leaf, buffer)
        sums = fold.sums
        # Gathers need slices of one length, so a bucket whose length does not divide is gathered elsewhere.
        length = self._padded_length(buffer)
        whole = buffer if length == buffer.numel() else buffer.new_empty(length)
        region = whole
        to_gather: list[tuple[_SliceExchange, Tensor]] = []
        for level in self._levels:
            sums = level.scatter(sums, region.numel())
            to_gather.append((level, region))
            if level.own_slice is None:
                break
            region = region.view(level.num_slices, -1)[level.own_slice]
        else:
            (total,) = sums
            if total is not buffer:
                region[: total.numel()].copy_(total)
        for level, region in reversed(to_gather):
            level.gather(region)
        if whole is not buffer:
            buffer.copy_(whole[: buffer.numel()])

    def _padded_length(self, buffer: Tensor) -> int:
        """Returns the length of a bucket, rounded up so that all slices are equal and aligned."""
        if not self._levels:
            return buffer.numel()
        unit = self._num_pieces * max(1, _SLICE_ALIGNMENT // buffer.itemsize)
        return math.ceil(buffer.numel() / unit) * unit


class _SliceExchange:
    """The exchange of slices among the peers of one level.

    Collective: every rank in ``peers.ranks`` constructs it and calls its methods in the same order. Every rank of the
    default group constructs equally many, because torch names groups by their count.
    """

    def __init__(self, peers: Peers, rank: int, shards: int, timeout_s: float | None) -> None:
        self._group = new_group(timeout_s, ranks=peers.ranks)
        self._peers = peers
        self._shards = shards
        self._nodes = [complete_subtrees(block, shards) for block in peers.blocks]
        self.num_slices = peers.num_slices
        place = peers.ranks.index(rank)
        self.own_slice = place if place < peers.num_slices else None

    def scatter(self, sums: list[Tensor], region_length: int) -> list[Tensor]:
        """Sends each peer the partial sums of its slice; returns the partial sums of all peers in this rank's slice.

        Args:
            sums: This rank's partial sums of a region of the bucket.
            region_length: The padded length of the region, of which the sums may lack an end.

        Shapes:
            sums: [length of the region] each -> [length of this rank's slice] each, none if it owns no slice.
        """
        length, slice_length = sums[0].numel(), region_length // self.num_slices
        bounds = [min(number * slice_length, length) for number in range(self.num_slices + 1)]
        ends = list(pairwise(bounds)) + [(length, length)] * (len(self._peers.ranks) - self.num_slices)
        own_length = 0 if self.own_slice is None else ends[self.own_slice][1] - ends[self.own_slice][0]
        packed = sums[0] if len(sums) == 1 else torch.cat([each[begin:end] for begin, end in ends for each in sums])
        received = packed.new_empty(sum(map(len, self._nodes)), own_length)
        dist.all_to_all_single(
            received.view(-1),
            packed,
            [len(nodes) * own_length for nodes in self._nodes],
            [len(sums) * (end - begin) for begin, end in ends],
            group=self._group,
        )
        if self.own_slice is None:
            return []
        fold = Fold(self._shards)
        for node, partial in zip(chain.from_iterable(self._nodes), received):
            fold.push(node, partial)
        return fold.sums

    def gather(self, region: Tensor) -> None:
        """Completes a region, in place, of which each peer with a slice has that slice.

        Shapes:
            region: [padded length of the region], ``num_slices`` equal slices.
        """
        if self.num_slices == 1:
            dist.broadcast(region, self._peers.ranks[0], group=self._group)
        else:
            all_gather_flat(region, region.view(self.num_slices, -1)[self.own_slice], group=self._group)


def sum_by_backend(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums a bucket in the order of the backend's all-reduce. Like ``TreeExchange``, it does not average.

    Shapes:
        bucket.buffer(): [length of the bucket], as the result.

    Collective: every rank, as DDP's communication hook.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None, "an asynchronous collective is work"
    return work.get_future().then(lambda future: future.value()[0])


class ExchangeWaits:
    """Measures how long a worker waits in an exchange after its own part is done.

    On a CPU the process itself waits, and reports that. A GPU waits behind the process: events on its stream measure
    the time, and are read only once they have happened, so that nobody waits for them.
    """

    def __init__(self, activity: Activity, device: torch.device) -> None:
        self._activity = activity
        self._on_gpu = device.type == "cuda"
        self._began: torch.cuda.Event | None = None
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """Marks that everything this worker contributes is computed or enqueued."""
        if self._on_gpu:
            self._began = _event_on_stream()
        else:
            self._activity.begin_exchange()

    def end(self) -> None:
        """Marks that the other workers' contributions are there, or are waited for on the stream."""
        if not self._on_gpu:
            self._activity.end_exchange()
            return
        assert self._began is not None, "an exchange has begun"
        self._under_way.append((self._began, _event_on_stream()))
        while self._under_way and self._under_way[0][1].query():
            began, ended = self._under_way.popleft()
            self._activity.exchanged(began.elapsed_time(ended) / 1000)


def _event_on_stream() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
