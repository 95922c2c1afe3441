"""Sampling: which samples and which random keys belong to a step, as pure functions of the description.

No function here keeps a state. A permutation maps a position in an epoch to a sample and is computed for that position
alone, so a run over a billion samples starts at any step at once. A random draw is seeded by its purpose, so it does
not depend on the number of workers or restarts.
"""

import hashlib
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


def shard_block(shards: int, world_size: int, rank: int) -> range:
    """Returns the contiguous shards of one rank; the numbers of shards of two ranks differ by at most one."""
    return range(rank * shards // world_size, (rank + 1) * shards // world_size)


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
