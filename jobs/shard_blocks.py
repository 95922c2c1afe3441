"""Which shards each worker has, as a pure function of the number of workers on each host."""

import math
from collections.abc import Sequence


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
