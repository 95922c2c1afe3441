"""Which workers exchange slices of a gradient with which: those of one host first, then those of different hosts.

A network between hosts is slower than the links inside one. So the workers of a host add up their gradients before
anything leaves it, and each of them sends a slice of the sum. Where hosts have different numbers of workers, some of a
larger host hand their sums to a neighbour first, so that every host has the same number of slices to exchange. A host
of 8 beside one of 1 then has a worker that receives 7 whole sums, though no more leaves the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Peers:
    """Workers that exchange slices with each other.

    Attributes:
        ranks: Their ranks, in the order of their shards.
        blocks: The shards whose sum each of them brings.
        num_slices: The number of slices they exchange; the first ``num_slices`` of them own one each.
    """

    ranks: tuple[int, ...]
    blocks: tuple[range, ...]
    num_slices: int


Level = tuple[Peers, ...]
"""All workers, divided into peers: every rank is in exactly one ``Peers``, which may be it alone."""


def workers_by_host(addresses: Sequence[str]) -> list[int]:
    """Returns the number of workers on each host, from the addresses of the hosts by rank.

    Ranks of one host that are not neighbours count as several hosts.
    """
    return [len(list(group)) for _, group in groupby(addresses)]


def exchange_levels(blocks: Sequence[range], hosts: Sequence[int]) -> list[Level]:
    """Returns the levels of an exchange, from a worker's own sums to the sum of all shards.

    A level at which no worker has a peer is left out: one worker has no level, one host has one, and so have hosts with
    one worker each.

    Args:
        blocks: The contiguous shards of each rank, in rank order.
        hosts: The number of workers on each host, in rank order.
    """
    num_lanes = min(hosts)
    join, within, rest, lanes = [], [], [], []
    for ranks in _runs(range(len(blocks)), hosts):
        joined = list(_runs(ranks, _evenly(len(ranks), num_lanes)))
        join += [_peers(run, blocks, num_slices=1) for run in joined]
        owners = [run[0] for run in joined]
        sums = [_union(blocks[run.start : run.stop]) for run in joined]
        within.append(Peers(tuple(owners), tuple(sums), num_slices=num_lanes))
        lanes.append((owners, _union(sums)))
        rest += [_peers(range(rank, rank + 1), blocks, num_slices=1) for rank in ranks if rank not in owners]
    between = [
        Peers(
            ranks=tuple(owners[lane] for owners, _ in lanes),
            blocks=tuple(block for _, block in lanes),
            num_slices=len(lanes),
        )
        for lane in range(num_lanes)
    ]
    levels = [tuple(join), (*within, *rest), (*between, *rest)]
    return [level for level in levels if any(len(peers.ranks) > 1 for peers in level)]


def _peers(ranks: range, blocks: Sequence[range], num_slices: int) -> Peers:
    return Peers(tuple(ranks), tuple(blocks[rank] for rank in ranks), num_slices)


def _runs(ranks: range, lengths: Sequence[int]) -> Iterator[range]:
    begin = 0
    for length in lengths:
        yield ranks[begin : begin + length]
        begin += length


def _evenly(total: int, parts: int) -> list[int]:
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def _union(blocks: Sequence[range]) -> range:
    return range(blocks[0].start, blocks[-1].stop)
