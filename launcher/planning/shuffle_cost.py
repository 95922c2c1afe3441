"""What the order of ``data.shuffle`` costs and how it mixes, beside a permutation of all samples.

The mixing follows from real steps of the first epoch, and the cost from the real index of the data; which steps, blocks
and micro-batches are looked at is drawn by the seed. No sample is read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jobs.sampling import StepPlan, draw_key, permute
from jobs.shard_blocks import shard_blocks
from jobs.spec import JobSpec, ShuffleSpec
from jobs.stream_readers import stream_readers, streams_for_one_reader

_MICRO_BATCHES = 512
"""The number of micro-batches to draw for the mixing, or fewer."""
_SAMPLES = 2048
"""The number of samples whose places are looked up for a cost, or a few more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Price and mixing of an order of samples."""

    meet_in_micro_batch: float
    """The fraction of neighbours in the data that are in one micro-batch, in an epoch."""
    meet_in_step: float
    """The fraction that are in one step."""
    requests: float | None
    """Requests for each sample; of Parquet, row groups. None: the dataset tells no cost, or samples are objects."""
    read: float | None
    """Bytes read for each byte used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShufflePlan:
    """The order of the description, beside a permutation of all samples.

    Where a number depends on the number of workers or on their hosts, it is the largest. Only the price of ``own`` is
    that of workers on one host: on several, workers may have other numbers of shards, more of whose blocks several
    processes read.
    """

    own: Order
    full: Order
    """Its mixing follows by arithmetic."""
    micro_batches: int
    """The number of micro-batches from which the mixing of ``own`` follows."""
    readers: int
    """Processes that read each block, by ``data.loaders``."""
    streams: int
    """The fewest streams with which one process would read each block."""
    kept_bytes: int | None
    """Encoded images that a process holds until they are used, at the mean size of a sample. None: it reads no
    blocks."""
    row_group_bytes: int
    """Row groups of Parquet that it holds beside them."""
    processes: int
    """Processes of a worker that read samples."""


def plan_shuffle(dataset: Any, steps: StepPlan, spec: JobSpec) -> ShufflePlan | None:
    """Return price and mixing of the order of training samples; None if it is a permutation of all."""
    shuffle = steps.shuffle
    if shuffle is None:
        return None
    num_workers = range(spec.workers.least, spec.workers.most + 1)
    lengths = sorted({length for num in num_workers for length in _lengths(steps.shards, num)})
    matched = [stream_readers(length, shuffle.streams, spec.data.loaders) for length in lengths]
    num_steps = min(steps.steps_per_epoch, max(1, _MICRO_BATCHES // steps.shards))
    own_cost = full_cost = _Cost()
    kept, row_groups = None, 0
    if getattr(dataset, "shares_objects", False):
        full_cost = _cost_of(dataset, _micro_batches(replace(steps, shuffle=None), spec.seed))
        blocks = {num: _blocks_read(steps, shard_blocks(steps.shards, [num]), spec.data.loaders) for num in num_workers}
        own_cost = _cost_in_blocks(dataset, steps, spec.seed, max(blocks.values()))
        most = shuffle.kept_samples * max(each.streams for each in matched) + steps.micro_batch
        kept = round(min(most, steps.num_samples) * own_cost.size)
        row_groups = dataset.row_group_bytes
    pairs = steps.num_samples * (steps.num_samples - 1)
    full_meeting = [
        steps.steps_per_epoch * batches * size * (size - 1) / max(1, pairs)
        for batches, size in ((steps.shards, steps.micro_batch), (1, steps.global_batch))
    ]
    own_meeting = _meeting(steps, spec.seed, num_steps, full_meeting)
    return ShufflePlan(
        own=_order(own_meeting, own_cost),
        full=_order(full_meeting, full_cost),
        micro_batches=num_steps * steps.shards,
        readers=max(each.readers for each in matched),
        streams=streams_for_one_reader(lengths, spec.data.loaders),
        kept_bytes=kept,
        row_group_bytes=row_groups,
        processes=max(1, spec.data.loaders),
    )


def _lengths(shards: int, num_workers: int) -> range:
    """Return how many shards a worker may have, whichever hosts the workers are on, see ``shard_blocks``."""
    most = math.ceil(shards / num_workers)
    return range(max(1, shards - most * (num_workers - 1)), most + 1)


class _Cost(NamedTuple):
    """What it costs to read samples; None: no object holds several."""

    requests: float | None = None
    """Requests for each sample."""
    read: float | None = None
    """Bytes read for each byte used."""
    size: float = 0.0
    """Bytes of a sample's encoded image."""


def _order(meeting: Sequence[float], cost: _Cost) -> Order:
    meet_in_micro_batch, meet_in_step = meeting
    return Order(
        meet_in_micro_batch=meet_in_micro_batch, meet_in_step=meet_in_step, requests=cost.requests, read=cost.read
    )


def _drawn(purpose: str, seed: int, most: int, length: int) -> list[int]:
    """Return up to ``most`` different numbers below ``length``."""
    numbers: list[int] = permute(
        np.arange(min(most, length), dtype=np.uint64), length, draw_key(purpose, seed)
    ).tolist()
    return numbers


def _meeting(steps: StepPlan, seed: int, num_steps: int, of_full: list[float]) -> list[float]:
    """Return the fraction of neighbours that meet in a micro-batch, and in a step.

    Two neighbours in a block meet as often as any two samples of it, because its samples are permuted; so all pairs in
    a block count. Neighbours in different blocks meet as in a permutation of all samples.
    """
    assert steps.shuffle is not None
    block, num_samples = steps.shuffle.block, steps.num_samples
    found = np.zeros(2)
    for step in _drawn("mixing", seed, num_steps, steps.steps_per_epoch):
        blocks = [steps.samples(seed, step, shard) // block for shard in range(steps.shards)]
        found += sum(map(_num_pairs, blocks)), _num_pairs(np.concatenate(blocks))
    whole, short = divmod(num_samples, block)
    all_pairs = (whole * block * (block - 1) + short * (short - 1)) / 2
    borders = math.ceil(num_samples / block) - 1
    neighbours = max(1, num_samples - 1)
    meet = found * steps.steps_per_epoch / num_steps / max(1, all_pairs)
    return [float(own * (num_samples - 1 - borders) + full * borders) / neighbours for own, full in zip(meet, of_full)]


def _num_pairs(blocks: np.ndarray) -> int:
    """Return the number of pairs in the same block."""
    _, counts = np.unique(blocks, return_counts=True)
    return int((counts * (counts - 1)).sum()) // 2


def _blocks_read(steps: StepPlan, blocks: Sequence[range], loaders: int) -> float:
    """Return how many blocks the processes of all workers, of these shards, read in an epoch.

    The only reader of a stream reads each of its blocks once. Several readers never use up a block, so they do not keep
    it until the next piece of the stream comes to what it has of the block. A stretch is expected to touch one block
    more than its length less one has, for an epoch begins anywhere in a block.
    """
    assert steps.shuffle is not None
    shuffle = steps.shuffle
    streams = [steps.stream(step, 0)[0] for step in range(min(shuffle.streams, steps.steps_per_epoch))]
    of_readers = dict[int, float]()
    for readers in {stream_readers(len(block), shuffle.streams, loaders).readers for block in blocks}:
        stretches = [length for stream in streams for length in (stream.pieces if readers > 1 else [stream.length])]
        of_shard = sum(1 + (length - 1) / shuffle.block for length in stretches)
        of_readers[readers] = of_shard * _readers_of_block(readers, shuffle, steps.micro_batch)
    return sum(
        len(block) * of_readers[stream_readers(len(block), shuffle.streams, loaders).readers] for block in blocks
    )


def _readers_of_block(readers: int, shuffle: ShuffleSpec, micro_batch: int) -> float:
    """Return how many of the readers of a stream are expected to get a sample of a block.

    A round takes one from it. Micro-batches of several rounds that follow each other go to all readers in turn; of a
    micro-batch that is shorter than a round, the one with the sample is drawn.
    """
    if micro_batch > shuffle.lanes:
        return min(readers, 1 + (shuffle.block - 1) * shuffle.lanes / micro_batch)
    return readers * (1 - (1 - 1 / readers) ** shuffle.block)


def _cost_in_blocks(dataset: Any, steps: StepPlan, seed: int, blocks_read: float) -> _Cost:
    """Return the cost of so many blocks in an epoch."""
    assert steps.shuffle is not None
    block, num_samples = steps.shuffle.block, steps.num_samples
    numbers = _drawn("blocks", seed, max(1, _SAMPLES // block), math.ceil(num_samples / block))
    drawn = [range(number * block, min((number + 1) * block, num_samples)) for number in numbers]
    requests, read, size = _cost_of(dataset, drawn)
    assert requests is not None
    assert read is not None
    times = blocks_read * sum(map(len, drawn)) / len(drawn) / (steps.steps_per_epoch * steps.global_batch)
    return _Cost(requests * times, read * times, size)


def _micro_batches(steps: StepPlan, seed: int) -> list[list[int]]:
    wanted = max(1, _SAMPLES // steps.micro_batch)
    drawn = _drawn("micro-batches", seed, wanted, steps.steps_per_epoch * steps.shards)
    return [steps.samples(seed, *divmod(number, steps.shards)).tolist() for number in drawn]


def _cost_of(dataset: Any, batches: Sequence[Sequence[int]]) -> _Cost:
    """Return the cost if each batch is read once, and all of it is used."""
    cost, num_samples = dataset.read_cost(batches), sum(map(len, batches))
    return _Cost(cost.requests / num_samples, cost.read / max(1, cost.used), cost.used / num_samples)
