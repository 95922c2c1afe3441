"""Every precision, layout and kind of optimizer trains on a GPU, and gives the same bits when it does so again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.components.build import build_parts, worker_device
from jobs.spec import CheckpointSpec, JobSpec, OptimizerSpec, Target
from tests.distributed.small_job import Net, full_job
from tests.distributed.team_process import newest_state
from tests.gpu.workers import run_here, saved_files, train

pytestmark = pytest.mark.gpu

FUSED_SGD = OptimizerSpec(factory=Target("SGD", {"lr": 0.05, "momentum": 0.9, "fused": True}))
FUSED_ADAMW = OptimizerSpec(factory=Target("AdamW", {"lr": 0.003, "fused": True}))


@dataclass(frozen=True)
class Case:
    """What differs from the full job, in which a group unfreezes."""

    train: Mapping[str, Any]
    optimizer: OptimizerSpec | None = None
    unfreezes: bool = True


CASES = {
    "fp16": Case({"precision": "fp16"}),
    "fp16, fused": Case({"precision": "fp16"}, FUSED_SGD),
    "bf16": Case({"precision": "bf16"}),
    "bf16, channels_last, fused": Case({"precision": "bf16", "channels_last": True}, FUSED_ADAMW),
    "channels_last": Case({"channels_last": True}),
    "tf32": Case({"tf32": True}),
    "fused SGD": Case({}, FUSED_SGD),
    "fused AdamW, not exact": Case({"exact": False, "shards": 2}, FUSED_ADAMW),
    "compiled": Case({"compile": True}, unfreezes=False),
    "compiled, bf16": Case({"compile": True, "precision": "bf16", "channels_last": True}, FUSED_SGD, unfreezes=False),
    "compiled, a group unfreezes": Case({"compile": True, "shards": 2}),
}
SLOW = {
    name: OptimizerSpec(factory=Target("SGD", {"lr": 1e-5, "fused": name == "fused"})) for name in ("for each", "fused")
}
LARGEST_SCALE = 65536.0
"""The scale that torch's gradient scaler begins with."""


class LoudNet(Net):
    """Outputs so large that a scaled gradient overflows in float16."""

    def forward(self, images_N188: Tensor) -> Tensor:
        return super().forward(images_N188) * 1000


def job_of(store: Path, name: str, case: Case) -> JobSpec:
    job = full_job(store, name, **case.train)
    groups = job.optimizer.groups if case.unfreezes else ()
    return replace(job, optimizer=replace(case.optimizer or job.optimizer, groups=groups))


@pytest.mark.parametrize("case", CASES)
def test_it_trains_and_again_with_equal_bits(device: torch.device, tmp_path: Path, case: str) -> None:
    first, second = (job_of(tmp_path, f"run-{number}", CASES[case]) for number in (1, 2))

    outcome, again = (run_here(train, job, device) for job in (first, second))

    assert outcome.rows == again.rows
    assert saved_files(first) == saved_files(second)
    losses = [row["val/loss"] for row in outcome.rows if "val/loss" in row]
    assert losses[-1] < losses[0]


def initial_weights(link: AgentLink, task: Task) -> dict[str, Tensor]:  # noqa: ARG001
    components = build_parts(task.content, worker_device(on_gpu=task.on_gpu))
    return {name: weight.detach().cpu().numpy() for name, weight in components.model.named_parameters()}


@pytest.mark.parametrize("optimizer", SLOW)
def test_a_step_whose_gradient_overflows_is_skipped(device: torch.device, tmp_path: Path, optimizer: str) -> None:
    """The scaler halves its scale, and the weights stay as they are; later steps train."""
    job = job_of(tmp_path, "run", Case({"precision": "fp16", "max_steps": 1}, SLOW[optimizer]))
    job = replace(job, model=Target(f"{__name__}.LoudNet"), checkpoint=CheckpointSpec(every_steps=1))
    before = run_here(initial_weights, job, device).results[0]

    run_here(train, job, device)

    state = newest_state(job)
    assert state["scaler"]["scale"] == LARGEST_SCALE / 2
    assert all(torch.equal(state["model"][name], torch.from_numpy(weight)) for name, weight in before.items())

    run_here(train, replace(job, train=replace(job.train, max_steps=None)), device)
    state = newest_state(job)
    assert state["progress"]["step"] > 1
    assert not all(torch.equal(state["model"][name], torch.from_numpy(weight)) for name, weight in before.items())
