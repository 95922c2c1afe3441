"""The processes that read samples for a command: each is given parts of the work, and answers them in order."""

import math
import signal
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.capacity import num_cores
from cluster.errors import LauncherError, TrainingError
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.popen import LAST_WAIT_S
from jobs.images.index import Index
from launcher.inspecting.facts import IndexReader

if TYPE_CHECKING:
    from launcher.inspecting.reading_process import Verified  # it imports torch, and this process must not

PROCESS = "launcher.inspecting.reading_process:main"
SAMPLES_AT_ONCE = 64
"""Samples that a process reads, neighbours in the index, before it answers."""
_MOST_IN_STRETCH = 16 * SAMPLES_AT_ONCE
"""Neighbours that one process reads, part by part: a row group of Parquet is read by one or two of them, not by all."""
_STRETCHES_PER_PROCESS = 4
"""At least, so that they end at about the same time."""
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
    given: deque[np.ndarray]
    """The parts that it has not answered yet."""
    stretch: np.ndarray
    """What it is given next."""


def answers(
    numbers: np.ndarray, reader: IndexReader, make_task: Callable[[str, Any], Task]
) -> "Generator[Verified, None, None]":
    """Yield what becomes of each part of the samples, in the order in which processes finish them.

    Close the generator to end the processes early.

    Args:
        numbers: Of the samples in the index.
        reader: How to read them.
        make_task: Returns the task of a process, from its entry and its content.

    Shapes: numbers int64 [samples].

    Raises:
        StorageError: The store does not answer.
        TrainingError: A process died, or the function that reads failed.
    """
    num_parts = math.ceil(len(numbers) / SAMPLES_AT_ONCE)
    num_processes = min(_PROCESSES_PER_CORE * num_cores(), _MOST_PROCESSES, num_parts)
    left = stretches(numbers, num_processes)
    task, readers = make_task(PROCESS, reader), dict[Any, _Reader]()
    try:
        for _ in range(num_processes):
            ours, theirs = Pipe()
            with theirs:
                process = fork_server.fork(_enter, (theirs, task), PROCESS)
            readers[ours] = _Reader(process, ours, deque(), numbers[:0])
        for _ in range(_AHEAD):
            for each in readers.values():
                _give(each, left)
        while busy := [ours for ours, each in readers.items() if each.given]:
            for ready in wait(busy):
                answer = _received(readers[ready], reader)
                _give(readers[ready], left)
                yield answer
    finally:
        for each in readers.values():
            each.process.kill_within(LAST_WAIT_S)
            each.commands.close()


def _enter(commands: Connection, task: Task) -> None:
    fork_server.resolve(task.entry)(commands, task)


def stretches(numbers: np.ndarray, num_processes: int) -> deque[np.ndarray]:
    """Return the numbers cut into stretches of whole parts. Shapes: int64 [samples] -> int64 [any] each."""
    even = len(numbers) / max(1, num_processes * _STRETCHES_PER_PROCESS)
    length = min(max(1, math.ceil(even / SAMPLES_AT_ONCE)) * SAMPLES_AT_ONCE, _MOST_IN_STRETCH)
    return deque(numbers[begin : begin + length] for begin in range(0, len(numbers), length))


def _give(each: _Reader, left: deque[np.ndarray]) -> None:
    if not len(each.stretch) and left:
        each.stretch = left.popleft()
    if len(each.stretch):
        each.given.append(each.stretch[:SAMPLES_AT_ONCE])
        each.stretch = each.stretch[SAMPLES_AT_ONCE:]
        with suppress(ConnectionError):  # it has died, which its missing answer says
            each.commands.send(each.given[-1])


def _received(each: _Reader, reader: IndexReader) -> "Verified":
    """Return the next answer of a process.

    Raises:
        LauncherError: What it answered instead, or that it died.
    """
    try:
        answer: Verified | LauncherError = each.commands.recv()
    except (EOFError, ConnectionError) as error:
        each.process.join(LAST_WAIT_S)
        raise TrainingError(_death(each, reader)) from error
    if isinstance(answer, LauncherError):
        raise answer
    each.given.popleft()
    return answer


def _death(each: _Reader, reader: IndexReader) -> str:
    index, part, code = Index(reader.index_path), each.given[0], each.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return (
        f"{index.url_of(int(part[0]))}: the process that read it and the samples up to {index.url_of(int(part[-1]))} "
        f"{how}; is there enough memory? else one of them crashes its decoder"
    )
