"""Errors on their way out of the process that loads: each keeps its type, its one line and its traceback.

torch would raise the class of an error anew, with a traceback as its text, and wait without end for one that cannot be
pickled. So the loader sends an error in place of a batch, and the training process raises it.
"""

import traceback
from dataclasses import dataclass

from torch.utils.data import get_worker_info

from cluster.errors import LauncherError, storable, text_of
from jobs.images.decoding import BadSample

_FROM_LOADER = "In a loader process:"
"""First line of the note with the traceback that an error brings from there."""
_PLAIN = (str, bytes, int, type(None))
"""Arguments of an exception that can be pickled without any code of the user's."""


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """Why there is no batch; it comes in place of one."""

    error: Exception


def failure_of(error: Exception) -> LoadFailure:
    """Returns the failure for an exception, in the process that has caught it."""
    if get_worker_info() is None:
        return LoadFailure(error)
    sent = _sendable(error)
    sent.add_note(f"{_FROM_LOADER}\n{storable(''.join(traceback.format_exception(error)))}")
    return LoadFailure(sent)


def is_from_loader(error: BaseException) -> bool:
    """Returns whether an exception comes from a loader process."""
    return any(note.startswith(_FROM_LOADER) for note in getattr(error, "__notes__", ()))


def _sendable(error: Exception) -> Exception:
    """Returns an exception that every process can unpickle: one of the launcher's or of Python's own, with its text."""
    if isinstance(error, LauncherError):
        return error  # arrives as its class of the tree
    if isinstance(error, BadSample):
        return BadSample(text_of(error.problem), error.url)
    if type(error).__module__ == "builtins":
        reduced = error.__reduce__()  # its args lack the name of a file
        assert isinstance(reduced, tuple), "an exception's are a class and arguments"
        if all(type(argument) in _PLAIN for argument in reduced[1]):
            copy: Exception = type(error)(*reduced[1])
            return copy
    return RuntimeError(f"{type(error).__name__}: {text_of(error)}")
