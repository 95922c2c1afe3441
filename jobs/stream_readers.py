"""Which loader processes of a worker read the streams of its shards, in the order of ``data.shuffle``."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamReaders:
    """How the streams of a worker and its processes that load are matched."""

    readers: int
    """Processes that read each stream, and so its blocks."""
    streams: int
    """Streams that each process reads."""


def stream_readers(shards: int, streams: int, loaders: int) -> StreamReaders:
    """Returns how they are matched for a worker with ``shards`` shards of ``streams`` streams each.

    torch hands micro-batches to its loader processes in turn: step by step, and in each step shard by shard.
    """
    processes, num_streams = max(1, loaders), shards * streams
    common = math.gcd(processes, num_streams)
    return StreamReaders(readers=processes // common, streams=num_streams // common)


def streams_for_one_reader(shards: Iterable[int], loaders: int) -> int:
    """Returns the fewest streams of a shard with which one process reads each, for workers of these shards."""
    return math.lcm(*(stream_readers(each, 1, loaders).readers for each in shards))
