"""What it costs to read samples of an index together, without reading them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.storage.store import ByteRange
from jobs.images.indexing.index import Index, Place

KEPT_ROW_GROUPS = 2**28
"""Bytes of decoded row groups of Parquet that a process keeps: two or more of those that ``datasets`` writes, which
hold up to 100 MB."""
ROW_GROUPS_AT_ONCE = 2**27
"""Bytes of row groups that it reads before it decodes them."""
_GAP = 2**16
"""Bytes between two samples that are read and dropped, because another request takes longer."""


@dataclass(frozen=True, slots=True)
class ReadCost:
    """What a process asks a store for, beside what it keeps from before."""

    requests: int
    """Ranges of objects; of Parquet, row groups."""
    read: int
    """Bytes."""
    used: int
    """Bytes of the samples."""


def read_cost(index: Index, batches: Iterable[Sequence[int]]) -> ReadCost:
    """Returns the cost of batches of samples, each read together, whose objects hold others too.

    The index of a Parquet file knows no sizes of its rows: each counts as an equal part of the file.
    """
    if index.source.format == "parquet":
        return _cost_of_row_groups(index, batches)
    requests = read = used = 0
    for numbers in batches:
        places = [index.place(number) for number in numbers]
        ranges = [range_of([places[each] for each in run]) for run in runs_of(places)]
        requests, read = requests + len(ranges), read + sum(each.size or 0 for each in ranges)
        used += sum(place.length for place in places)
    return ReadCost(requests, read, used)


def row_group_bytes(index: Index) -> int:
    """Returns the most bytes of row groups that a process holds: those it keeps and those it reads; 0: no Parquet."""
    if index.source.format != "parquet":
        return 0
    objects_N, groups_N, sizes = index.object_numbers, index.offsets, index.objects["size"].to_numpy()
    rows = np.bincount(objects_N, minlength=len(sizes))
    firsts = np.flatnonzero((np.diff(objects_N, prepend=-1) != 0) | (np.diff(groups_N, prepend=-1) != 0))
    of_groups = np.diff(firsts, append=len(objects_N)) * (sizes / np.maximum(1, rows))[objects_N[firsts]]
    total, largest = int(sizes.sum()), math.ceil(of_groups.max(initial=0))
    return sum(min(total, max(most, largest)) for most in (KEPT_ROW_GROUPS, ROW_GROUPS_AT_ONCE))


def runs_of(places: Sequence[Place]) -> list[list[int]]:
    """Returns which places are read together: those that lie one behind the other, by their numbers in ``places``."""
    order = sorted(range(len(places)), key=lambda each: (places[each].object, places[each].offset))
    runs: list[list[int]] = []
    for each in order:
        place, last = places[each], places[runs[-1][-1]] if runs else None
        is_near = last is not None and place.length >= 0 and place.object == last.object and last.length >= 0
        if is_near and last is not None and place.offset - (last.offset + last.length) <= _GAP:
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs


def range_of(places: Sequence[Place]) -> ByteRange:
    """Returns the range that holds all samples of a run."""
    first = places[0]
    if first.length < 0:
        # To its end, whatever its size was, to notice one that grew.
        return ByteRange(first.object, expected=first.size if first.size >= 0 else None)
    end = max(place.offset + place.length for place in places)
    return ByteRange(first.object, first.offset, end - first.offset)


def _cost_of_row_groups(index: Index, batches: Iterable[Sequence[int]]) -> ReadCost:
    objects_N, groups_N, sizes = index.object_numbers, index.offsets, index.objects["size"].to_numpy()
    known: dict[int, np.ndarray] = {}
    """By object: the number of rows in each of its row groups."""
    requests, read, used = 0, 0.0, 0.0
    for numbers in batches:
        numbers_N = np.asarray(numbers)
        objects_of_batch, groups_of_batch = objects_N[numbers_N], groups_N[numbers_N]
        for number in np.unique(objects_of_batch).tolist():
            if number not in known:
                begin, end = np.searchsorted(objects_N, [number, number + 1])  # samples are in the order of objects
                known[number] = np.bincount(groups_N[begin:end])
            rows, own = known[number], groups_of_batch[objects_of_batch == number]
            touched, size = np.unique(own), int(sizes[number]) / int(rows.sum())
            requests, read, used = requests + len(touched), read + rows[touched].sum() * size, used + len(own) * size
    return ReadCost(requests, round(read), round(used))
