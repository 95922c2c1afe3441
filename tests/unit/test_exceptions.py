"""What the exceptions of a training process come to: as real as they can be had in one process."""

import errno
import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster.errors import ClusterError, DescriptionError, LauncherError, TrainingError
from jobs.training.failure_causes import to_launcher_error

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:27538"
GLOO_IN_BACKWARD = f"Unable to cast {GLOO}. This is typically caused by a remote worker crashing. Check the logs"
GLOO_LATE = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv"
OF_LOADER = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> None:
        raise error

    return call


def error_of(call: Callable[[], Any], step: int = 4) -> LauncherError:
    try:
        call()
    except BaseException as error:
        return to_launcher_error(error, step)
    raise AssertionError("it raises nothing")


@pytest.mark.parametrize(
    ("call", "cause", "text"),
    [
        (lambda: torch.empty(2**60), "out_of_memory", "RuntimeError: [enforce fail at alloc_cpu.cpp"),
        (lambda: bytearray(2**60), "out_of_memory", "MemoryError"),
        (lambda: np.empty(2**57), "out_of_memory", "MemoryError: Unable to allocate"),
        (raising(OSError(errno.ENOMEM, "Cannot allocate memory")), "out_of_memory", "OSError: [Errno 12]"),
        (raising(torch.OutOfMemoryError("CUDA out of memory. DryRunResult to allocate 2.00 GiB")), "gpu_out_of_memory",
         "OutOfMemoryError: CUDA out of memory."),
        (raising(RuntimeError("CUDA error: out of memory")), "gpu_out_of_memory", "RuntimeError: CUDA error"),
        (lambda: importlib.import_module("no_such_module"), "environment", "ModuleNotFoundError: No module named"),
        (lambda: dist.HashStore().wait(["x"], timedelta(milliseconds=1)), "exchange_timeout", "lost the others: "),
        (raising(RuntimeError(GLOO_LATE)), "exchange_timeout", "lost the others: Timed out waiting 3000ms for recv"),
        (raising(RuntimeError("Application timeout caused pair closure")), "exchange_timeout", "lost the others: App"),
        (raising(RuntimeError(GLOO)), "connection_lost", "lost the others: Connection closed by peer [127"),
        (raising(RuntimeError(GLOO_IN_BACKWARD)), "connection_lost", "lost the others: Connection closed by"),
        (raising(RuntimeError("DataLoader worker (pid(s) 8) exited unexpectedly")), "crash", "RuntimeError: Data"),
        (raising(ConnectionResetError("Connection reset by peer")), "code", "ConnectionResetError: Connection reset"),
        (raising(TimeoutError("the data server")), "code", "TimeoutError: the data server"),
        (raising(OSError(OF_LOADER + "OSError: disk on fire\n")), "code", "OSError: disk on fire"),
        (raising(SystemExit(3)), "code", "SystemExit: 3"),
        (raising(ValueError("first\nsecond")), "code", "ValueError: first"),
    ],
)  # fmt: skip
def test_causes(call: Callable[[], Any], cause: str, text: str) -> None:
    error = error_of(call)

    assert error.cause == cause
    assert str(error).startswith(text)
    assert "\n" not in str(error)
    assert "third_party" not in str(error)
    assert error.step == 4
    blames_the_code = cause in ("code", "crash", "out_of_memory", "gpu_out_of_memory")
    assert isinstance(error, TrainingError if blames_the_code else ClusterError)
    assert bool(error.place) == blames_the_code


def test_an_operator_without_a_deterministic_implementation_is_not_tried_again() -> None:
    refused = (
        "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, or"
    )
    error = error_of(raising(RuntimeError(refused)))

    assert isinstance(error, DescriptionError)
    assert str(error).startswith("train.deterministic: torch has no deterministic implementation of adaptive_avg_pool2")
    assert (error.cause, error.step, error.place) == ("code", 4, "")  # with a place, the driver would try again
    assert "test_exceptions.py" in error.traceback


def test_a_place_is_a_step_and_a_line_and_for_want_of_memory_a_step() -> None:
    bad, elsewhere = raising(ValueError("bad")), lambda: int("bad")
    same, later, other = error_of(bad).place, error_of(bad, step=5).place, error_of(elsewhere).place
    assert error_of(bad).place == same
    assert len({same, later, other}) == 3

    refused = [error_of(lambda: bytearray(2**60)), error_of(lambda: np.empty(2**57))]
    assert [error.place for error in refused] == ["step 4, out_of_memory"] * 2
