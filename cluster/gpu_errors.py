"""What CUDA, its libraries and NCCL print when a GPU fails, and the cause of failure that follows from it.

Training processes ask about their exceptions, the driver about the logs of processes that were aborted; so this module
imports neither torch nor CUDA.
"""

import re
from dataclasses import dataclass

from cluster.errors import Cause

_CAUSES: dict[str, Cause] = {
    "device-side assert triggered": "code",
    "an illegal memory access was encountered": "code",
    "an illegal instruction was encountered": "code",
    "misaligned address": "code",
    "operation not supported on global/shared address space": "code",
    "invalid program counter": "code",
    "out of memory": "gpu_out_of_memory",
    "uncorrectable ECC error encountered": "gpu_lost",
    "uncorrectable NVLink error detected during the execution": "gpu_lost",
    "Invalid access of peer GPU memory over nvlink or a hardware error": "gpu_lost",
    "hardware stack error": "gpu_lost",
    "unspecified launch failure": "gpu_lost",
    "the launch timed out and was terminated": "gpu_lost",
    "CUDA-capable device(s) is/are busy or unavailable": "gpu_lost",
    "exclusive-thread device already in use by a different thread": "gpu_lost",
    "no CUDA-capable device is detected": "gpu_lost",
    "invalid device ordinal": "gpu_lost",
    "invalid device context": "gpu_lost",
    "context is destroyed": "gpu_lost",
    "startup failure in cuda runtime": "gpu_lost",
    "system not yet initialized": "gpu_lost",  # its fabric manager does not run
    "GPU has fallen off the bus": "gpu_lost",
    "GPU is lost": "gpu_lost",
    "MPS client failed to connect to the MPS control daemon or the MPS server": "gpu_lost",
    "MPS server is not ready to accept new MPS client requests": "gpu_lost",
    "the MPS client has been terminated by the server": "gpu_lost",
    "unknown error": "gpu_lost",
    "CUDA driver version is insufficient for CUDA runtime version": "environment",
    "API call is not supported in the installed CUDA driver": "environment",
    "CUDA driver is a stub library": "environment",
    "no kernel image is available for execution on the device": "environment",
    "the provided PTX was compiled with an unsupported toolchain": "environment",
    "system has unsupported display driver / cuda driver combination": "environment",
    "forward compatibility was attempted on non supported HW": "environment",
}
"""The cause by error text of CUDA 13 (``cudaGetErrorString``). Texts that are not here leave the cause to others.

An illegal access counts as the code's: it is mostly a wrong kernel or index. A faulty GPU, which can cause it too,
fails at another step the next time. For the launch failures it is the other way round, see ``_OF_CODE_TOO``.
"""
_OF_CODE_TOO = ("unspecified launch failure", "the launch timed out and was terminated")
"""Texts of lost GPUs that a wrong kernel causes too: on another GPU it does so again at the same step."""
_ASSERT = "device-side assert triggered"
_SAID = re.compile(
    r"CUDA(?: driver)? error: (.+)|Cuda failure (?:\d+ )?'([^'\n]+)'|CUDA (out of memory)"
    r"|cudaGetDeviceCount\(\).* Error \d+: (.+)|(GPU has fallen off the bus|GPU is lost)"
)
"""How torch, its allocator, NCCL and NVML introduce an error text."""
_NO_MEMORY = re.compile(r"\bCU[A-Z]+_(?:[A-Z]+_)*ALLOC(?:ATION)?_FAILED\b|\bCUDA_ERROR_OUT_OF_MEMORY\b")
"""Statuses of cuBLAS, cuDNN, cuFFT, cuSOLVER, cuSPARSE, cuRAND and the driver for a lack of memory."""
_OF_HOST = "_HOST_ALLOCATION_FAILED"
_ASSERTION = re.compile(r"([\w.-]+:\d+): .*(Assertion `.*` failed)")
"""What a kernel prints for each thread in which its assertion fails, with file and line of the kernel."""
SIGNS = ("CUDA error: ", "Assertion `")
"""Parts of lines in a log that say more about the failure of a GPU than the last lines do."""


@dataclass(frozen=True, slots=True)
class GpuError:
    """An error of a GPU, or of a kernel on it."""

    text: str
    """The error in CUDA's words."""
    cause: Cause
    """The cause of failure: ``code``, ``gpu_lost``, ``environment``, or one for a lack of memory."""

    def place(self, step: int) -> str:
        """Return what identifies the failure after ``step`` steps, so that a second one ends the run; empty: nothing.

        CUDA reports the failure of a kernel at a later call, so no line of Python is part of it.
        """
        if self.cause == "environment" or (self.cause == "gpu_lost" and self.text not in _OF_CODE_TOO):
            return ""
        return f"step {step}, {self.text if self.cause in ('code', 'gpu_lost') else self.cause}"

    @property
    def advice(self) -> str:
        """What the user can do about an error of the code; empty: what one does about the cause."""
        if self.text == _ASSERT:
            return (
                "the usual reason is a label that is not below the number of classes, or another index that is too "
                "large; CUDA reports it late, so any line of Python named here may be innocent: on the CPU "
                "(workers.gpus=0) the error names the line and the index"
            )
        if self.cause == "code":
            return (
                "a kernel of the model or of an extension is wrong, or the GPU is; CUDA reports it late, so any line "
                "of Python named here may be innocent: CUDA_LAUNCH_BLOCKING=1 in the workers' environment finds it"
            )
        return ""


def gpu_error(text: str) -> GpuError | None:
    """Return the first GPU error in the text of an exception or in a log; None: there is none with a known cause."""
    for found in _SAID.finditer(text):
        said = next(filter(None, found.groups()))
        for known, cause in _CAUSES.items():
            if said.startswith(known):
                return GpuError(known, cause)
    status = _NO_MEMORY.search(text)
    if status is None:
        return None
    return GpuError(status[0], "out_of_memory" if _OF_HOST in status[0] else "gpu_out_of_memory")


def failed_assertion(log: str) -> str:
    """Return the assertion of a kernel that failed by a log, and its place in CUDA code; empty: the log has none."""
    found = _ASSERTION.search(log)
    return f"{found[2]}, {found[1]}" if found else ""
