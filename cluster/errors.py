"""The tree of all errors that a person can meet; each class has the exit code of the command line.

    LauncherError                1   something went wrong, and the message says what
    ├── TrainingError            1   the training code failed
    ├── DescriptionError         2   a description is wrong
    ├── CheckpointError          3   a checkpoint is missing, torn or does not fit
    ├── StorageError             4   the store cannot be read or written
    ├── ClusterError             5   Ray, a node or a worker failed
    ├── Interrupted            130   a signal ended the run, with everything saved
    └── Requeued                75   its batch job ends early, and its scheduler starts the same command again

A message is one line of the form ``where: what, got value; what to do``.

An error that is pickled arrives as its class of this tree, with its text and notes: a subclass elsewhere, its arguments
and what caused it may be unknown to the process that receives it.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

MAX_CHARACTERS = 2_000
"""Longest line of an error: the message of an exception of the user's may hold a whole array."""

Cause = Literal[
    "code",  # an exception of the training code
    "crash",  # the training process ended itself: a fault such as SIGSEGV, or an exit without an error report
    "out_of_memory",  # of the host: the kernel or Ray's memory monitor killed it, or an allocation failed
    "gpu_out_of_memory",
    "gpu_lost",  # its GPU or the driver failed, is used by another process, or is held by one that cannot be killed
    "killed",  # by a signal, with no sign that memory was short
    "hung",
    "node_lost",  # its node is gone or out of reach
    "fork_server_lost",  # its fork server died, so its own exit code is unknown
    "preempted",  # its node was drained, or taken away with notice
    "exchange_timeout",  # an exchange took too long, and no worker is known to be the cause
    "connection_lost",  # an exchange broke, and no worker is known to be gone
    "not_started",  # the agents did not start: Ray could not place or start them, or they were late
    "environment",  # its host lacks a module or file, or differs from others in versions, hardware, code or data
    "storage",
    "checkpoint",
]
"""Why a worker failed."""


class LauncherError(Exception):
    """The root of the tree. Only the command line catches it.

    Attributes:
        document: The facts about the failed run for ``--json``; None if there are none yet.
        traceback: The user's traceback, or the last lines that a process printed; shown once below the message.
        cause: Why a training process that raises this fails.
        step: The optimizer steps that it had completed; None: every worker would fail in the same way.
        place: The step and line of the failure, where another try may help; else empty.
        node: The address of the node on which a call raised it; None: it was raised here.
    """

    exit_code = 1
    document: dict[str, Any] | None = None
    cause: Cause = "code"
    node: str | None = None

    def __init__(
        self, message: str, traceback: str = "", *, cause: Cause | None = None, step: int | None = None, place: str = ""
    ) -> None:
        super().__init__(message)
        self.traceback = traceback
        self.cause = cause or self.cause
        self.step = step
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = class_in_tree(self), str(self), self.traceback, self.cause, self.step, self.place
        return _received, arguments, {"__notes__": list(getattr(self, "__notes__", ()))}


class TrainingError(LauncherError):
    """The model, the data or another part of the user's code failed."""

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
    cause: Cause = "connection_lost"


class Interrupted(LauncherError):  # noqa: N818  # nothing went wrong
    """A signal ended the run; everything is saved."""

    exit_code = 130


class Requeued(LauncherError):  # noqa: N818  # nothing went wrong
    """The batch job of this process has to end early; its scheduler starts the same command again, which goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits(3)."""


_TREE = (
    LauncherError, TrainingError, DescriptionError, CheckpointError, StorageError, ClusterError, Interrupted, Requeued,
)  # fmt: skip


def class_in_tree(error: LauncherError) -> type[LauncherError]:
    """Return the class of the tree above that an error belongs to; a class defined elsewhere counts as its base."""
    return next(kind for kind in type(error).__mro__ if kind in _TREE)


def _received(
    kind: type[LauncherError], message: str, traceback: str, cause: Cause, step: int | None, place: str
) -> LauncherError:
    return kind(message, traceback, cause=cause, step=step, place=place)


class FieldError(ValueError):
    """A field of a description has an invalid value.

    The reader of the description turns it into a ``DescriptionError``.

    Attributes:
        key: The key, relative to the section that raised this.
        problem: What is wrong, as a predicate of the key.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key
        self.problem = problem


def one_line(error: BaseException | str) -> str:
    """Return the message of an exception, or a part of it, without line breaks, at most ``MAX_CHARACTERS`` of it."""
    return " ".join(text_of(error).split())[:MAX_CHARACTERS]


def text_of(error: BaseException | str) -> str:
    """Return the message of an exception, which may be of the user's class, or a part of it, as text to store.

    Long lines are cut.
    """
    try:
        text = str(error)
    except Exception:  # the user's own __str__ failed
        text = "its text cannot be read"
    return storable("\n".join(line[:MAX_CHARACTERS] for line in text.split("\n")))


def storable(text: str) -> str:
    """Return a text that UTF-8 can hold: bytes of a file name that are no UTF-8 become escapes such as ``\\udcff``."""
    return text.encode(errors="backslashreplace").decode()


def in_short(error: BaseException) -> str:
    """Return at most 300 characters of ``one_line``; torch's texts about shapes can fill a screen."""
    return one_line(error)[:300]


def listed(names: Sequence[object], most: int = 8) -> str:
    """Return the first names, separated by commas, and the number of the others."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` with the known name closest to ``name``; empty if none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
