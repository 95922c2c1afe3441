"""No step waits for the GPU, but for those waits that are declared: torch's own watch says so.

It sees copies and what synchronises a stream or the device; it sees no wait for an event. There is one such wait in a
step, for the figures of the step before the last. ``tests/distributed/test_no_waits.py`` has the same jobs, and a watch
in place of a GPU.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.checkpoint.loop_state import LoopState
from jobs.components.build import build_parts
from jobs.components.losses import build_loss
from jobs.components.metrics import build_metrics
from jobs.components.targets import Builder
from jobs.data.device_copies import copied_ahead
from jobs.data.loader import validation_batches
from jobs.spec import LossSpec, Target
from jobs.training.evaluation import evaluate
from jobs.training.loop import Loop
from tests.distributed.small_job import Images, plain_job
from tests.distributed.test_no_waits import CASES, STEPS, WATCHED, WEIGHTS, Measured, job_of
from tests.gpu.workers import join, run_here

pytestmark = pytest.mark.gpu


@contextmanager
def noted_waits(device: torch.device) -> Iterator[list[str]]:
    """Notes where the CPU waits for the GPU, by CUDA's own account. On a CPU it notes nothing."""
    waits: list[str] = []

    def note(message: Warning | str, _: type[Warning], filename: str, line: int, *__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            waits.append(f"{filename}:{line}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        yield waits
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def waits_of_steps(link: AgentLink, task: Task) -> list[list[str]]:
    """Where each step of a job waits."""
    team, device = join(link, task)
    components, waits = build_parts(task.content, device), []
    with noted_waits(device) as noted:

        def end_step() -> None:
            waits.append(list(noted))
            noted.clear()

        Loop(
            task.content, components, LoopState(), team, metrics={}, log=lambda _: None, tell=lambda _: None,
            save=lambda *_, **__: None, stop_wanted=lambda: False, after_step=end_step,
        ).run()  # fmt: skip
    return waits


@pytest.mark.parametrize("name", CASES)
def test_what_a_step_waits_for(device: torch.device, on_gpu: bool, tmp_path: Path, name: str) -> None:
    case = CASES[name]

    waits = run_here(waits_of_steps, replace(job_of(case), store=str(tmp_path)), device).results[0]

    assert len(waits) == STEPS
    assert [len(waits[step]) for step in WATCHED] == [case.waits * on_gpu] * len(WATCHED), waits


def waits_of_validations(link: AgentLink, task: Task) -> dict[int, list[str]]:
    """Where a validation waits, by its number of batches."""
    team, device = join(link, task)
    waits = {}
    for num_batches in (3, 3, 6):  # the first one loads kernels
        model = build_parts(task.content, device).model
        loss = build_loss(LossSpec(factory=Target("CrossEntropyLoss", WEIGHTS)), Builder()).to(device)
        metrics = build_metrics({"measured": Target(f"{Measured.__module__}.Measured")}, Builder()).to(device)
        loaded = validation_batches(
            Images(2 * num_batches), batch_size=2, seed=0, rank=0, world_size=1, loaders=0, device=device,
            weigh=loss.target_weights(),
        )  # fmt: skip
        with noted_waits(device) as noted:
            evaluate(model, loss, metrics, copied_ahead(loaded, device), team, seed=0)
        waits[num_batches] = noted
    return waits


def test_a_validation_waits_at_its_end_alone(device: torch.device, on_gpu: bool, tmp_path: Path) -> None:
    """However many batches there are."""
    waits = run_here(waits_of_validations, plain_job(tmp_path, "run"), device).results[0]

    assert waits[3] == waits[6]
    assert bool(waits[3]) == on_gpu
