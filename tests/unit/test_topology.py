"""Which workers exchange slices with which."""

from itertools import product

from cluster.collectives.topology import Level, Peers, exchange_levels, workers_by_host
from jobs.shard_blocks import shard_blocks

LAYOUTS = [hosts for number in (1, 2, 3, 4) for hosts in product((1, 2, 3, 4), repeat=number)]


def levels_of(hosts: tuple[int, ...], shards: int) -> list[Level]:
    return exchange_levels(shard_blocks(shards, hosts), hosts)


def test_workers_of_a_host_are_neighbours() -> None:
    assert workers_by_host(["a", "a", "b", "c", "c", "c"]) == [2, 1, 3]


def test_ranks_of_a_host_that_are_no_neighbours_are_two_hosts() -> None:
    assert workers_by_host(["a", "b", "a"]) == [1, 1, 1]


def test_one_worker_has_no_peers() -> None:
    assert levels_of((1,), 4) == []


def test_workers_of_one_host_exchange_slices_once() -> None:
    blocks = (range(2), range(2, 4), range(4, 6), range(6, 8))
    assert levels_of((4,), 8) == [(Peers((0, 1, 2, 3), blocks, num_slices=4),)]


def test_hosts_with_one_worker_each_exchange_slices_once() -> None:
    assert levels_of((1, 1), 2) == [(Peers((0, 1), (range(1), range(1, 2)), num_slices=2),)]


def test_a_host_sums_up_before_its_slices_leave() -> None:
    within, between = levels_of((2, 2), 4)

    assert within == (
        Peers((0, 1), (range(1), range(1, 2)), num_slices=2),
        Peers((2, 3), (range(2, 3), range(3, 4)), num_slices=2),
    )
    assert between == (
        Peers((0, 2), (range(2), range(2, 4)), num_slices=2),
        Peers((1, 3), (range(2), range(2, 4)), num_slices=2),
    )


def test_workers_of_a_larger_host_hand_their_sums_to_a_neighbour() -> None:
    join, within, between = levels_of((3, 2), 5)

    assert join[0] == Peers((0,), (range(1),), num_slices=1)
    assert join[1] == Peers((1, 2), (range(1, 2), range(2, 3)), num_slices=1)
    assert within[0] == Peers((0, 1), (range(1), range(1, 3)), num_slices=2)
    assert within[1] == Peers((3, 4), (range(3, 4), range(4, 5)), num_slices=2)
    assert between[0] == Peers((0, 3), (range(3), range(3, 5)), num_slices=2)
    assert between[1] == Peers((1, 4), (range(3), range(3, 5)), num_slices=2)
    assert within[2:] == between[2:] == (Peers((2,), (range(2, 3),), num_slices=1),)


def test_every_rank_has_its_place_at_every_level() -> None:
    for hosts in LAYOUTS:
        for shards in (sum(hosts), sum(hosts) + 1, 2 * sum(hosts)):
            for level in levels_of(hosts, shards):
                assert sorted(rank for peers in level for rank in peers.ranks) == list(range(sum(hosts)))


def test_every_slice_gets_the_sum_of_all_shards() -> None:
    """What the peers of a level bring is what they have got at the level before."""
    for hosts in LAYOUTS:
        shards = sum(hosts) + 1
        summed = dict(enumerate(shard_blocks(shards, hosts)))
        for level in levels_of(hosts, shards):
            for peers in level:
                assert all(summed[rank] == block for rank, block in zip(peers.ranks, peers.blocks))
                assert all(left.stop == right.start for left, right in zip(peers.blocks, peers.blocks[1:]))
                union = range(peers.blocks[0].start, peers.blocks[-1].stop)
                summed.update(dict.fromkeys(peers.ranks[: peers.num_slices], union))
        assert sum(block == range(shards) for block in summed.values()) == len(hosts) * min(hosts)


def test_a_worker_has_few_peers() -> None:
    for hosts in LAYOUTS:
        num_peers = dict.fromkeys(range(sum(hosts)), 0)
        for level in levels_of(hosts, sum(hosts)):
            for peers in level:
                for rank in peers.ranks:
                    num_peers[rank] += len(peers.ranks) - 1
        host_of = [number for number, count in enumerate(hosts) for _ in range(count)]
        assert all(num_peers[rank] <= hosts[host_of[rank]] - 1 + len(hosts) - 1 for rank in num_peers)
