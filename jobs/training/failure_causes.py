"""The cause of a failure: from an exception in a training process to the error that it reports to the driver.

The user's code, torch and broken collectives raise in the same place. Their exceptions are told apart by type and,
where torch has no type of its own, by the message.
"""

import errno
import os
import re
import traceback

import torch
import torch.distributed as dist

import jobs
from cluster.errors import (
    MAX_CHARACTERS,
    Cause,
    ClusterError,
    DescriptionError,
    LauncherError,
    TrainingError,
    storable,
    text_of,
)
from jobs.training.deterministic import refusal, refused_operator

_MAX_LINES = 200
"""Most lines of a message below a traceback."""
_EXCHANGE_SIGNS = ("gloo/transport/", "caused pair closure", "NCCL error")
"""What gloo, whose errors have no type of their own, and NCCL report when another worker is gone or silent."""


def to_launcher_error(error: BaseException, step: int) -> LauncherError:
    """Returns the error that the driver receives for an exception.

    Args:
        error: What the training process raised.
        step: The optimizer steps it has completed.
    """
    if operator := refused_operator(error):  # every other try would meet it again
        return DescriptionError(refusal(operator), _user_traceback(error), step=step)
    cause = cause_of(error)
    if cause in ("exchange_timeout", "connection_lost"):
        return ClusterError(f"lost the others: {message_of(error)}", cause=cause, step=step)
    message = f"{type(error).__name__}: {message_of(error)}".removesuffix(": ")
    if cause == "environment":
        return ClusterError(message, cause=cause, step=step)
    # Lack of memory shows at any line of a step, so its place is the step alone.
    place = f"step {step}, {_line(error) if cause == 'code' else cause}"
    return TrainingError(message, _user_traceback(error), cause=cause, step=step, place=place)


def cause_of_broken_exchange(error: BaseException) -> Cause:
    """Returns whether an exchange between workers timed out or broke for another reason."""
    timed_out = isinstance(error, TimeoutError) or re.search("time(d )?out", text_of(error), re.IGNORECASE)
    return "exchange_timeout" if timed_out else "connection_lost"


def message_of(error: BaseException) -> str:
    """Returns the message of an exception in one line, without torch's stack or that of a loader process."""
    text = re.sub(r".*gloo/transport/\S+\] |\. This is typically caused by.*| to Tensor$", "", text_of(error).strip())
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.rpartition("\n")[2].partition(": ")[2]
    return text.partition("\n")[0]


def cause_of(error: BaseException) -> Cause:
    """Returns why an exception ends a training process, by its type and its message."""
    text = text_of(error)
    if isinstance(error, torch.OutOfMemoryError) or ("CUDA" in text and "out of memory" in text):
        return "gpu_out_of_memory"
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if is_refused or isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:
        return "out_of_memory"
    if isinstance(error, ImportError):
        return "environment"
    if isinstance(error, RuntimeError):
        if isinstance(error, dist.DistError) or any(sign in text for sign in _EXCHANGE_SIGNS):
            return cause_of_broken_exchange(error)
        if text.startswith("DataLoader worker") and "exited unexpectedly" in text:
            return "crash"
    return "code"


def _user_traceback(error: BaseException) -> str:
    """Returns the text of the traceback without the frames of ``jobs`` at its top; cuts long lines, and many."""
    own = os.path.join(os.path.dirname(os.path.abspath(jobs.__file__)), "")
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[0].filename.startswith(own):
        frames.pop(0)
    said = storable("".join(traceback.format_exception_only(error))).splitlines(keepends=True)[:_MAX_LINES]
    cut = [line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]}...\n" for line in said]
    return "".join(["Traceback (most recent call last):\n", *traceback.format_list(frames), *cut])


def _line(error: BaseException) -> str:
    """Returns where an exception was raised. The driver tries again once: a file may be unreadable for a moment."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{innermost.filename}:{innermost.lineno}, {type(error).__name__}"
