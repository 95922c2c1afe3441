"""How a training process on a GPU fails, and what the driver makes of it: a real lack of memory, real assertions.

The process is forked as an agent forks it, and its reports go to the driver's failure policy. So it does not matter
whether Python or the watchdog of NCCL meets an error of the GPU first.
"""

import time
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.process import fork_server
from cluster.process.messages import Failed
from cluster.process.orders import Task
from cluster.process.training_process import TrainingProcess
from jobs.spec import DataSpec, JobSpec, MaxFailuresSpec, Target
from launcher.driver.failures import Failures
from launcher.driver.verdicts import Failure
from tests.distributed.small_job import Images, Net, plain_job
from tests.distributed.team_process import run_directory
from tests.gpu.workers import run_here, train

pytestmark = pytest.mark.gpu

LIMIT_S = 120.0
GOOD_STEPS = 2


class FailingNet(Net):
    """Works for two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, images_N188: Tensor) -> Tensor:
        self.num_calls += 1
        output_NK = super().forward(images_N188)
        return self.fail(output_NK) if self.num_calls > GOOD_STEPS else output_NK

    def fail(self, output_NK: Tensor) -> Tensor:
        raise NotImplementedError


class GreedyNet(FailingNet):
    """Then it wants more memory than any machine has."""

    def fail(self, output_NK: Tensor) -> Tensor:
        return output_NK + torch.empty(2**50, dtype=torch.uint8, device=output_NK.device)[0]


class WildNet(FailingNet):
    """Then it reads a row that there is not."""

    def fail(self, output_NK: Tensor) -> Tensor:
        return output_NK[torch.full((len(output_NK),), 10_000, device=output_NK.device)]


class MislabelledImages(Images):
    """The labels of the samples behind two steps are too large."""

    num_read = 0

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image_188, label = super().__getitem__(number)
        self.num_read += 1
        return image_188, label + 1000 * (self.num_read > GOOD_STEPS * 12)


def job_of(store: Path) -> JobSpec:
    return plain_job(store, "run", shards=1)


def with_model(job: JobSpec, model: type[FailingNet]) -> JobSpec:
    return replace(job, model=Target(f"{__name__}.{model.__name__}"))


def failure_of(job: JobSpec, on_gpu: bool) -> Failure:
    """Runs a worker to its end; returns the failure that the driver makes of what it said."""
    fork_server.start([__name__])
    task = Task(
        entry="jobs.training.worker:main", run_url=run_directory(job).url, import_paths=(), working_directory=".",
        on_gpu=on_gpu, content=job,
    )  # fmt: skip
    process, failures = TrainingProcess(task), Failures(MaxFailuresSpec())
    failures.attempt_started(1)
    deadline = time.monotonic() + LIMIT_S
    try:
        has_ended = False
        while not has_ended:
            assert time.monotonic() < deadline, process.log_tail()
            wait(process.sources(), timeout=1.0)
            has_ended = process.has_ended()
            for report in process.reports():
                if isinstance(report, Failed):
                    failures.failed(0, report)
        failures.exited(0, process.end())
        verdict = failures.verdict(time.monotonic())
    finally:
        assert process.kill(LIMIT_S), "it does not end"
        process.discard_files()
    assert verdict is not None
    return verdict.failure


def test_a_lack_of_memory(on_gpu: bool, tmp_path: Path) -> None:
    failure = failure_of(with_model(job_of(tmp_path), GreedyNet), on_gpu)

    assert (failure.cause, failure.step) == ("gpu_out_of_memory" if on_gpu else "out_of_memory", GOOD_STEPS)


@pytest.mark.parametrize("what", ["a label", "an index of the model"])
def test_a_failed_assertion_of_a_kernel_is_the_codes_failure(
    device: torch.device, on_gpu: bool, tmp_path: Path, what: str
) -> None:
    """It is no lost connection. A second one has the same place, which ends the run; the GPU works on after it."""
    job = job_of(tmp_path)
    if what == "a label":
        broken = replace(job, data=DataSpec(train=Target(f"{__name__}.MislabelledImages", {"length": 50})))
    else:
        broken = with_model(job, WildNet)

    first, second = (failure_of(broken, on_gpu) for _ in range(2))

    assert (first.cause, first.kind) == ("code", "code"), first
    # After the same step, or the next: the GPU fails later than the CPU enqueues.
    (step, what_failed), (again, what_failed_again) = (each.place.split(", ", 1) for each in (first, second))
    assert what_failed == what_failed_again
    if not on_gpu:
        assert step == again
    if on_gpu:
        assert "device-side assert triggered" in first.message
    run_here(train, job, device)
