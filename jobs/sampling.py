"""Sampling: which shards a worker has, and which samples and random keys a step, as pure functions.

No function here keeps a state. A permutation maps a position in an epoch to a sample and is computed for that position
alone, so a run over a billion samples starts at any step at once. A random draw is seeded by its purpose, so it does
not depend on the number of workers or restarts.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
"""Rounds of the Feistel network."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How a run is divided into epochs, steps and micro-batches.

    ``step`` counts completed optimizer steps: the step from n to n + 1 uses batch n.

    Attributes:
        num_samples: Samples in the dataset.
        global_batch: Samples in a step.
        shards: Micro-batches in a step.
        epochs: Epochs in the run.
    """

    num_samples: int
    global_batch: int
    shards: int
    epochs: int

    @property
    def micro_batch(self) -> int:
        """Samples of one shard in one step."""
        return self.global_batch // self.shards

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the samples left out differ from epoch to epoch."""
        return self.num_samples // self.global_batch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, batch: int) -> int:
        """Returns the epoch, counted from 0, of batch number ``batch``."""
        return batch // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Returns whether an epoch is complete after ``step`` steps."""
        return step % self.steps_per_epoch == 0

    def samples(self, seed: int, batch: int, shard: int) -> np.ndarray:
        """Returns the sample numbers of the micro-batch of ``shard`` in batch number ``batch``.

        Shapes: int64 [micro_batch].
        """
        start = batch % self.steps_per_epoch * self.global_batch + shard * self.micro_batch
        positions = np.arange(start, start + self.micro_batch, dtype=np.uint64)
        return permute(positions, self.num_samples, draw_key("order", seed, self.epoch_of(batch)))


def shard_blocks(shards: int, hosts: Sequence[int]) -> list[range]:
    """Returns the contiguous shards of each rank: no rank has more than ceil(shards / workers), and each has one.

    The slowest worker bounds a step, so how many shards the others have is free. The blocks of hosts, and then those of
    the workers of a host, begin where few partial sums remain to be sent: at the ends of large subtrees of the
    summation tree. Where that makes no difference, they are even.

    The largest number of partial sums of a host, for 64 shards on hosts of 8 workers:

        hosts          1  2  3  4  5  6  7  8
        even blocks    1  1  5  1  5  4  4  1
        these blocks   1  1  2  1  1  1  1  1

    Args:
        shards: The number of shards in a step.
        hosts: The number of workers on each host, in rank order; at most ``shards`` in all.
    """
    most = math.ceil(shards / sum(hosts))
    return [
        block
        for num_workers, host_block in zip(hosts, _divide(range(shards), hosts, most, shards))
        for block in _divide(host_block, [1] * num_workers, most, shards)
    ]


def _divide(block: range, parts: Sequence[int], most: int, shards: int) -> list[range]:
    """Returns the block divided among parts with these numbers of workers, each of 1 to ``most`` shards per worker.

    Dynamic programming over the boundaries that ``_round_boundaries`` proposes. It minimises the largest number of
    partial sums of a part, then how many parts have so many, then the same for one fewer, and so on; then the distance
    from the even boundaries. Those are always proposed, so no part has more partial sums than the worst even one.
    """
    # A part weighs more than all parts together with one partial sum fewer.
    weights = [(len(parts) + 1) ** count for count in range(2 * shards.bit_length() + 1)]
    num_workers, num_before = sum(parts), 0
    paths = {block.start: (0, 0, block.start)}
    """The best path to each boundary: its weight, its distance from the even one, and the boundary before."""
    steps = []
    for part in parts:
        num_before += part
        num_after = num_workers - num_before
        first = max(block.start + num_before, block.stop - most * num_after)
        last = min(block.start + most * num_before, block.stop - num_after)
        even = block.start + len(block) * num_before // num_workers
        longer = {}
        for end in _round_boundaries(even, range(first, last + 1)):
            ways = [
                (weight + weights[num_partial_sums(start, end, shards)], distance + abs(end - even), start)
                for start, (weight, distance, _) in paths.items()
                if part <= end - start <= most * part
            ]
            if ways:
                longer[end] = min(ways)
        paths = longer
        steps.append(paths)
    end, blocks = block.stop, []
    for paths in reversed(steps):
        start = paths[end][2]
        blocks.append(range(start, end))
        end = start
    return blocks[::-1]


def _round_boundaries(even: int, allowed: range) -> set[int]:
    """Returns the even boundary and its nearest multiples of each power of two on both sides, as far as allowed."""
    boundaries = {even}
    size = 2
    while size < 2 * len(allowed):
        below = even // size * size
        boundaries |= {boundary for boundary in (below, below + size) if boundary in allowed}
        size *= 2
    return boundaries


def num_partial_sums(start: int, end: int, shards: int) -> int:
    """Returns the number of complete subtrees in the shards [start, end), without building the tree.

    Subtrees grow from ``start`` up to the middle, the number that divides by the largest power of two, and shrink from
    there to ``end``: one for each bit of either distance.
    """
    if end == shards:  # the last subtree may lack its end
        size = (start ^ (end - 1)).bit_length()
        return ((((end - 1) >> size) + 1 << size) - start).bit_count()
    size = (start ^ end).bit_length() - 1
    middle = end >> size << size
    return (middle - start).bit_count() + (end - middle).bit_count()


def draw_key(purpose: str, *numbers: int) -> int:
    """Returns a 63-bit seed for the draws of one purpose, such as ``draw_key("step", seed, step, shard)``."""
    text = ":".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def permute(positions: np.ndarray, length: int, key: int) -> np.ndarray:
    """Returns where a keyed permutation of ``range(length)`` sends each position.

    A Feistel network permutes the numbers below an even power of two. A result that is not below ``length`` is sent
    through the network again until it is (cycle walking), which keeps the map a bijection. It needs memory for the
    positions alone.

    Shapes: uint64 [n] -> int64 [n].

    Source: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, cycle walking.
    """
    half_bits = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    round_keys = [np.uint64(draw_key("round", key, number)) for number in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    outside = values >= length
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = values >= length
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: np.uint64, round_keys: list[np.uint64]) -> np.ndarray:
    """Permutes numbers of 2 * ``half_bits`` bits by a balanced Feistel network. Shapes: uint64 [n] -> [n]."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Mixes the bits of 64-bit words. Shapes: uint64 [n] -> [n].

    Source: the finaliser of splitmix64 (S. Vigna, https://prng.di.unimi.it/splitmix64.c).
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
