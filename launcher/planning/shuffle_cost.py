"""What the order of ``data.shuffle`` costs and how it mixes, beside a permutation of all samples.

The mixing follows from real steps of the first epoch, and the cost from the real index of the data; which steps, blocks
and micro-batches are looked at is drawn by the seed. No sample is read.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

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


def plan_shuffle(dataset: Any, steps: StepPlan, spec: JobSpec) -> ShufflePlan | None:
    """Return price and mixing of the order of training samples; None if it is a permutation of all."""
    shuffle = steps.shuffle
    if shuffle is None:
        return None
    loaders, shards = max(1, spec.data.loaders), math.ceil(steps.shards / spec.workers.most)
    # torch hands micro-batches to its loader processes in turn: step by step, and in each step shard by shard.
    readers = loaders // math.gcd(loaders, shards * shuffle.streams)
    num_steps = min(steps.steps_per_epoch, max(1, _MICRO_BATCHES // steps.shards))
    own_cost: tuple[float, float] | tuple[None, None] = (None, None)
    full_cost = own_cost
    if getattr(dataset, "shares_objects", False):
        own_cost = _cost_in_blocks(dataset, steps, spec.seed, readers)
        full_cost = _cost_of(dataset, _micro_batches(replace(steps, shuffle=None), spec.seed))
    pairs = steps.num_samples * (steps.num_samples - 1)
    full_meeting = [
        steps.steps_per_epoch * batches * size * (size - 1) / max(1, pairs)
        for batches, size in ((steps.shards, steps.micro_batch), (1, steps.global_batch))
    ]
    own_meeting = _meeting(steps, spec.seed, num_steps, full_meeting)
    return ShufflePlan(
        own=Order(
            meet_in_micro_batch=own_meeting[0], meet_in_step=own_meeting[1], requests=own_cost[0], read=own_cost[1]
        ),
        full=Order(
            meet_in_micro_batch=full_meeting[0], meet_in_step=full_meeting[1], requests=full_cost[0], read=full_cost[1]
        ),
        micro_batches=num_steps * steps.shards,
        readers=readers,
        streams=loaders // math.gcd(loaders, shards),
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


def _cost_in_blocks(dataset: Any, steps: StepPlan, seed: int, readers: int) -> tuple[float, float]:
    """Return requests for each sample, and bytes read for each byte used, of a process that reads whole blocks.

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
    requests, read = _cost_of(dataset, drawn)
    samples_read = blocks_read * sum(map(len, drawn)) / len(drawn)
    used = steps.steps_per_epoch * steps.global_batch
    return requests * samples_read / used, read * samples_read / used


def _micro_batches(steps: StepPlan, seed: int) -> list[list[int]]:
    wanted = max(1, _SAMPLES // steps.micro_batch)
    drawn = _drawn("micro-batches", seed, wanted, steps.steps_per_epoch * steps.shards)
    return [steps.samples(seed, *divmod(number, steps.shards)).tolist() for number in drawn]


def _cost_of(dataset: Any, batches: Iterable["list[int] | range"]) -> tuple[float, float]:
    """Return requests for each sample, and bytes read for each byte used, if each batch is read at once."""
    own = list(batches)
    costs = [dataset.read_cost(batch) for batch in own]
    used = sum(cost.used for cost in costs)
    return sum(cost.requests for cost in costs) / sum(map(len, own)), sum(cost.read for cost in costs) / max(1, used)
