"""What it costs to read samples of an index together, without reading them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.storage.store import ByteRange
from jobs.images.index import Index, Place
from jobs.images.row_groups import KEPT_BYTES

_GAP = 2**16
"""Bytes between two samples that are read and dropped, because another request takes longer."""


@dataclass(frozen=True, slots=True)
class ReadCost:
    """What a process asks a store for, beside what it keeps from before."""

    requests: int
    """Ranges of objects; of Parquet, row groups."""
    read: int
    """Bytes; of Parquet, rows."""
    used: int
    """Those of the samples."""
    size: int
    """Bytes of the encoded images of the samples; of Parquet, by the sizes of its files."""


def read_cost(index: Index, numbers: Sequence[int]) -> ReadCost:
    """Returns the cost of samples whose objects hold others too."""
    if index.source.format == "parquet":
        return _cost_of_row_groups(index, np.asarray(numbers))
    places = [index.place(number) for number in numbers]
    ranges = [range_of([places[each] for each in run]) for run in runs_of(places)]
    used = sum(place.length for place in places)
    return ReadCost(len(ranges), sum(each.size or 0 for each in ranges), used, used)


def kept_row_groups(index: Index) -> int:
    """Returns the most bytes of row groups that a process keeps to read samples from; 0: the data is no Parquet."""
    import pyarrow.compute as pc

    if index.source.format != "parquet":
        return 0
    size: int = pc.sum(index.objects["size"]).as_py()
    return min(KEPT_BYTES, size)


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
        return ByteRange(first.object)
    end = max(place.offset + place.length for place in places)
    return ByteRange(first.object, first.offset, end - first.offset)


def _cost_of_row_groups(index: Index, numbers_N: np.ndarray) -> ReadCost:
    objects_N, groups_N = index.object_numbers[numbers_N], _row_groups(index, numbers_N)
    requests = rows = size = 0
    for number in np.unique(objects_N):
        begin, end = np.searchsorted(index.object_numbers, [number, number + 1])  # samples are in the order of objects
        rows_of_groups = np.bincount(_row_groups(index, np.arange(begin, end)))
        touched = np.unique(groups_N[objects_N == number])
        requests, rows = requests + len(touched), rows + int(rows_of_groups[touched].sum())
        share = np.count_nonzero(objects_N == number) / (end - begin)
        size += round(share * index.objects["size"][int(number)].as_py())
    return ReadCost(requests, rows, len(numbers_N), size)


def _row_groups(index: Index, numbers_N: np.ndarray) -> np.ndarray:
    groups: np.ndarray = index.places(numbers_N)["offset"].to_numpy()
    return groups
