"""Which shards a worker has: never more than an even share rounded up, and as few partial sums as that leaves."""

import time
from collections.abc import Iterator, Sequence
from functools import cache

import pytest

from cluster.collectives.summation_tree import complete_subtrees
from jobs.shard_blocks import shard_blocks

Hosts = Sequence[int]
"""The number of workers on each host, in rank order."""


@cache
def num_partial_sums(first: int, end: int, shards: int) -> int:
    return len(complete_subtrees(range(first, end), shards))


def even_blocks(shards: int, hosts: Hosts) -> list[range]:
    count = sum(hosts)
    return [range(rank * shards // count, (rank + 1) * shards // count) for rank in range(count)]


def sums_of_hosts(blocks: Sequence[range], hosts: Hosts) -> list[int]:
    """The number of partial sums of each host."""
    ranks = iter(blocks)
    of_hosts = [[next(ranks) for _ in range(num_workers)] for num_workers in hosts]
    return [num_partial_sums(host[0].start, host[-1].stop, blocks[-1].stop) for host in of_hosts]


def fewest_sums(shards: int, hosts: Hosts) -> int:
    """The smallest number of partial sums that no host need exceed: every division into hosts is looked at."""
    most, limit = -(-shards // sum(hosts)), 1
    while True:
        reached = {0}
        for num_workers in hosts:
            reached = {
                end
                for first in reached
                for end in range(first + num_workers, min(first + most * num_workers, shards) + 1)
                if num_partial_sums(first, end, shards) <= limit
            }
        if shards in reached:
            return limit
        limit += 1


def all_hosts(num_workers: int) -> Iterator[tuple[int, ...]]:
    """Every division of workers into hosts."""
    yield (num_workers,)
    for first in range(1, num_workers):
        yield from ((first, *others) for others in all_hosts(num_workers - first))


SMALL = [
    *((shards, hosts) for shards in range(1, 12) for count in range(1, shards + 1) for hosts in all_hosts(count)),
    *((shards, hosts) for shards in range(12, 25) for count in range(1, 7) for hosts in all_hosts(count)),
]
EQUAL = [
    (shards, (num_workers,) * num_hosts)
    for shards in (*range(1, 41), 64, 96, 100)
    for num_workers in (1, 2, 3, 4, 8)
    for num_hosts in range(1, shards // num_workers + 1)
]


@pytest.mark.parametrize("cases", [SMALL, EQUAL], ids=["all small ones", "equal hosts"])
class TestAll:
    def test_blocks_hold_everything_once_and_no_more_than_an_even_share(self, cases: list[tuple[int, Hosts]]) -> None:
        for shards, hosts in cases:
            blocks = shard_blocks(shards, hosts)

            assert len(blocks) == sum(hosts)
            assert [shard for block in blocks for shard in block] == list(range(shards))
            assert min(map(len, blocks)) >= 1
            assert max(map(len, blocks)) == -(-shards // sum(hosts)), (shards, hosts)

    def test_hosts_have_at_most_the_partial_sums_of_even_blocks(self, cases: list[tuple[int, Hosts]]) -> None:
        for shards, hosts in cases:
            ours, even = (sums_of_hosts(make(shards, hosts), hosts) for make in (shard_blocks, even_blocks))

            assert max(ours) <= max(even), (shards, hosts)
            assert sum(ours) <= sum(even), (shards, hosts)

    def test_workers_have_at_most_the_partial_sums_of_even_blocks_of_their_host(
        self, cases: list[tuple[int, Hosts]]
    ) -> None:
        for shards, hosts in cases:
            blocks, first = shard_blocks(shards, hosts), 0
            for num_workers in hosts:
                own, first = blocks[first : first + num_workers], first + num_workers
                start, length = own[0].start, own[-1].stop - own[0].start
                ends = [start + length * worker // num_workers for worker in range(num_workers + 1)]
                even = [num_partial_sums(*block, shards) for block in zip(ends, ends[1:])]
                assert max(num_partial_sums(block.start, block.stop, shards) for block in own) <= max(even)

    def test_blocks_of_equal_size_are_the_even_ones(self, cases: list[tuple[int, Hosts]]) -> None:
        """Then nothing is free."""
        for shards, hosts in cases:
            if shards % sum(hosts) == 0:
                assert shard_blocks(shards, hosts) == even_blocks(shards, hosts)


def test_equal_hosts_of_several_workers_have_the_fewest_partial_sums() -> None:
    for shards, hosts in EQUAL:
        if hosts[0] > 1:
            fewest = fewest_sums(shards, hosts)
            assert max(sums_of_hosts(shard_blocks(shards, hosts), hosts)) == fewest, (shards, hosts)


@pytest.mark.parametrize(
    ("num_hosts", "even", "ours", "blocks"),
    [
        (1, [1], [1], [64]),
        (2, [1, 1], [1, 1], [32, 64]),
        (3, [3, 5, 3], [1, 2, 2], [16, 40, 64]),
        (4, [1, 1, 1, 1], [1, 1, 1, 1], [16, 32, 48, 64]),
        (5, [2, 3, 5, 4, 3], [1, 1, 1, 1, 1], [16, 24, 32, 48, 64]),
        (6, [2, 4, 3, 2, 4, 3], [1, 1, 1, 1, 1, 1], [8, 16, 32, 40, 48, 64]),
        (7, [2, 4, 4, 3, 3, 4, 2], [1, 1, 1, 1, 1, 1, 1], [8, 16, 24, 32, 48, 56, 64]),
        (8, [1] * 8, [1] * 8, [8, 16, 24, 32, 40, 48, 56, 64]),
    ],
)
def test_64_shards_on_hosts_of_8(num_hosts: int, even: list[int], ours: list[int], blocks: list[int]) -> None:
    hosts = [8] * num_hosts
    found = shard_blocks(64, hosts)

    assert sums_of_hosts(even_blocks(64, hosts), hosts) == even
    assert sums_of_hosts(found, hosts) == ours
    assert [block.stop for block in found[7::8]] == blocks


@pytest.mark.parametrize(
    ("shards", "hosts", "sums"),
    [
        (64, [4, 8, 8, 1], [1, 2, 2, 1]),  # not [1, 1, 3, 1], which are as many in all
        (27, [2, 2, 2], [1, 2, 3]),  # the last host has (18-19), (20-23) and (24-26), which lacks its end
    ],
)
def test_other_hosts(shards: int, hosts: Hosts, sums: list[int]) -> None:
    assert sums_of_hosts(shard_blocks(shards, hosts), hosts) == sums


def test_boundaries_that_save_no_partial_sum_stay_even() -> None:
    for shards in range(1, 65):
        for num_hosts in range(1, shards + 1):
            hosts = [1] * num_hosts
            ours, even = shard_blocks(shards, hosts), even_blocks(shards, hosts)
            if sorted(sums_of_hosts(ours, hosts)) == sorted(sums_of_hosts(even, hosts)):
                assert ours == even


@pytest.mark.parametrize("hosts", [[8] * 127, [8] * 127 + [5], [7] * 128, [1000]], ids=len)
def test_many_workers_are_quick(hosts: Hosts) -> None:
    """Ten times what it takes on a slow core."""
    begin = time.process_time()
    shard_blocks(4096, hosts)
    assert time.process_time() - begin < 0.5
