"""Failures of training processes that ended without a report, or do not end at all."""

import re
import signal
from functools import partial

from cluster.errors import ClusterError, TrainingError
from cluster.gpu_errors import GpuError, failed_assertion, gpu_error
from cluster.process.messages import Exited, Unkillable
from launcher.driver.verdicts import Failure

_FAULTS = tuple(-number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL))
"""Exit codes of processes that crashed by a fault of their own."""

NCCL = "ProcessGroupNCCL"
"""In the log of a process that NCCL aborted, because another worker is gone or silent or a GPU has failed."""
_WATCHDOG = re.compile("watchdog (?:thread terminated|caught)", re.IGNORECASE)


def of_exit(rank: int, exited: Exited) -> Failure:
    """Return the failure of a process that ended without a report."""
    code = exited.exit_code
    failed = partial(Failure, rank=rank, step=exited.step, log_tail=exited.log_tail)
    if code is None:
        return failed(cause="fork_server_lost", message="its fork server died")
    if code >= 0:
        what = f"ended with exit code {code}" if code else "ended before its work was done, with exit code 0"
        return failed(cause="crash", message=what, kind=None, error=TrainingError)
    name = signal.Signals(-code).name
    broken = gpu_error_of_abort(exited)
    if broken is not None:  # the watchdog of NCCL, or a destructor, met it before Python did
        is_lost, place = broken.cause == "gpu_lost", broken.place(exited.step)
        return failed(
            cause=broken.cause,
            message=with_assertion(f"aborted by the error of its GPU: CUDA error: {broken.text}", exited.log_tail),
            kind="machine" if is_lost else "code" if place else None,
            error=TrainingError if place and not is_lost else ClusterError,
            place=place,
            advice=broken.advice,
        )
    if code in _FAULTS:
        line = innermost(exited.log_tail.partition("Fatal Python error")[2])
        what, place = f"crashed with {name}" + (f", {line}" if line else ""), f"step {exited.step}, {line}, {name}"
        return failed(cause="crash", message=what, kind="code", error=TrainingError, place=place)
    if code == -signal.SIGKILL and exited.oom_kill:
        return failed(cause="out_of_memory", message=f"killed by the kernel for want of memory ({name})")
    return failed(cause="killed", message=f"killed by {name}")


def gpu_error_of_abort(exited: Exited) -> GpuError | None:
    """Return the error of its GPU that has aborted a process; None: the process was not aborted, or by something else.

    What the log has before NCCL's watchdog speaks may be errors that the code has survived.
    """
    if exited.exit_code != -signal.SIGABRT:
        return None
    spoke = _WATCHDOG.search(exited.log_tail)
    return gpu_error(exited.log_tail[spoke.start() if spoke else 0 :])


def of_unkillable(rank: int, report: Unkillable) -> Failure:
    """Return the failure of a worker whose former process does not end."""
    state = f", {' '.join(report.state.split())}" if report.state else ""
    what = f"its former process {report.pid} has not ended {report.for_s:.0f} s after SIGKILL{state}"
    failed = partial(Failure, rank=rank, is_unkillable=True)
    if report.on_gpu:
        return failed(cause="gpu_lost", message=f"{what}: it holds its GPU, whose driver may hang")
    return failed(cause="hung", message=f"{what}: a driver or a file system may hang")


def with_assertion(message: str, log: str) -> str:
    """Return the message about a GPU's error with the assertion that a kernel printed, if there is one."""
    assertion = failed_assertion(log)
    return f"{message} ({assertion})" if assertion else message


def innermost(stack: str) -> str:
    """Return the innermost call of a stack printed by ``faulthandler``, or the process state, or an empty text."""
    lines = [" ".join(line.split()) for line in stack.splitlines()]  # Linux puts a tab behind "State:"
    return next((line for line in lines if line.startswith(("File ", "State"))), "")
