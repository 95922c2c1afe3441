"""How the work of a verification is cut, and what comes of a part of it; without torch."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jobs.images.indexing.index import Index

SAMPLES_AT_ONCE = 64
"""Samples that a process reads, neighbours in the index, before it answers."""
_MOST_IN_STRETCH = 16 * SAMPLES_AT_ONCE
"""Neighbours that one process reads, part by part, unless a row group of Parquet has more."""
_STRETCHES_PER_PROCESS = 4
"""At least, so that they end at about the same time."""


@dataclass(frozen=True, slots=True)
class Part:
    """Samples for a process to verify. Shapes: numbers int64 [samples], stamps uint64 [samples]."""

    numbers: np.ndarray
    """In the index."""
    stamps: np.ndarray
    """Of their objects when an earlier command found them whole; 0: none has."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of the samples of a part; each is in one of the three."""

    whole: np.ndarray
    """Those that were read and decoded. Shapes: RECORD [found whole]."""
    unchanged: np.ndarray
    """The numbers of those that were not read, because their stamps are the same. Shapes: int64 [unchanged]."""
    broken: dict[int, str] = field(default_factory=dict)
    """By the numbers of the others, what is wrong with them."""

    def __len__(self) -> int:
        return len(self.whole) + len(self.unchanged) + len(self.broken)


def stretches(index: Index, numbers: np.ndarray, num_processes: int) -> Iterator[range]:
    """Yield stretches of neighbours, each for one process: whole parts, or of Parquet whole row groups.

    A row group is read and decoded as a whole, so two processes that share one would both do that.

    Args:
        index: The index of the samples.
        numbers: Theirs, sorted.
        num_processes: How many processes there are.

    Returns:
        The positions of samples in ``numbers``.

    Shapes: numbers int64 [samples].
    """
    even = len(numbers) / max(1, num_processes * _STRETCHES_PER_PROCESS)
    length = min(max(1, math.ceil(even / SAMPLES_AT_ONCE)) * SAMPLES_AT_ONCE, _MOST_IN_STRETCH)
    objects, begin = index.object_numbers, 0

    def row_group(number: int) -> tuple[int, int]:
        return int(objects[number]), index.place(int(number)).offset

    while begin < len(numbers):
        end = min(begin + length, len(numbers))
        if index.source.format == "parquet":
            end = bisect_right(numbers, row_group(numbers[end - 1]), lo=end, key=row_group)
        yield range(begin, end)
        begin = end
