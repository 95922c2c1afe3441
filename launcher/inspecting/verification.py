"""Reads every sample of some indexes in processes of this machine, shows how far that is, and can be interrupted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import Interrupted
from cluster.process.orders import Task
from jobs.images.indexing.index import Index
from launcher.inspecting.facts import IndexedSamples, IndexReader
from launcher.inspecting.parts import Part
from launcher.inspecting.readers import answers
from launcher.inspecting.stamps import UNKNOWN
from launcher.inspecting.verified_file import RECORD, VerifiedFile


@dataclass(slots=True)
class VerifiedIndex:
    """What became of the samples of an index that were to be read."""

    whole: list[np.ndarray] = field(default_factory=list)
    """Empty, unless digests are kept. Shapes: RECORD [any] each."""
    broken: dict[int, str] = field(default_factory=dict)
    """By their numbers in the index, what is wrong with the others."""
    num_read: int = 0
    """How many there are, whole or broken."""
    num_unstamped: int = 0
    """How many of the whole ones the next command would read again."""
    num_resumed: int = 0
    """How many of the whole ones an earlier command had read."""
    resumed_since: int | None = None
    """When it read the first of those, in seconds since 1970."""

    @property
    def records(self) -> np.ndarray:
        """Those of the whole ones, if digests are kept. Shapes: RECORD [found whole]."""
        return np.concatenate([np.zeros(0, RECORD), *self.whole])


@dataclass(frozen=True, slots=True)
class _Verification:
    """The work on one index."""

    reader: IndexReader
    kept: VerifiedFile
    earlier: np.ndarray
    """What an earlier command has found whole, sorted by number. Shapes: RECORD [any]."""
    work: Part
    found: VerifiedIndex


def verify(
    datasets: Sequence[IndexedSamples],
    make_task: Callable[[str, Any], Task],
    show: Callable[[int, int], None],
    tell: Callable[[str], None],
    *,
    with_digests: bool,
) -> dict[Path, VerifiedIndex]:
    """Read, decode and hash samples, each once; go on where an earlier call was interrupted.

    Args:
        datasets: Where their samples lie; several may have parts of one index.
        make_task: Returns the task of a process, from its entry and its content.
        show: Receives how many samples were read, and how many there are.
        tell: Receives a line about what takes long.
        with_digests: Keep the digests of whole samples in memory.

    Returns:
        By the paths of the indexes, what became of their samples.

    Raises:
        Interrupted: On Ctrl-C; what was read is kept.
        StorageError: The store does not answer, another command verifies the same, or this host's disk is full.
        TrainingError: A process died, or the function that reads failed.
    """
    with ExitStack() as on_exit:
        work = [_begin(path, datasets, on_exit) for path in dict.fromkeys(each.reader.index_path for each in datasets)]
        total, num_read = sum(len(each.work.numbers) for each in work), 0
        show(num_read, total)
        try:
            for each in work:
                for num_new in _read(each, make_task, tell, with_digests):
                    num_read += num_new
                    show(num_read, total)
        except KeyboardInterrupt:
            raise _interrupted([each.found for each in work], num_read, total) from None
        assert num_read == total, "every sample is whole or broken"
        for each in work:  # last: an interrupted command goes on with none of them from the start
            each.kept.forget(each.work.numbers)
    return {each.reader.index_path: each.found for each in work}


def _begin(path: Path, datasets: Sequence[IndexedSamples], on_exit: ExitStack) -> _Verification:
    of_index = [each for each in datasets if each.reader.index_path == path]
    kept = on_exit.enter_context(closing(VerifiedFile(Index(path).digest)))
    wanted = np.unique(np.concatenate([each.numbers for each in of_index]))
    earlier = kept.records()
    earlier = earlier[np.isin(earlier["number"], wanted, assume_unique=True)]
    stamps = np.full(len(wanted), UNKNOWN, np.uint64)
    stamps[np.searchsorted(wanted, earlier["number"])] = earlier["stamp"]
    return _Verification(of_index[0].reader, kept, earlier, Part(wanted, stamps), VerifiedIndex())


def _read(
    work: _Verification, make_task: Callable[[str, Any], Task], tell: Callable[[str], None], with_digests: bool
) -> Iterator[int]:
    """Read what is left, keep it, and yield the numbers of samples that are done."""
    found = work.found
    with closing(answers(work.work, work.reader, make_task, tell)) as verified:
        for each in verified:
            work.kept.add(each.whole)
            unchanged = work.earlier[np.searchsorted(work.earlier["number"], each.unchanged)]
            if with_digests:
                found.whole += [each.whole, unchanged]
            found.broken |= each.broken
            found.num_read += len(each)
            found.num_unstamped += int(np.count_nonzero(each.whole["stamp"] == UNKNOWN))
            if len(unchanged):
                found.num_resumed += len(unchanged)
                first = int(unchanged["read_at"].min())
                found.resumed_since = min(first, found.resumed_since or first)
            yield len(each)


def _interrupted(found: Sequence[VerifiedIndex], num_read: int, total: int) -> Interrupted:
    unstamped, broken = sum(each.num_unstamped for each in found), sum(len(each.broken) for each in found)
    again = [f"{unstamped:,} of these again, whose store tells neither versions nor times"] if unstamped else []
    again += [f"what is broken ({broken:,}) again"] if broken else []
    lost = "".join(f", and reads {each}" for each in again)
    interrupted = Interrupted(
        f"interrupted: {num_read:,} of {total:,} samples are verified; the same command goes on with the others{lost}"
    )
    interrupted.document = {"verified": {"read": num_read, "samples": total}}
    return interrupted
