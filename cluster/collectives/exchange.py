"""Sums gradients between workers in one fixed order, at the least traffic between hosts.

The order is that of ``summation_tree``. A worker folds the shards of its own block as far as the tree allows. Then the
peers of each level of ``topology`` exchange slices: each receives the partial sums of its slice and folds them further.
After the last level every slice is complete, and the levels pass the slices back in reverse order. Each level and
direction works on one bucket at a time, so that neighbouring buckets use the links inside a host and between hosts at
once.

For gradients of B bytes on H hosts, 2 B (H - 1) / H bytes leave a host, if its block of shards is one subtree. That is
the least possible for the host that sends most. A block of k subtrees sends k partial sums instead of one in the first
half.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.collectives.slice_exchange import open_levels
from cluster.collectives.summation_tree import Fold, complete_subtrees
from cluster.collectives.topology import exchange_levels


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
        self._num_sums = len(complete_subtrees(blocks[rank], shards))
        self._levels = open_levels(exchange_levels(blocks, hosts), rank, shards, timeout_s)
        self._fold_aside = Fold(shards)
        self._number_of: dict[Tensor, int] = {}
        self._failure: Exception | None = None
        self._on_gpu = device.type == "cuda"
        # A collective that waits inside DDP's own callbacks can deadlock, because ranks run callbacks in
        # different orders; threads (or streams) take the buckets in the order of DDP's calls.
        num_lines = max(1, 2 * len(self._levels))
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="exchange") for _ in range(num_lines)]
        self._streams = [torch.cuda.Stream(device) for _ in range(num_lines)] if self._on_gpu else []

    def set_aside(self, shard: int, parameters: Sequence[nn.Parameter]) -> None:
        """Takes the gradients of a shard that is not the last of the block, and sets them to None."""
        grads = [parameter.grad for parameter in parameters]
        assert None not in grads, "the plan has checked that every trained parameter gets a gradient"
        self._number_of = {parameter: number for number, parameter in enumerate(parameters)}
        self._fold_aside.push((shard, shard + 1), grads)
        for parameter in parameters:
            parameter.grad = None

    def step_done(self) -> None:
        """Drops what is left of the sums set aside. Call it after the backward pass of the block's last shard."""
        self._fold_aside = Fold(self._shards)

    def sum(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Sums a bucket, which holds the gradients of the block's last shard, over all shards: the communication hook.

        Shapes:
            bucket.buffer(): [length of the bucket], as the result.
        """
        buffer = bucket.buffer()
        earlier = self._add_set_aside(bucket)
        summing = self._sum(buffer, earlier)
        if self._on_gpu:
            return self._enqueue(buffer, earlier, summing)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._threads[0].submit(self._run, 0, summing, future, buffer)
        return future

    def _add_set_aside(self, bucket: dist.GradBucket) -> list[Tensor]:
        """Adds to a bucket what was set aside for it, as far as the tree allows; drops what is in the bucket by then.

        A bucket holds each gradient in the memory order of its parameter, which ``GradBucket.gradients`` does not know.
        The gradients of the last shard are views of the bucket by now, and have that order.

        Returns:
            The partial sums that stay apart from the bucket's, in the order of their shards, in the bucket's
            layout.

        Shapes:
            bucket.buffer(): [length of the bucket], as each of the results.
        """
        sums = self._fold_aside.sums
        if not sums:
            return []
        buffer, parameters = bucket.buffer(), bucket.parameters()
        places = [parameter.grad for parameter in parameters if parameter.grad is not None]
        begin = buffer.storage_offset()
        assert all(place.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for place in places)
        assert sum(place.numel() for place in places) == buffer.numel(), "the bucket has nothing but gradients"
        numbers = [self._number_of[parameter] for parameter in parameters]
        num_apart = self._num_sums - 1
        for grads in reversed(sums[num_apart:]):  # each is the sibling of what the bucket holds by then
            torch._foreach_add_(places, [grads[number] for number in numbers])
            _drop(grads, numbers)
        apart = []
        for grads in sums[:num_apart]:
            flat = torch.empty_like(buffer)
            torch._foreach_copy_(
                [flat.as_strided(place.shape, place.stride(), place.storage_offset() - begin) for place in places],
                [grads[number] for number in numbers],
            )
            _drop(grads, numbers)
            apart.append(flat)
        return apart

    def close(self) -> None:
        """Ends the threads.

        Collective: every rank, after its last backward pass.
        """
        for thread in self._threads:
            thread.shutdown()

    def _run(self, line: int, summing: Iterator[None], future: torch.futures.Future[Tensor], buffer: Tensor) -> None:
        """Runs a part of a sum in the thread of its line, and hands the rest over to the next one.

        After a failure, no other bucket is exchanged: its messages would meet those of the bucket that has failed.
        """
        try:
            if self._failure is not None:
                raise self._failure
            with torch.no_grad():
                next(summing)
        except StopIteration:
            future.set_result(buffer)
        except Exception as error:  # the backward pass that waits for the future raises it
            self._failure = error
            future.set_exception(error)  # type: ignore[arg-type]  # the stub asks for a result
        else:
            self._threads[line + 1].submit(self._run, line + 1, summing, future, buffer)

    def _enqueue(
        self, buffer: Tensor, earlier: Sequence[Tensor], summing: Iterator[None]
    ) -> torch.futures.Future[Tensor]:
        """Enqueues a sum behind the gradients. The future has a device, so DDP waits on the GPU, not here."""
        before = torch.cuda.current_stream(buffer.device)
        for stream in self._streams:
            stream.wait_stream(before)
            for tensor in (buffer, *earlier):
                tensor.record_stream(stream)
            with torch.cuda.stream(stream):
                next(summing, None)
            before = stream
        with torch.cuda.stream(before):
            future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
            future.set_result(buffer)
        return future

    def _sum(self, buffer: Tensor, earlier: list[Tensor]) -> Iterator[None]:
        """Replaces the sum over the last shards of this worker by the sum over all shards, in place.

        Yields where another line goes on.

        Shapes:
            buffer, each of earlier: [length of the bucket].
        """
        if self._levels:
            yield from self._exchange(0, [*earlier, buffer], buffer)

    def _exchange(self, number: int, sums: Sequence[Tensor], region: Tensor) -> Iterator[None]:
        """Replaces a region of a bucket by the sum over all shards.

        Args:
            number: The number of the level.
            sums: The partial sums of the region that this worker has.
            region: Where to put the sum. It may be one of the partial sums.
        """
        level = self._levels[number]
        own = level.own_slice(region)
        with level.scattered(sums) as sums_of_own:
            yield
            if number + 1 < len(self._levels):
                yield from self._exchange(number + 1, sums_of_own, own)
                yield
            elif sums_of_own and sums_of_own[0].data_ptr() != own.data_ptr():  # the first peer may add up in the region
                own.copy_(sums_of_own[0])
        level.gather(region)


def _drop(grads: list[Tensor | None], numbers: Sequence[int]) -> None:
    for number in numbers:
        grads[number] = None


def sum_by_backend(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums a bucket in the order of the backend's all-reduce. Like ``TreeExchange``, it does not average.

    Shapes:
        bucket.buffer(): [length of the bucket], as the result.

    Collective: every rank, as DDP's communication hook.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None, "an asynchronous collective is work"
    return work.get_future().then(lambda future: future.value()[0])
