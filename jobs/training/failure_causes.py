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
from cluster.gpu_errors import GpuError, gpu_error
from jobs.data.loader_errors import is_from_loader
from jobs.training.deterministic import refusal, refused_operator

_MAX_LINES = 200
"""Most lines of a message below a traceback."""
_EXCHANGE_SIGNS = ("gloo/transport/", "caused pair closure", "NCCL error")
"""What gloo, whose errors have no type of their own, and NCCL report when another worker is gone or silent."""
_PINNING_SIGNS = ("pin_memory", "pin memory thread", "cudaHost", "HostAllocator")
"""In the text of an error, or in the line that raised it, if CUDA lacked page-locked memory of the host."""


def to_launcher_error(error: BaseException, step: int) -> LauncherError:
    """Returns the error that the driver receives for an exception.

    Args:
        error: What the training process raised.
        step: The optimizer steps it has completed.
    """
    if operator := refused_operator(error):  # every other try would meet it again
        return DescriptionError(refusal(operator), _user_traceback(error), step=step)
    broken = gpu_error_of(error)
    if broken is not None:
        return _of_gpu(error, broken, step)
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
    """Returns the message of an exception in one line, without torch's stack or that of its pinning thread."""
    text = re.sub(r".*gloo/transport/\S+\] |\. This is typically caused by.*| to Tensor$", "", text_of(error).strip())
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.rpartition("\n")[2].partition(": ")[2]
    return text.partition("\n")[0]


def gpu_error_of(error: BaseException) -> GpuError | None:
    """Returns the error of this process's GPU or of a kernel on it that an exception tells of; None: neither failed.

    After a kernel has failed, every call to CUDA fails. Libraries report that in words of their own, so CUDA is asked.
    """
    found = None if is_from_loader(error) else gpu_error(text_of(error))  # a loader process has no GPU of its own
    if found is None:
        return gpu_error(sticky_error())
    if found.cause == "gpu_out_of_memory" and not isinstance(error, torch.OutOfMemoryError) and _is_pinning(error):
        return GpuError(found.text, "out_of_memory")
    return found


def sticky_error() -> str:
    """Returns what CUDA answers to every call since a kernel failed; empty: it works, or this process does not use it.

    Unlike a synchronization, the question does not wait for kernels, which may themselves wait for other workers.
    """
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.current_stream().query()
    except RuntimeError as error:
        return text_of(error)
    return ""


def cause_of(error: BaseException) -> Cause:
    """Returns why an exception ends a training process, by its type and its message."""
    broken = gpu_error_of(error)
    if broken is not None:
        return broken.cause
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


def _of_gpu(error: BaseException, broken: GpuError, step: int) -> LauncherError:
    """Returns the error for the failure of a GPU; no line is part of its place, as CUDA reports failures late."""
    message = f"{type(error).__name__}: {message_of(error)}"
    if broken.text not in message:  # of a library that met what CUDA answers
        message += f" (CUDA error: {broken.text})"
    if broken.cause in ("gpu_lost", "environment"):
        return ClusterError(message, cause=broken.cause, step=step, place=broken.place(step))
    return TrainingError(message, _user_traceback(error), cause=broken.cause, step=step, place=broken.place(step))


def _is_pinning(error: BaseException) -> bool:
    """Returns whether CUDA failed to get page-locked memory, of which the host has none left, and not the GPU."""
    innermost = traceback.extract_tb(error.__traceback__)[-1:]
    said = [text_of(error), *(f"{frame.filename} {frame.line}" for frame in innermost)]
    return any(sign in each for sign in _PINNING_SIGNS for each in said)


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
