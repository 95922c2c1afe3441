"""Names what differs between two indexes of the same source, made at different times. Pure.

Samples are matched by digests of their names: numbers take little memory, and are sorted fast.
"""

import os
from collections.abc import Sequence

import numpy as np

from cluster.errors import storable
from jobs.images.indexing.index import Index
from jobs.images.indexing.index_columns import draw

_MOST_NAMES = 3
_BLOCK = 2**20
"""How many samples are compared at once."""


def index_difference(old: Index, new: Index) -> str:
    """Returns what differs between the samples of two indexes, in one line; empty: nothing.

    What was passed over does not count: a file that a desktop leaves among the images changes no sample.
    """
    in_old_N, in_new_N, is_gone_O, is_added_N = _matched(_identities(old), _identities(new))
    changed_C = in_new_N[_changed(old, new, in_old_N, in_new_N)]
    parts = [
        _counted("added", new, np.flatnonzero(is_added_N)),
        _counted("removed", old, np.flatnonzero(is_gone_O)),
        _counted("changed", new, changed_C),
        _classes("classes added", sorted(set(new.classes) - set(old.classes))),
        _classes("classes removed", sorted(set(old.classes) - set(new.classes))),
    ]
    if not any(parts) and (old.classes, old.details) == (new.classes, new.details) and (in_old_N == in_new_N).all():
        return ""
    return "; ".join(filter(None, parts)) or "its samples, classes or splits are in another order"


def _identities(index: Index) -> np.ndarray:
    """Returns a number for each sample, from its name: a draw alone lacks the folder of a container.

    Shapes: uint64 [samples].
    """
    names = index.objects["name"]
    objects = np.fromiter((draw(os.fsdecode(name.as_py())) for name in names), np.uint64, len(names))
    identities: np.ndarray = index.draws + objects[index.object_numbers]
    return identities


def _matched(old_O: np.ndarray, new_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Matches samples by their numbers; of several with one, as in a table with a line twice, the first the first.

    Returns:
        The numbers of the matched samples in the old index, and in the new one, in the order of the new one; which of
        the old and which of the new have no match.

    Shapes: old_O, new_N uint64; int64 [M], int64 [M], bool [O], bool [N].
    """
    order_O, order_N = np.argsort(old_O, kind="stable"), np.argsort(new_N, kind="stable")
    sorted_O, sorted_N = old_O[order_O], new_N[order_N]
    nth_N = np.arange(len(sorted_N)) - np.searchsorted(sorted_N, sorted_N)
    at_N = np.searchsorted(sorted_O, sorted_N) + nth_N
    is_there_N = at_N < len(sorted_O)
    is_there_N[is_there_N] = sorted_O[at_N[is_there_N]] == sorted_N[is_there_N]
    in_old_M, in_new_M = order_O[at_N[is_there_N]], order_N[is_there_N]
    as_listed = np.argsort(in_new_M, kind="stable")
    is_gone_O, is_added_N = np.ones(len(old_O), bool), np.ones(len(new_N), bool)
    is_gone_O[in_old_M] = False
    is_added_N[in_new_M] = False
    return in_old_M[as_listed], in_new_M[as_listed], is_gone_O, is_added_N


def _changed(old: Index, new: Index, in_old_M: np.ndarray, in_new_M: np.ndarray) -> np.ndarray:
    """Returns which pairs of samples differ in their object, place or label. Shapes: bool [M]."""
    blocks = [
        _changed_block(old, new, in_old_M[begin : begin + _BLOCK], in_new_M[begin : begin + _BLOCK])
        for begin in range(0, len(in_old_M), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, bool)


def _changed_block(old: Index, new: Index, in_old_M: np.ndarray, in_new_M: np.ndarray) -> np.ndarray:
    import pyarrow.compute as pc

    was, now = old.places(in_old_M), new.places(in_new_M)
    is_changed_M = np.zeros(len(in_old_M), bool)
    for name, column in was.items():
        is_changed_M |= pc.not_equal(column, now[name]).to_numpy(zero_copy_only=False)
    is_changed_M |= _relabelled(old, new, in_old_M, in_new_M)
    return is_changed_M


def _relabelled(old: Index, new: Index, in_old_M: np.ndarray, in_new_M: np.ndarray) -> np.ndarray:
    """Returns which pairs of samples have other labels; a class counts by its name, not by its number."""
    if bool(old.classes) != bool(new.classes) or old.labels.shape[1:] != new.labels.shape[1:]:
        return np.ones(len(in_old_M), bool)
    was, now = old.labels[in_old_M], new.labels[in_new_M]
    if not old.classes:
        is_same: np.ndarray = ((was == now) | (np.isnan(was) & np.isnan(now))).all(axis=1)
        return ~is_same
    numbers = {name: number for number, name in enumerate(new.classes)}
    number_now = np.array([numbers.get(name, -1) for name in old.classes])
    is_different: np.ndarray = number_now[was] != now
    return is_different


def _counted(what: str, index: Index, numbers: np.ndarray) -> str:
    if not len(numbers):
        return ""
    names = [str(index.place(int(number))) for number in numbers[:_MOST_NAMES]]
    return f"{len(numbers):,} sample{'s' * (len(numbers) > 1)} {what}: {_named(names, len(numbers))}"


def _classes(what: str, names: Sequence[str]) -> str:
    return f"{what}: {_named(names[:_MOST_NAMES], len(names))}" if names else ""


def _named(names: Sequence[str], num: int) -> str:
    return storable(", ".join(names)) + (", ..." if num > len(names) else "")
