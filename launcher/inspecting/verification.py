"""Reads every sample of some indexes in processes of this machine, shows how far that is, and can be interrupted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import Interrupted
from cluster.process.orders import Task
from jobs.images.index import Index
from launcher.inspecting.facts import IndexedSamples, IndexReader
from launcher.inspecting.readers import answers
from launcher.inspecting.verified_file import VerifiedFile


@dataclass(frozen=True, slots=True)
class VerifiedIndex:
    """What became of the samples of an index that were to be read."""

    whole: np.ndarray
    """Shapes: RECORD [found whole]."""
    broken: dict[int, str]
    """By their numbers in the index, the errors of the others."""
    num_resumed: int
    """How many of the whole ones an earlier command had read."""


@dataclass(slots=True)
class _Verification:
    """The work on one index."""

    reader: IndexReader
    kept: VerifiedFile
    wanted: np.ndarray
    """The numbers of the samples to read, sorted."""
    left: np.ndarray
    """Those of them that no earlier command has found whole."""
    broken: dict[int, str]


def verify(
    datasets: Sequence[IndexedSamples], make_task: Callable[[str, Any], Task], show: Callable[[int, int], None]
) -> dict[Path, VerifiedIndex]:
    """Read, decode and hash samples, each once; go on where an earlier call was interrupted.

    Args:
        datasets: Where their samples lie; several may have parts of one index.
        make_task: Returns the task of a process, from its entry and its content.
        show: Receives how many samples were read, and how many there are.

    Returns:
        By the paths of the indexes, what became of their samples.

    Raises:
        Interrupted: On Ctrl-C; what was read is kept.
        StorageError: The store does not answer, another command verifies the same, or this host's disk is full.
        TrainingError: A process died, or the function that reads failed.
    """
    with ExitStack() as on_exit:
        work = [_begin(path, datasets, on_exit) for path in dict.fromkeys(each.reader.index_path for each in datasets)]
        total = sum(len(each.wanted) for each in work)
        num_read = total - sum(len(each.left) for each in work)
        show(num_read, total)
        try:
            for each in work:
                for num_new in _read(each, make_task):
                    num_read += num_new
                    show(num_read, total)
        except KeyboardInterrupt:
            interrupted = Interrupted(
                f"interrupted: {num_read:,} of {total:,} samples are verified; the same command goes on with the others"
            )
            interrupted.document = {"verified": {"read": num_read, "samples": total}}
            raise interrupted from None
        found = {each.reader.index_path: _result(each) for each in work}
        for each in work:  # last: an interrupted command goes on with none of them from the start
            each.kept.remove()
    return found


def _begin(path: Path, datasets: Sequence[IndexedSamples], on_exit: ExitStack) -> _Verification:
    of_index = [each for each in datasets if each.reader.index_path == path]
    kept = on_exit.enter_context(closing(VerifiedFile(Index(path).digest)))
    wanted = np.unique(np.concatenate([each.numbers for each in of_index]))
    left = np.setdiff1d(wanted, kept.records()["number"], assume_unique=True)
    return _Verification(of_index[0].reader, kept, wanted, left, {})


def _read(work: _Verification, make_task: Callable[[str, Any], Task]) -> Iterator[int]:
    """Read what is left, keep it, and yield the numbers of samples read."""
    with closing(answers(work.left, work.reader, make_task)) as verified:
        for each in verified:
            work.kept.add(each.whole)
            work.broken |= each.broken
            yield len(each.whole) + len(each.broken)


def _result(work: _Verification) -> VerifiedIndex:
    records = work.kept.records()
    whole = records[np.isin(records["number"], work.wanted)]
    return VerifiedIndex(whole, work.broken, len(work.wanted) - len(work.left))
