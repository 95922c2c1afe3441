"""What the exceptions of a training process come to: as real as they can be had in one process."""

import errno
import importlib
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster.errors import ClusterError, DescriptionError, LauncherError, StorageError, TrainingError
from cluster.storage.store import MissingObject
from jobs.components.build import unusable_gpu
from jobs.data.loader_errors import failure_of, is_from_loader
from jobs.images.decoding import BadSample
from jobs.training import failure_causes
from jobs.training.failure_causes import to_launcher_error

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:27538"
GLOO_IN_BACKWARD = f"Unable to cast {GLOO}. This is typically caused by a remote worker crashing. Check the logs"
GLOO_LATE = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv"
CUDA_ADVICE = (
    "\nSearch for `cudaErrorX' in https://docs.nvidia.com for more information.\nCUDA kernel errors might be "
    "asynchronously reported at some other API call, so the stacktrace below might be incorrect.\n"
)
NCCL_CUDA = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG="
    "INFO for details), NCCL version 2.30.7\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
NCCL_REMOTE = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, remote process exited or there was a "
    "network error, NCCL version 2.30.7\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer node1<40000>"
)
ASSERT = "CUDA error: device-side assert triggered"
ECC = "CUDA error: uncorrectable ECC error encountered"
OF_PINNING = (
    "Caught OSError in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
)


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> None:
        raise error

    return call


def of_loader(error: Exception) -> Exception:
    """The error as it comes out of a loader process."""
    with mock.patch("jobs.data.loader_errors.get_worker_info"):
        return pickle.loads(pickle.dumps(failure_of(error))).error  # noqa: S301  # of this test


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
        (raising(OSError(OF_PINNING + "OSError: disk on fire\n")), "code", "OSError: disk on fire"),
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


def cuda(text: str) -> torch.AcceleratorError:
    return torch.AcceleratorError(text + CUDA_ADVICE)


def pin() -> None:
    pin_memory = cuda("CUDA error: out of memory")
    raise pin_memory


@pytest.mark.parametrize(
    ("call", "cause", "place"),
    [
        (raising(cuda(ASSERT)), "code", "step 4, device-side assert triggered"),
        (raising(cuda("CUDA error: an illegal memory access was encountered")), "code",
         "step 4, an illegal memory access was encountered"),
        (raising(cuda("CUDA error: misaligned address")), "code", "step 4, misaligned address"),
        (raising(cuda("CUDA error: invalid configuration argument")), "code", None),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(`")), "code", None),
        (raising(cuda(ECC)), "gpu_lost", ""),
        (raising(cuda("CUDA error: CUDA-capable device(s) is/are busy or unavailable")), "gpu_lost", ""),
        (raising(cuda("CUDA error: unknown error")), "gpu_lost", ""),
        (raising(cuda("CUDA error: hardware stack error")), "gpu_lost", ""),
        (raising(cuda("CUDA error: unspecified launch failure")), "gpu_lost", "step 4, unspecified launch failure"),
        (raising(dist.DistBackendError(f"{NCCL_CUDA}Cuda failure 'uncorrectable ECC error encountered'")), "gpu_lost",
         ""),
        (raising(RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED: GPU is lost")), "gpu_lost", ""),
        (raising(cuda("CUDA error: no kernel image is available for execution on the device")), "environment", ""),
        (raising(dist.DistBackendError(NCCL_REMOTE)), "connection_lost", ""),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")),
         "gpu_out_of_memory", "step 4, gpu_out_of_memory"),
        (raising(cuda("CUDA error: out of memory")), "gpu_out_of_memory", "step 4, gpu_out_of_memory"),
        (raising(RuntimeError("CUDA driver error: out of memory")), "gpu_out_of_memory", "step 4, gpu_out_of_memory"),
        (raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
         "gpu_out_of_memory", "step 4, gpu_out_of_memory"),
        (raising(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")), "gpu_out_of_memory",
         "step 4, gpu_out_of_memory"),
        (raising(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")),
         "gpu_out_of_memory", "step 4, gpu_out_of_memory"),
        (raising(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED")), "out_of_memory",
         "step 4, out_of_memory"),
        (raising(RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`")),
         "gpu_out_of_memory", "step 4, gpu_out_of_memory"),
        (raising(RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED")), "gpu_out_of_memory", "step 4, gpu_out_of_memory"),
        (raising(dist.DistBackendError(f"{NCCL_CUDA}Cuda failure 2 'out of memory'")), "gpu_out_of_memory",
         "step 4, gpu_out_of_memory"),
        (raising(dist.DistBackendError(f"{NCCL_CUDA}Cuda failure 'out of memory'")), "gpu_out_of_memory",
         "step 4, gpu_out_of_memory"),
        (pin, "out_of_memory", "step 4, out_of_memory"),
        (raising(RuntimeError("Caught AcceleratorError in pin memory thread for device 0.\nOriginal Traceback (most "
                              "recent call last):\n  File ...\ntorch.AcceleratorError: CUDA error: out of memory\n")),
         "out_of_memory", "step 4, out_of_memory"),
        (raising(of_loader(RuntimeError("CUDA error: no CUDA-capable device is detected"))), "code", None),
    ],
)  # fmt: skip
def test_errors_of_gpus(call: Callable[[], Any], cause: str, place: str | None) -> None:
    """The texts of CUDA 13, torch 2.11 to 2.14 and NCCL; ``None``: a line of Python is the place."""
    error = error_of(call)

    assert error.cause == cause
    assert error.place.startswith("step 4, /") if place is None else error.place == place
    is_of_code = cause in ("code", "out_of_memory", "gpu_out_of_memory")
    assert isinstance(error, TrainingError if is_of_code else ClusterError)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "met",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        dist.DistBackendError(NCCL_REMOTE),
        ValueError("bad"),
    ],
    ids=["by cuBLAS", "by cuDNN", "by NCCL", "by the user's code"],
)
@pytest.mark.parametrize(("answer", "cause"), [(ASSERT, "code"), (ECC, "gpu_lost")])
def test_what_is_met_after_a_kernel_failed_follows_from_it(
    monkeypatch: pytest.MonkeyPatch, met: Exception, answer: str, cause: str
) -> None:
    monkeypatch.setattr(failure_causes, "sticky_error", lambda: answer + CUDA_ADVICE)
    error = error_of(raising(met))

    assert error.cause == cause
    assert str(error).endswith(f"({answer})")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
                      "driver by downloading and installing a new version"), "environment"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check that you have"), "environment"),
        (AssertionError("Torch not compiled with CUDA enabled"), "environment"),
        (cuda("CUDA error: CUDA driver version is insufficient for CUDA runtime version"), "environment"),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
                      "NumCudaDevices() that might have already set an error? Error 803: system has unsupported "
                      "display driver / cuda driver combination"), "environment"),
        (cuda("CUDA error: no kernel image is available for execution on the device"), "environment"),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
                      "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized"),
         "gpu_lost"),
        (RuntimeError("No CUDA GPUs are available"), "gpu_lost"),
        (RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"), "gpu_lost"),
        (cuda("CUDA error: initialization error"), "gpu_lost"),
        (cuda("CUDA error: device not ready"), "gpu_lost"),
        (cuda("CUDA error: no CUDA-capable device is detected"), "gpu_lost"),
        (cuda(ECC), "gpu_lost"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), "gpu_lost"),
    ],
)  # fmt: skip
def test_a_gpu_that_fails_before_anything_ran_on_it(error: Exception, cause: str) -> None:
    unusable = unusable_gpu(error)

    assert (unusable.cause, unusable.step, unusable.place) == (cause, 0, "")
    assert str(error).splitlines()[0] in str(unusable)
    assert "Search for" not in str(unusable)
    assert ("write workers.gpus=0" in str(unusable)) == (cause == "environment")


class OddError(ValueError):
    """Neither made from its message, nor found by another process."""

    def __init__(self, *, sample: int) -> None:
        super().__init__(f"sample {sample} is odd", open)


class WorseSample(BadSample):
    pass


class OddStoreError(StorageError):
    pass


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (MissingObject("s3://bucket/data: holds no a.jpg"), StorageError("s3://bucket/data: holds no a.jpg")),
        (BadSample("a.jpg: is gone"), BadSample("a.jpg: is gone")),
        (BadSample("is gone", "a.jpg"), BadSample("is gone", "a.jpg")),
        (WorseSample("a.jpg: is gone"), BadSample("a.jpg: is gone")),
        (OSError(errno.ENOENT, "No such file", "a.jpg"), FileNotFoundError(errno.ENOENT, "No such file", "a.jpg")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.ENOMEM, "Cannot allocate memory")),
        (KeyError("label"), KeyError("label")),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")),
        (KeyError(open), RuntimeError(f"KeyError: {open!r}")),
        (ExceptionGroup("two", [ValueError()]), RuntimeError("ExceptionGroup: two (1 sub-exception)")),
        (OddError(sample=3), RuntimeError(f"OddError: ('sample 3 is odd', {open!r})")),
    ],
)  # fmt: skip
def test_an_error_of_a_loader_process_arrives_with_its_type_and_text(raised: Exception, arrives: Exception) -> None:
    try:
        raise raised
    except Exception as error:
        arrived = of_loader(error)
    assert (type(arrived), str(arrived)) == (type(arrives), str(arrives))
    for name in ("errno", "url", "problem"):
        assert getattr(arrived, name, None) == getattr(raised, name, None)


def test_a_bad_sample_has_its_url_and_its_problem_apart() -> None:
    url, problem = "s3://b/evil  two\n/\udcff: x.jpg", "is gone;  restore it"
    for error in (BadSample(problem, url), pickle.loads(pickle.dumps(BadSample(problem, url)))):  # noqa: S301
        assert (error.url, error.problem, str(error)) == (url, problem, f"{url}: {problem}")
    plain = pickle.loads(pickle.dumps(WorseSample("a.jpg: is gone")))  # noqa: S301
    assert (type(plain), plain.url, plain.problem) == (WorseSample, "", "a.jpg: is gone")


@pytest.mark.parametrize("kind", [BadSample, StorageError, MissingObject, OddStoreError, KeyError])
def test_an_error_of_a_loader_process_says_that_it_is_one(kind: type[Exception]) -> None:
    """So its text is not searched for what a GPU says."""
    try:
        raise kind("CUDA error: no such kernel is available")
    except Exception as error:
        arrived = of_loader(error)
    assert is_from_loader(arrived)
    assert "raise kind(" in "".join(arrived.__notes__)
    assert failure_causes.gpu_error_of(arrived) is None


def test_an_error_of_a_loader_process_brings_its_traceback() -> None:
    try:
        int("bad")
    except ValueError as error:
        arrived = of_loader(error)
    told = error_of(raising(arrived))
    assert str(told) == "ValueError: invalid literal for int() with base 10: 'bad'"
    assert 'int("bad")' in told.traceback


def test_a_process_without_a_gpu_is_not_asked() -> None:
    assert failure_causes.sticky_error() == ""
