"""Every error a person can meet, as one tree; each class carries the exit code of the command line.

    LauncherError                1   something went wrong, and the message says what
    ├── TrainingError            1   the training code failed
    ├── DescriptionError         2   what is written in a description is wrong
    ├── CheckpointError          3   a checkpoint is missing, torn or does not fit
    ├── StorageError             4   the store cannot be read or written
    ├── ClusterError             5   Ray, a node or a worker failed
    └── Interrupted            130   a signal ended the run, with everything saved

A message is one line of the form ``where: what, got value; what to do``.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Cause = Literal[
    "code",  # an exception of the training code
    "crash",  # the training process ended itself: a fault such as SIGSEGV, or an exit without a word
    "out_of_memory",  # the host's: the kernel or Ray's memory monitor killed it, or an allocation was refused
    "gpu_out_of_memory",
    "killed",  # by a signal, and nothing says that memory was short
    "hung",
    "node_lost",  # its node is gone, or out of reach
    "fork_server_lost",  # the server that it was forked from has died, and nobody can tell how it ended itself
    "preempted",  # its node was drained, or taken away with notice
    "exchange_timeout",  # an exchange took too long, and no worker is to blame
    "connection_lost",  # an exchange broke, and no worker is known to be gone
    "not_started",  # the agents did not come up: Ray could not place or start them, or they were late
    "environment",  # its host lacks a module or a file, or has other versions, hardware, code or data than the others
    "storage",
    "checkpoint",
]
"""Why a worker failed."""


class LauncherError(Exception):
    """The root of the tree: caught once, by the command line.

    Attributes:
        document: What is known of the run that failed, for ``--json``, if it got as far as that.
        traceback: The text of the user's traceback, or the last that a process printed; shown once below the message.
        cause: Why a training process that raises this fails.
        step: The optimizer steps it had completed, if the failure is its own and not the same on every worker.
        place: At which step and line it was raised, where trying again may help.
    """

    exit_code = 1
    document: dict[str, Any] | None = None
    cause: Cause = "code"

    def __init__(
        self, message: str, traceback: str = "", *, cause: Cause | None = None, step: int | None = None, place: str = ""
    ) -> None:
        super().__init__(message)
        self.traceback = traceback
        self.cause = cause or self.cause
        self.step = step
        self.place = place


class TrainingError(LauncherError):
    """The model, the data or another part of the user's own code failed."""

    exit_code = 1


class DescriptionError(LauncherError):
    """The description of a job or of a cluster cannot run as written."""

    exit_code = 2


class CheckpointError(LauncherError):
    """No checkpoint could be used, or one does not fit the model."""

    exit_code = 3
    cause = "checkpoint"


class StorageError(LauncherError):
    """The store refused or failed an operation."""

    exit_code = 4
    cause = "storage"


class ClusterError(LauncherError):
    """The cluster could not start, hold or finish the workers."""

    exit_code = 5
    cause = "connection_lost"


class Interrupted(LauncherError):  # noqa: N818  # not an error of anyone
    """A signal ended the run; what was trained is saved."""

    exit_code = 130


class FieldError(ValueError):
    """A field of a description holds a value that makes no sense; ``key`` is relative to the section that raised it.

    Who reads the description makes a ``DescriptionError`` of it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key
        self.problem = problem


def one_line(error: BaseException) -> str:
    """What an exception says, without its line breaks."""
    return " ".join(str(error).split())


def listed(names: Sequence[object], most: int = 8) -> str:
    """The first of many names in a line, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
