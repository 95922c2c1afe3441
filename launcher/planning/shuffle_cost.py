"""What the order of ``data.shuffle`` costs and how it mixes, beside a permutation of all samples.

The mixing follows from real steps of the first epoch, and the cost from the real index of the data; which steps, blocks
and micro-batches are looked at is drawn by the seed. No sample is read.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jobs.sampling import StepPlan, draw_key, permute
from jobs.spec import JobSpec

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
    """Bytes read for each byte used; of Parquet, rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShufflePlan:
    """The order of the description, beside a permutation of all samples."""

    own: Order
    full: Order
    """Its mixing follows by arithmetic."""
    micro_batches: int
    """The number of micro-batches from which the mixing of ``own`` follows."""
    readers: int
    """Processes that read each block, by ``data.loaders``."""
    streams: int
    """The number of streams with which one process would read each block."""
    kept: int | None
    """About how many bytes of encoded images a process keeps that have been read and wait for their turn; None: it
    reads no blocks."""
    kept_row_groups: int = 0
    """The most bytes of row groups of Parquet that it keeps beside them."""


def plan_shuffle(dataset: Any, steps: StepPlan, spec: JobSpec) -> ShufflePlan | None:
    """Return price and mixing of the order of training samples; None if it is a permutation of all."""
    shuffle = steps.shuffle
    if shuffle is None:
        return None
    loaders, shards = max(1, spec.data.loaders), math.ceil(steps.shards / spec.workers.most)
    # torch hands micro-batches to its loader processes in turn: step by step, and in each step shard by shard.
    readers = loaders // math.gcd(loaders, shards * shuffle.streams)
    num_steps = min(steps.steps_per_epoch, max(1, _MICRO_BATCHES // steps.shards))
    own_cost = full_cost = _Cost()
    kept, row_groups = None, 0
    if getattr(dataset, "shares_objects", False):
        own_cost = _cost_in_blocks(dataset, steps, spec.seed, readers)
        full_cost = _Cost(*_once(dataset, _micro_batches(replace(steps, shuffle=None), spec.seed)))
        # Full buffers; and of the other blocks that it may keep, what other processes use.
        in_buffers = shuffle.buffer * shuffle.streams * shards * readers / loaders
        in_others = shuffle.kept_blocks * shards * shuffle.block - in_buffers
        kept = round(min(in_buffers + in_others * (1 - 1 / readers), steps.num_samples) * own_cost.size)
        row_groups = dataset.kept_row_groups
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
        readers=readers,
        streams=loaders // math.gcd(loaders, shards),
        kept=kept,
        kept_row_groups=row_groups,
    )


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


def _cost_in_blocks(dataset: Any, steps: StepPlan, seed: int, readers: int) -> _Cost:
    """Return the cost for processes that read whole blocks.

    The only reader of a stream reads each of its blocks once. Several readers never use up a block, so they do not keep
    it until the next piece of the stream comes to what it has of the block. A stretch is expected to touch one block
    more than its length less one has, for an epoch begins anywhere in a block.
    """
    assert steps.shuffle is not None
    block, num_samples = steps.shuffle.block, steps.num_samples
    streams = [steps.stream(step, 0)[0] for step in range(min(steps.shuffle.streams, steps.steps_per_epoch))]
    stretches = [length for stream in streams for length in (stream.pieces if readers > 1 else [stream.length])]
    blocks_read = readers * steps.shards * sum(1 + (length - 1) / block for length in stretches)
    numbers = _drawn("blocks", seed, max(1, _SAMPLES // block), math.ceil(num_samples / block))
    drawn = [range(number * block, min((number + 1) * block, num_samples)) for number in numbers]
    requests, read, size = _once(dataset, drawn)
    samples_read = blocks_read * sum(map(len, drawn)) / len(drawn)
    used = steps.steps_per_epoch * steps.global_batch
    return _Cost(requests * samples_read / used, read * samples_read / used, size)


def _micro_batches(steps: StepPlan, seed: int) -> list[list[int]]:
    wanted = max(1, _SAMPLES // steps.micro_batch)
    drawn = _drawn("micro-batches", seed, wanted, steps.steps_per_epoch * steps.shards)
    return [steps.samples(seed, *divmod(number, steps.shards)).tolist() for number in drawn]


def _once(dataset: Any, batches: Iterable["list[int] | range"]) -> tuple[float, float, float]:
    """Return the values of a ``_Cost`` if each batch is read at once."""
    own = list(batches)
    costs, num_samples = [dataset.read_cost(batch) for batch in own], sum(map(len, own))
    requests, read, used, size = (sum(values) for values in zip(*map(astuple, costs)))
    return requests / num_samples, read / max(1, used), size / num_samples
