"""Which sample, which shard and which random key belong to a step: pure functions of the description.

Nothing here advances a state. A position in an epoch maps to a sample through a permutation that is
computed for that position alone, so a run over a billion samples starts anywhere at once, and a random
draw is seeded by what it is for, so the number of workers or restarts cannot show in it.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How steps lie in epochs. ``step`` counts optimizer steps completed: the step from n to n + 1 uses batch n."""

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
        """Whole global batches in an epoch; the samples beyond them differ from epoch to epoch."""
        return self.num_samples // self.global_batch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, batch: int) -> int:
        """The epoch, counted from 0, that batch number ``batch`` belongs to."""
        return batch // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is complete once ``step`` steps are."""
        return step % self.steps_per_epoch == 0

    def samples(self, seed: int, batch: int, shard: int) -> np.ndarray:
        """The sample numbers of one micro-batch.

        Shapes: int64 [micro_batch].
        """
        start = batch % self.steps_per_epoch * self.global_batch + shard * self.micro_batch
        positions = np.arange(start, start + self.micro_batch, dtype=np.uint64)
        return permute(positions, self.num_samples, draw_key("order", seed, self.epoch_of(batch)))


def shard_block(shards: int, world_size: int, rank: int) -> range:
    """The contiguous shards of one worker; block sizes differ by at most one."""
    return range(rank * shards // world_size, (rank + 1) * shards // world_size)


def draw_key(purpose: str, *numbers: int) -> int:
    """A 63-bit seed for the draws of one purpose, such as ``draw_key("dropout", seed, step, shard)``."""
    text = ":".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def permute(positions: np.ndarray, length: int, key: int) -> np.ndarray:
    """Where a keyed permutation of ``range(length)`` sends each position, in memory for the positions alone.

    A Feistel network permutes the next even power of two; a value that falls outside ``length`` walks
    on through the network until it is inside, which keeps the map a bijection.

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
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words. Source: the finaliser of splitmix64 (S. Vigna, prng.di.unimi.it)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
