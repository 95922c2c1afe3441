"""Sampling: which samples and random keys a step has, as pure functions.

No function here keeps a state. A permutation maps a position in an epoch to a sample and is computed for that position
alone, so the order of a billion samples starts at any step at once. That is the order: an index of images
(``jobs.images.indexing.index``) takes about 50 bytes a sample, is packed and sent as a whole, and is meant for some ten
million. A random draw is seeded by its purpose, so it does not depend on the number of workers or restarts.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from jobs.spec import ShuffleSpec

_ROUNDS = 6
"""Rounds of the Feistel network."""
_FEWEST = 64
"""Numbers that a Feistel network with uneven halves permutes, or more."""
_UNEVEN_ROUNDS = 8
"""Its rounds, each of which changes one half."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The step of splitmix64: what tells keys with neighbouring numbers apart."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How a run is divided into epochs, steps and micro-batches.

    ``step`` counts completed optimizer steps: the step from n to n + 1 uses batch n.

    Attributes:
        num_samples: Samples in the dataset.
        global_batch: Samples in a step.
        shards: Micro-batches in a step.
        epochs: Epochs in the run.
        shuffle: Which order an epoch has; None: a permutation of all samples.
    """

    num_samples: int
    global_batch: int
    shards: int
    epochs: int
    shuffle: ShuffleSpec | None = None

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
        if self.shuffle is not None:
            stream, place = self.stream(batch % self.steps_per_epoch, shard)
            positions = np.arange(place, place + self.micro_batch, dtype=np.uint64)
            order = BlockOrder(self.num_samples, self.shuffle.block, seed, self.epoch_of(batch))
            return order.samples(stream.positions(positions, seed, self.epoch_of(batch)))
        start = batch % self.steps_per_epoch * self.global_batch + shard * self.micro_batch
        positions = np.arange(start, start + self.micro_batch, dtype=np.uint64)
        return permute(positions, self.num_samples, draw_key("order", seed, self.epoch_of(batch)))

    def stream(self, step_of_epoch: int, shard: int) -> tuple["Stream", int]:
        """Returns the stream that a shard takes a micro-batch from, and the place of its first sample in the stream.

        The streams of a shard take turns. There must be a ``shuffle``.
        """
        assert self.shuffle is not None
        number = step_of_epoch % self.shuffle.streams
        each, longer = divmod(self.steps_per_epoch, self.shuffle.streams)
        steps_before = shard * self.steps_per_epoch + number * each + min(number, longer)
        stream = Stream(
            number=shard * self.shuffle.streams + number,
            start=steps_before * self.micro_batch,
            length=(each + (number < longer)) * self.micro_batch,
            block=self.shuffle.block,
            lanes=self.shuffle.lanes,
        )
        return stream, step_of_epoch // self.shuffle.streams * self.micro_batch


@dataclass(frozen=True, slots=True)
class Stream:
    """A stretch of the sequence of an epoch, and the order in which its samples are taken.

    The stretch is cut into lanes of equal length. A round takes the next sample of each lane, in an order of its own.
    So one block of each lane is open at a time, and a block gives a sample to each of ``block`` rounds. The lanes are
    as long as they can be if their ends are to be spread evenly over a block: then they come to new blocks one after
    the other, and blocks are read at a constant rate. The rest, about what the buffer holds, is permuted as a whole.

    Attributes:
        number: Which stream of the epoch it is.
        start: Its first position in the sequence.
        length: Its samples.
        block: Samples of a block.
        lanes: The number of lanes.
    """

    number: int
    start: int
    length: int
    block: int
    lanes: int

    @property
    def rounds(self) -> int:
        """Samples of a lane."""
        most, spread = self.length // self.lanes, max(1, self.block // self.lanes)
        rounds = most - (most - spread) % self.block
        return rounds if rounds >= self.block else 0

    @property
    def pieces(self) -> list[int]:
        """The lengths of the stretches of the sequence that are read one sample after the other: lanes, and rest."""
        rest = self.length - self.lanes * self.rounds
        return [length for length in (*[self.rounds] * self.lanes, rest) if length]

    def positions(self, places: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Returns the position in the sequence of each place in this stream.

        Shapes: uint64 [n] -> uint64 [n].
        """
        in_lanes, key = self.lanes * self.rounds, draw_key("stream", seed, epoch, self.number)
        found = np.empty_like(places)
        is_rest = places >= in_lanes
        if is_rest.any():
            found[is_rest] = in_lanes + permute(places[is_rest] - np.uint64(in_lanes), self.length - in_lanes, key)
        rounds, turns = np.divmod(places[~is_rest], np.uint64(self.lanes))
        lanes = permute_each(turns, np.full_like(turns, self.lanes), numbered_keys(key, rounds))
        found[~is_rest] = lanes * np.uint64(self.rounds) + rounds
        return found + np.uint64(self.start)


class BlockOrder:
    """The sequence of an epoch that keeps neighbours together: blocks in random order, and within each its samples.

    The last block, which may be shorter, comes after the others; and the sequence is a ring, which begins at a random
    position. So every sample has the same chance to lie at the end, where what fills no global batch is left out.

    Args:
        num_samples: Samples in the dataset.
        block: Samples of a block.
        seed: The run's seed.
        epoch: The epoch, from 0.
    """

    def __init__(self, num_samples: int, block: int, seed: int, epoch: int) -> None:
        self._num_samples, self._block = num_samples, block
        self._order_key = draw_key("order of blocks", seed, epoch)
        self._samples_key = draw_key("order in blocks", seed, epoch)
        self._first = draw_key("first of the ring", seed, epoch) % num_samples

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Returns the number of the sample at each position. Shapes: uint64 [n] -> int64 [n]."""
        num_whole, short = divmod(self._num_samples, self._block)
        ranks, offsets = np.divmod(
            (positions + np.uint64(self._first)) % np.uint64(self._num_samples), np.uint64(self._block)
        )
        is_whole = ranks < num_whole
        blocks = np.full_like(ranks, num_whole)
        blocks[is_whole] = permute(ranks[is_whole], num_whole, self._order_key) if num_whole else 0
        lengths = np.where(is_whole, np.uint64(self._block), np.uint64(short))
        offsets = permute_each(offsets, lengths, numbered_keys(self._samples_key, blocks))
        return (blocks * np.uint64(self._block) + offsets).astype(np.int64)


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


def permute_each(positions: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns where each position goes in a permutation of its own, of ``range(length)``; see ``permute``.

    The Feistel network may have halves of different sizes. So it permutes the numbers below any power of two, and fewer
    results are outside; each time through the network costs as much for few numbers as for many. It would be too small
    to have all permutations of fewer than 64 numbers: of so few, a position goes to the rank of its draw.

    Shapes: uint64 [n], each -> uint64 [n].
    """
    values, one = positions.copy(), np.uint64(1)
    is_short = lengths < _FEWEST
    if is_short.any():
        values[is_short] = _ranks(positions[is_short], lengths[is_short], keys[is_short])
    num_bits = np.frexp((lengths - one).astype(np.float64))[1]  # exact: lengths are below 2**53
    low_bits = (num_bits // 2).astype(np.uint64)
    low_masks = (one << low_bits) - one
    high_masks = (one << (num_bits - num_bits // 2).astype(np.uint64)) - one
    round_keys = np.stack([numbered_keys(number, keys) for number in range(_UNEVEN_ROUNDS)])
    outside = np.flatnonzero(~is_short)
    while len(outside):
        network = values[outside], low_bits[outside], low_masks[outside], high_masks[outside], round_keys[:, outside]
        values[outside] = _uneven_feistel(*network)
        outside = outside[values[outside] >= lengths[outside]]
    return values


def _ranks(positions: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the rank of each position by its draw among those of all below its length. Shapes: uint64 [n] -> [n]."""
    numbers = np.arange(int(lengths.max()), dtype=np.uint64)
    draws = _mix(_mix(numbers + _GOLDEN) + keys[:, np.newaxis])
    own = np.take_along_axis(draws, positions[:, np.newaxis].astype(np.int64), axis=1)
    is_before = (draws < own) | ((draws == own) & (numbers < positions[:, np.newaxis]))
    ranks: np.ndarray = (is_before & (numbers < lengths[:, np.newaxis])).sum(axis=1, dtype=np.uint64)
    return ranks


def _uneven_feistel(
    values: np.ndarray, low_bits: np.ndarray, low_masks: np.ndarray, high_masks: np.ndarray, round_keys: np.ndarray
) -> np.ndarray:
    """Permutes numbers whose lower and higher bits change in turn. Shapes: uint64 [n] each, [rounds, n] -> [n]."""
    low, high = values & low_masks, values >> low_bits
    for number, round_key in enumerate(round_keys):
        if number % 2:
            low = low ^ (_mix(high ^ round_key) & low_masks)
        else:
            high = high ^ (_mix(low ^ round_key) & high_masks)
    permuted: np.ndarray = (high << low_bits) | low
    return permuted


def numbered_keys(key: int, numbers: np.ndarray) -> np.ndarray:
    """Returns a key for each number. Shapes: uint64 [n] -> uint64 [n]."""
    keys: np.ndarray = _mix(_mix(numbers + _GOLDEN) + np.uint64(key))
    return keys


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
