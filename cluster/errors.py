"""Every error a person can meet, as one tree; each class carries the exit code of the command line.

    LauncherError                1   something went wrong, and the message says what
    ├── TrainingError            1   the training code failed
    ├── DescriptionError         2   what is written in the job description is wrong
    ├── CheckpointError          3   a checkpoint is missing, torn or does not fit
    ├── StorageError             4   the store cannot be read or written
    ├── ClusterError             5   Ray, a node or a worker failed
    └── Interrupted            130   a signal ended the run, with everything saved

A message is one line of the form ``where: what, got value; what to do``.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class LauncherError(Exception):
    """The root of the tree: caught once, by the command line.

    ``document`` is what is known of the run that failed, for ``--json``, if it got as far as that.
    """

    exit_code = 1
    document: dict[str, Any] | None = None


class TrainingError(LauncherError):
    """The model, the data or another part of the user's own code raised.

    ``traceback`` is the text of the user's traceback, shown once below the message; ``place`` says at which step and
    line it was raised, where trying again may help.
    """

    exit_code = 1

    def __init__(self, message: str, traceback: str = "", place: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback
        self.place = place


class DescriptionError(LauncherError):
    """The job description cannot run as written."""

    exit_code = 2


class CheckpointError(LauncherError):
    """No checkpoint could be used, or one does not fit the model."""

    exit_code = 3


class StorageError(LauncherError):
    """The store refused or failed an operation."""

    exit_code = 4


class ClusterError(LauncherError):
    """The cluster could not start, hold or finish the workers."""

    exit_code = 5


class Interrupted(LauncherError):  # noqa: N818  # not an error of anyone
    """A signal ended the run; what was trained is saved."""

    exit_code = 130


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
