"""The processes that read samples for a command: each is given parts of the work, and answers them in order."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from cluster.capacity import num_cores
from cluster.errors import LauncherError, TrainingError
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.popen import LAST_WAIT_S
from jobs.images.indexing.index import Index
from launcher.inspecting.facts import IndexReader
from launcher.inspecting.parts import SAMPLES_AT_ONCE, Part, Verified, stretches

PROCESS = "launcher.inspecting.reading_process:main"
LATE_S = 60.0
"""A person is told of a part that has had no answer for so long."""
_AHEAD = 2
"""A process is given so many parts, so that it never waits for this one."""
_PROCESSES_PER_CORE = 2
"""While one waits for the store, another decodes."""
_MOST_PROCESSES = 64


@dataclass(slots=True)
class _Reader:
    """A process that reads."""

    process: fork_server.ChildProcess
    commands: Connection
    stretch: range
    """The positions of the samples that it is given next."""
    given: deque[Part] = field(default_factory=deque)
    """The parts that it has not answered yet."""
    began: float = 0.0
    """When it began with the first of them, by ``time.monotonic``."""
    is_late: bool = False
    """A person was told that it takes long."""


def answers(
    work: Part, reader: IndexReader, make_task: Callable[[str, Any], Task], tell: Callable[[str], None]
) -> Generator[Verified, None, None]:
    """Yield what becomes of each part of the samples, in the order in which processes finish them.

    Close the generator to end the processes early.

    Args:
        work: All samples, sorted.
        reader: How to read them.
        make_task: Returns the task of a process, from its entry and its content.
        tell: Called with a line about each part that takes long.

    Raises:
        StorageError: The store does not answer.
        TrainingError: A process died, or the function that reads failed.
    """
    num_parts = math.ceil(len(work.numbers) / SAMPLES_AT_ONCE)
    num_processes = min(_PROCESSES_PER_CORE * num_cores(), _MOST_PROCESSES, num_parts)
    index = Index(reader.index_path)
    left = stretches(index, work.numbers, num_processes)
    task, readers = make_task(PROCESS, reader), dict[Any, _Reader]()
    try:
        while len(readers) < num_processes and (stretch := next(left, None)) is not None:
            ours, theirs = Pipe()
            with theirs:
                process = fork_server.fork(_enter, (theirs, task), PROCESS)
            readers[ours] = _Reader(process, ours, stretch)
        for _ in range(_AHEAD):
            for each in readers.values():
                _give(each, work, left)
        while busy := [ours for ours, each in readers.items() if each.given]:
            for ready in wait(busy, LATE_S):
                answer = _received(readers[ready], index)
                _give(readers[ready], work, left)
                yield answer
            _tell_late(readers.values(), index, tell)
    finally:
        for each in readers.values():
            each.process.kill_within(LAST_WAIT_S)
            each.commands.close()


def _enter(commands: Connection, task: Task) -> None:
    fork_server.resolve(task.entry)(commands, task)


def _give(each: _Reader, work: Part, left: Iterator[range]) -> None:
    each.stretch = each.stretch or next(left, range(0))
    own, each.stretch = each.stretch[:SAMPLES_AT_ONCE], each.stretch[SAMPLES_AT_ONCE:]
    if not own:
        return
    if not each.given:
        each.began = time.monotonic()
    positions = slice(own.start, own.stop)
    each.given.append(Part(work.numbers[positions], work.stamps[positions]))
    with suppress(ConnectionError):  # it has died, which its missing answer says
        each.commands.send(each.given[-1])


def _received(each: _Reader, index: Index) -> Verified:
    """Return the next answer of a process.

    Raises:
        LauncherError: What it answered instead, or that it died.
    """
    try:
        answer: Verified | LauncherError = each.commands.recv()
    except (EOFError, ConnectionError) as error:
        each.process.join(LAST_WAIT_S)
        raise TrainingError(_death(each, index)) from error
    if isinstance(answer, LauncherError):
        raise answer
    part = each.given.popleft()
    assert len(answer) == len(part.numbers), "every sample is whole, unchanged or broken"
    each.began, each.is_late = time.monotonic(), False
    return answer


def _tell_late(readers: Iterable[_Reader], index: Index, tell: Callable[[str], None]) -> None:
    for each in readers:
        if each.given and not each.is_late and time.monotonic() - each.began >= LATE_S:
            each.is_late = True
            first, last = _ends(each, index)
            tell(
                f"{first}: no answer for {LATE_S:g} s from the process that reads it and the samples up to {last}; the "
                "store is slow, the images are large, or the decoder hangs on one"
            )


def _death(each: _Reader, index: Index) -> str:
    (first, last), code = _ends(each, index), each.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return (
        f"{first}: the process that read it and the samples up to {last} {how}; is there enough memory? else one of "
        "them crashes its decoder"
    )


def _ends(each: _Reader, index: Index) -> tuple[str, str]:
    """Return the URLs of the first and the last sample that a process reads."""
    numbers: np.ndarray = each.given[0].numbers
    return index.url_of(int(numbers[0])), index.url_of(int(numbers[-1]))
