"""Sums gradients between workers in one fixed order.

The order is that of ``summation_tree``. A worker folds the shards of its own block as far as the tree allows. Between
workers, each owns one slice of a bucket, receives all workers' partial sums of it, finishes the tree, and sends the
slice to all. A worker transfers as many bytes as in a ring all-reduce.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.collectives.summation_tree import Fold, Node, complete_subtrees
from cluster.process.activity import Activity

_Message = tuple[int, int, Tensor]
"""(other rank, number of the message between the two, tensor to send or to receive into)."""


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
        rank: int,
        device: torch.device,
        timeout_s: float | None = None,
    ) -> None:
        """Opens its own process group, so that its collectives never queue behind DDP's or the loop's.

        Args:
            shards: Number of shards of a step.
            blocks: The contiguous shards of each rank, in rank order.
            rank: This worker's rank.
            device: The device of the gradients.
            timeout_s: The longest wait for the other ranks; None: torch's default.
        """
        self._shards = shards
        self._world_size = len(blocks)
        self._last_leaf = (blocks[rank][-1], blocks[rank][-1] + 1)
        self._nodes_by_rank = [complete_subtrees(block, shards) for block in blocks]
        self._rank = rank
        self._group = new_group(timeout_s)
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
        if self._world_size == 1:
            if fold.sums[0] is not buffer:
                buffer.copy_(fold.sums[0])
            return
        bounds = [buffer.numel() * rank // self._world_size for rank in range(self._world_size + 1)]
        slices = [slice(*ends) for ends in zip(bounds, bounds[1:])]
        own = buffer[slices[self._rank]]
        partials = self._exchange_slices(fold.sums, slices)
        total = Fold(self._shards)
        for nodes_of_rank, sums in zip(self._nodes_by_rank, partials):
            for node, partial in zip(nodes_of_rank, sums):
                total.push(node, partial)
        if total.sums[0].data_ptr() != own.data_ptr():  # rank 0 with one partial sum adds up in the bucket
            own.copy_(total.sums[0])
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        self._communicate(
            sends=[(rank, 0, own) for rank in others], receives=[(rank, 0, buffer[slices[rank]]) for rank in others]
        )

    def _exchange_slices(self, sums: list[Tensor], slices: list[slice]) -> list[list[Tensor]]:
        """Returns all workers' partial sums of this worker's slice, in rank order.

        Shapes:
            sums: [length of the bucket] each -> for each rank, one tensor [this rank's slice] per partial sum.
        """
        own = sums[0][slices[self._rank]]
        received = [
            [partial[slices[rank]] for partial in sums]
            if rank == self._rank
            else [torch.empty_like(own) for _ in self._nodes_by_rank[rank]]
            for rank in range(self._world_size)
        ]
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        self._communicate(
            sends=[(rank, number, partial[slices[rank]]) for rank in others for number, partial in enumerate(sums)],
            receives=[(rank, number, into) for rank in others for number, into in enumerate(received[rank])],
        )
        return received

    def _communicate(self, *, sends: list[_Message], receives: list[_Message]) -> None:
        """Sends and receives at once. Slices of a bucket with fewer elements than workers may be empty."""
        operations = [
            dist.P2POp(operation, tensor, rank, self._group, number)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for rank, number, tensor in messages
            if tensor.numel()
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


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


def new_group(timeout_s: float | None, backend: str | None = None) -> dist.ProcessGroup:
    """Opens a process group of all ranks; ``timeout_s``: the longest wait for other ranks, None: torch's default.

    Collective: every rank.
    """
    # A group without a timeout gets torch's default, not the default group's.
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group


# torch renames all_gather_into_tensor: 2.11 has only the old name, newer versions warn of it.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
