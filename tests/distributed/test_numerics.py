"""What decides a kernel's result is what the job says, whatever a host has set. Each in a process of its own."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.cuda.tunable

from cluster.process import fork_server
from jobs.components.build import numerics
from jobs.spec import JobSpec
from tests.distributed.small_job import full_job

HERE = __name__


@pytest.fixture(autouse=True)
def server() -> None:
    fork_server.start([HERE])


def set_numerics(spec: JobSpec, timed: bool) -> tuple[bool, bool]:
    """Whether torch and its compiler are deterministic, in a process that was set otherwise."""
    from torch._inductor import config as inductor

    inductor.deterministic = timed
    torch.use_deterministic_algorithms(timed)
    numerics(spec, torch.device("cpu"))
    return torch.are_deterministic_algorithms_enabled(), inductor.deterministic


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_the_compiler_is_deterministic_as_the_job_says(is_deterministic: bool, tmp_path: Path) -> None:
    job = full_job(tmp_path, "run")
    job = replace(job, train=replace(job.train, compile=True, deterministic=is_deterministic))

    found = fork_server.call(f"{HERE}:set_numerics", job, not is_deterministic)
    assert found == (is_deterministic, is_deterministic)


def set_numerics_of_a_gpu(spec: JobSpec) -> tuple[str | None, bool]:
    """The workspace of cuBLAS, and whether TunableOp chooses kernels by time."""
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "PYTORCH_TUNABLEOP_ENABLED": "1"}
    numerics(spec, torch.device("cuda"))
    return os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.cuda.tunable.is_enabled()


@pytest.mark.parametrize(("is_deterministic", "expected"), [(True, (":4096:8", False)), (False, (":16:8", True))])
def test_a_host_decides_no_kernel_of_a_deterministic_job(
    is_deterministic: bool, expected: tuple[str, bool], tmp_path: Path
) -> None:
    job = full_job(tmp_path, "run")
    job = replace(job, train=replace(job.train, deterministic=is_deterministic))

    assert fork_server.call(f"{HERE}:set_numerics_of_a_gpu", job) == expected
