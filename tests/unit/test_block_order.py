"""The order of ``data.shuffle``: blocks of neighbours, mixed in the lanes of streams."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest

from jobs.sampling import BlockOrder, StepPlan, draw_key, numbered_keys, permute, permute_each
from jobs.spec import ShuffleSpec

SEED = 3
GRID = [
    StepPlan(num_samples, shards * micro_batch, shards, 3, ShuffleSpec(block=block, buffer=buffer, streams=streams))
    for num_samples, block, buffer, streams, (shards, micro_batch) in itertools.product(
        (40, 103), (1, 3, 8, 64), (8, 64), (1, 3), ((1, 5), (2, 4))
    )
    if block <= buffer
]
"""Short last blocks, blocks longer than the data, lanes without a round, streams without a step, and none of these."""


def naive_epoch(plan: StepPlan, epoch: int) -> Iterator[list[list[int]]]:
    """Yields the micro-batches of each step, from lists of all samples of the epoch."""
    assert plan.shuffle is not None
    block, lanes, streams = plan.shuffle.block, plan.shuffle.lanes, plan.shuffle.streams
    samples = list(range(plan.num_samples))
    blocks = [samples[first : first + block] for first in range(0, len(samples), block)]
    num_whole = len(samples) // block
    order = whole(num_whole, draw_key("order of blocks", SEED, epoch)) if num_whole else []
    sequence = []
    for number in [*order, *range(num_whole, len(blocks))]:
        own = blocks[number]
        sequence += [own[place] for place in numbered(len(own), draw_key("order in blocks", SEED, epoch), number)]
    first = draw_key("first of the ring", SEED, epoch) % len(sequence)
    sequence = sequence[first:] + sequence[:first]

    streams_of_shards: list[list[Iterator[int]]] = []
    for shard in range(plan.shards):
        streams_of_shards.append([])
        for number in range(streams):
            length = len(range(number, plan.steps_per_epoch, streams)) * plan.micro_batch
            own, sequence = sequence[:length], sequence[length:]
            streams_of_shards[-1].append(iter(mixed(own, block, lanes, shard * streams + number, epoch)))
    for step in range(plan.steps_per_epoch):
        yield [list(itertools.islice(of_shard[step % streams], plan.micro_batch)) for of_shard in streams_of_shards]


def mixed(samples: list[int], block: int, lanes: int, stream: int, epoch: int) -> list[int]:
    """Returns the samples of a stream in the order in which it gives them."""
    key = draw_key("stream", SEED, epoch, stream)
    spread = max(1, block // lanes)
    rounds = len(samples) // lanes
    while rounds >= block and rounds % block != spread % block:
        rounds -= 1
    if rounds < block:
        rounds = 0
    of_lanes = [[samples.pop(0) for _ in range(rounds)] for _ in range(lanes)]
    taken = []
    for number in range(rounds):
        taken += [of_lanes[lane][number] for lane in numbered(lanes, key, number)]
    return taken + ([samples[place] for place in whole(len(samples), key)] if samples else [])


def whole(length: int, key: int) -> list[int]:
    """Returns the whole permutation of a key."""
    return permute(np.arange(length, dtype=np.uint64), length, key).tolist()


def numbered(length: int, key: int, number: int) -> list[int]:
    """Returns the whole permutation of one of a key's numbers."""
    positions = np.arange(length, dtype=np.uint64)
    keys = numbered_keys(key, np.full_like(positions, number))
    return permute_each(positions, np.full_like(positions, length), keys).tolist()


def epoch_of(plan: StepPlan, epoch: int) -> list[list[list[int]]]:
    first = epoch * plan.steps_per_epoch
    return [
        [plan.samples(SEED, first + step, shard).tolist() for shard in range(plan.shards)]
        for step in range(plan.steps_per_epoch)
    ]


def flat(epoch: list[list[list[int]]]) -> list[int]:
    return [number for step in epoch for shard in step for number in shard]


def test_it_is_the_order_of_the_naive_lists_with_every_sample_at_most_once() -> None:
    assert len(GRID) == 56
    for plan in GRID:
        for epoch in (0, 2):
            found = epoch_of(plan, epoch)
            assert found == list(naive_epoch(plan, epoch)), (plan, epoch)
            numbers = flat(found)
            assert len(set(numbers)) == len(numbers) == plan.steps_per_epoch * plan.global_batch
            assert set(numbers) <= set(range(plan.num_samples))


def test_what_is_left_out_differs_from_epoch_to_epoch_and_is_any_sample_equally_often() -> None:
    """7 of 47 are left out, so each 298 times of 2,000; six standard deviations are 96."""
    plan = StepPlan(47, 40, 1, 2_000, ShuffleSpec(block=10, buffer=20))
    left_out = np.zeros(47, dtype=int)
    for epoch in range(plan.epochs):
        unused = np.setdiff1d(np.arange(47), flat(epoch_of(plan, epoch)))
        assert len(unused) == 7
        left_out[unused] += 1

    assert abs(left_out - 2_000 * 7 / 47).max() < 96


def test_every_place_gets_every_sample_equally_often() -> None:
    """12 samples over 3,000 epochs: a place has each 250 times; six standard deviations are 91."""
    plan = StepPlan(12, 12, 1, 3_000, ShuffleSpec(block=3, buffer=6))
    epochs = np.array([flat(epoch_of(plan, epoch)) for epoch in range(plan.epochs)])

    for place in epochs.T:
        assert abs(np.bincount(place, minlength=12) - 250).max() < 91


def test_neighbours_meet_as_seldom_as_the_buffer_allows() -> None:
    """A micro-batch of 16 has two rounds of 8 lanes, so it joins two samples of a block, if they are in lanes, in one
    of 63 cases: 114 of 7,296 neighbours; in the rest it joins 30 of 894. Six standard deviations of 144 are 72."""
    plan = StepPlan(8192, 32, 2, 1, ShuffleSpec(block=64, buffer=512))
    micro_batches = [set(shard) for step in epoch_of(plan, 0) for shard in step]

    assert abs(sum(number + 1 in batch for batch in micro_batches for number in batch) - 144) < 72


@pytest.mark.parametrize(("block", "buffer", "streams"), [(16, 256, 1), (16, 256, 4), (64, 256, 1), (4, 512, 2)])
def test_blocks_are_read_once_at_a_constant_rate(block: int, buffer: int, streams: int) -> None:
    """A stream that keeps two blocks a lane and four more reads each of its blocks once."""
    plan = StepPlan(16384, 256, 4, 1, ShuffleSpec(block=block, buffer=buffer, streams=streams))
    assert plan.shuffle is not None
    kept: dict[int, OrderedDict[int, None]] = {number: OrderedDict() for number in range(streams)}
    reads = []
    for step in range(plan.steps_per_epoch):
        own, missed = kept[step % streams], 0
        for number in np.unique(plan.samples(SEED, step, shard=1) // block).tolist():
            missed += number not in own
            own[number] = None
            own.move_to_end(number)
            while len(own) > 2 * plan.shuffle.lanes + 4:
                own.popitem(last=False)
        reads.append(missed)

    pieces = [length for step in range(streams) for length in plan.stream(step, 1)[0].pieces]
    expected = sum(1 + (length - 1) / block for length in pieces)
    assert abs(sum(reads) - expected) <= 2 + 0.02 * expected
    stream, _ = plan.stream(0, 1)
    all_open = -(-stream.lanes // plan.micro_batch) * streams
    in_lanes = stream.lanes * stream.rounds // plan.micro_batch * streams
    assert max(reads[all_open:in_lanes]) <= plan.micro_batch / block * 1.5 + 2


def test_a_whole_order_of_blocks_is_a_bijection() -> None:
    for num_samples, block in ((1, 1), (1, 5), (7, 3), (100, 10), (101, 10), (9, 10)):
        positions = np.arange(num_samples, dtype=np.uint64)
        samples = BlockOrder(num_samples, block, SEED, epoch=1).samples(positions)
        assert np.array_equal(np.sort(samples), np.arange(num_samples))


def test_a_permutation_for_each_position_is_a_bijection_for_each_key() -> None:
    for length in (*range(1, 20), 63, 64, 65, 1000):
        keys = numbered_keys(SEED, np.repeat(np.arange(4, dtype=np.uint64), length))
        positions = np.tile(np.arange(length, dtype=np.uint64), 4)
        found = permute_each(positions, np.full_like(positions, length), keys).reshape(4, length)
        assert np.array_equal(np.sort(found), np.tile(np.arange(length), (4, 1)))


def test_every_permutation_of_a_few_comes_equally_often() -> None:
    """24 permutations of 4 over 12,000 keys: each 500 times; six standard deviations are 131."""
    found = permutations(4, num_keys=12_000)
    _, counts = np.unique(found, axis=0, return_counts=True)

    assert len(counts) == 24
    assert abs(counts - 500).max() < 131


def test_every_place_of_a_permutation_gets_each_two_numbers_equally_often() -> None:
    """70 numbers over 10,000 keys: each 143 times; six standard deviations are 71. Two are neighbours 143 times too."""
    found = permutations(70, num_keys=10_000)
    assert max(abs(np.bincount(place, minlength=70) - 10_000 / 70).max() for place in found.T) < 71
    steps = np.array([np.bincount((found[:, place + 1] - found[:, place]) % 70, minlength=70) for place in range(69)])
    assert steps[:, 0].max() == 0
    assert abs(steps[:, 1:] - 10_000 / 69).max() < 72


def permutations(length: int, num_keys: int) -> np.ndarray:
    """Returns the permutation of each key. Shapes: int64 [num_keys, length]."""
    keys = numbered_keys(SEED, np.repeat(np.arange(num_keys, dtype=np.uint64), length))
    positions = np.tile(np.arange(length, dtype=np.uint64), num_keys)
    return permute_each(positions, np.full_like(positions, length), keys).reshape(-1, length).astype(np.int64)


def test_its_bits_are_fixed() -> None:
    """Else a run that is resumed with a newer version would see other samples."""
    plan = StepPlan(100, 8, 2, 1, ShuffleSpec(block=5, buffer=10, streams=2))
    assert [plan.samples(0, 3, shard).tolist() for shard in range(2)] == [[48, 81, 47, 83], [85, 97, 87, 96]]


def test_any_step_of_a_billion_samples_is_there_at_once() -> None:
    """Within the time limit of a test, though an epoch has 15 million steps."""
    plan = StepPlan(10**9, 64, 4, 90, ShuffleSpec(block=100, buffer=10_000))
    batches = [plan.samples(0, plan.total_steps - 1 - number * 1_000_003, shard=3) for number in range(100)]

    assert all(len(set(batch.tolist())) == 16 and batch.min() >= 0 and batch.max() < 10**9 for batch in batches)
