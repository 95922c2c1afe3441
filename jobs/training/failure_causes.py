"""Why a training process fails: from an exception to the error that the driver is told, with its cause.

Every worker has the exceptions of the user's code, of torch and of broken exchanges in one place; here they are told
apart, by their types and, where torch has no type, by what it says.
"""

import errno
import os
import re
import traceback

import torch
import torch.distributed as dist

import jobs
from cluster.errors import Cause, ClusterError, LauncherError, TrainingError

_EXCHANGE_SIGNS = ("gloo/transport/", "caused pair closure", "NCCL error")
"""What gloo, whose errors have no type of their own, and NCCL say when another worker is gone or silent."""


def named(error: BaseException, step: int) -> LauncherError:
    """What an exception of a training process comes to; ``step``: the optimizer steps it has completed."""
    cause = cause_of(error)
    if cause in ("exchange_timeout", "connection_lost"):
        return ClusterError(f"lost the others: {what(error)}", cause=cause, step=step)
    message = f"{type(error).__name__}: {what(error)}".removesuffix(": ")
    if cause == "environment":
        return ClusterError(message, cause=cause, step=step)
    # An allocation may be refused at any line of the same step.
    place = f"step {step}, {_line(error) if cause == 'code' else cause}"
    return TrainingError(message, _user_traceback(error), cause=cause, step=step, place=place)


def broken_exchange(error: BaseException) -> Cause:
    """Whether an exchange between workers took too long, or ended for another reason."""
    timed_out = isinstance(error, TimeoutError) or re.search("time(d )?out", str(error), re.IGNORECASE)
    return "exchange_timeout" if timed_out else "connection_lost"


def what(error: BaseException) -> str:
    """What an exception says, in a line; a stack may follow, or come before it if a loader process raised it."""
    text = re.sub(r".*gloo/transport/\S+\] |\. This is typically caused by.*| to Tensor$", "", str(error).strip())
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.rpartition("\n")[2].partition(": ")[2]
    return text.partition("\n")[0]


def cause_of(error: BaseException) -> Cause:
    """Why an exception ends a training process, by its type and by what it says."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or ("CUDA" in text and "out of memory" in text):
        return "gpu_out_of_memory"
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if is_refused or isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:
        return "out_of_memory"
    if isinstance(error, ImportError):
        return "environment"
    if isinstance(error, RuntimeError):
        if isinstance(error, dist.DistError) or any(sign in text for sign in _EXCHANGE_SIGNS):
            return broken_exchange(error)
        if text.startswith("DataLoader worker") and "exited unexpectedly" in text:
            return "crash"
    return "code"


def _user_traceback(error: BaseException) -> str:
    """The traceback without the product's own frames at its top."""
    own = os.path.join(os.path.dirname(os.path.abspath(jobs.__file__)), "")
    frames = traceback.extract_tb(error.__traceback__)
    while frames and frames[0].filename.startswith(own):
        frames.pop(0)
    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    return "Traceback (most recent call last):\n" + "".join(lines)


def _line(error: BaseException) -> str:
    """Where an exception was raised: once may be bad luck, such as a file that could not be read."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{innermost.filename}:{innermost.lineno}, {type(error).__name__}"
