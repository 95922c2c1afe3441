"""The memory that a plan names is what torch takes in real steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.components.build import build_parts
from jobs.data.loader import LoadedBatch
from jobs.parallel.worker_team import Team
from jobs.spec import GroupSpec, JobSpec, OptimizerSpec, Target, TrainSpec
from jobs.training.step import TrainingStep
from jobs.training.step_batches import StepBatch
from jobs.training.worker import meet
from launcher.planning.dry_run import try_out
from launcher.planning.memory import MemoryPlan
from tests.distributed.small_job import OddNet, plain_job, target
from tests.distributed.team_process import TIMEOUT_S, run_processes
from tests.memory import Memory, free_in_this_thread, measured_memory

CPU = torch.device("cpu")
SMALL = 100_000
"""Bytes of samples, activations and numbers."""


class NarrowNet(OddNet):
    """With weights of 16 bits."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.bfloat16()

    def forward(self, images_N188: Tensor) -> Tensor:
        return super().forward(images_N188.bfloat16())


SGD = OptimizerSpec(factory=Target("SGD", {"lr": 0.05}))
MOMENTUM = OptimizerSpec(factory=Target("SGD", {"lr": 0.05, "momentum": 0.9}))
ADAMW = OptimizerSpec(factory=Target("AdamW", {"lr": 0.01}))
THAWED = replace(ADAMW, groups=(GroupSpec(match="fc2.*", from_step=2),))
NARROW = Target(f"{__name__}.NarrowNet")
CASES = {
    "SGD": {"optimizer": SGD},
    "momentum": {"optimizer": MOMENTUM, "shards": 2},
    "AdamW": {"optimizer": ADAMW, "shards": 8, "global_batch": 16},
    "an average": {"optimizer": ADAMW, "ema_decay": 0.9, "shards": 4},
    "a group that unfreezes": {"optimizer": THAWED, "shards": 3},
    "weights of 16 bits": {"optimizer": ADAMW, "ema_decay": 0.9, "shards": 2, "model": NARROW},
    "another order of the sum": {"optimizer": MOMENTUM, "shards": 4, "exact": False},
}


def job_of(store: Path, optimizer: OptimizerSpec, model: Target | None = None, **train: object) -> JobSpec:
    job = plain_job(store, "run")
    spec = TrainSpec(**{"epochs": 2, "global_batch": 12, "shards": 1, **train})  # type: ignore[arg-type]
    return replace(job, optimizer=optimizer, model=model or target("Net", dropout=0.0), train=spec)


def plan(link: AgentLink, task: Task) -> MemoryPlan:  # noqa: ARG001
    return try_out(task).memory


def train(link: AgentLink, task: Task) -> Memory:
    """Takes five steps; returns what torch has allocated from the building of the components on."""
    free_in_this_thread()
    meet(link, task, TIMEOUT_S)
    spec: JobSpec = task.content
    team = Team(rank=0, world_size=1, shards=spec.train.shards, exact=spec.train.exact, device=CPU)
    with measured_memory() as memory:
        parts = build_parts(spec, CPU)
        training = TrainingStep(spec, parts, team, lambda *_: None)
        images, labels = zip(*(parts.train_set[number] for number in range(spec.train.micro_batch)))
        batch = StepBatch([LoadedBatch(torch.stack(images), torch.tensor(labels))] * spec.train.shards)
        for step in range(5):
            training.take(step, batch)
    team.close()
    return memory


@pytest.mark.parametrize("name", CASES)
def test_a_plan_names_what_torch_takes(tmp_path: Path, name: str) -> None:
    job = job_of(tmp_path, **CASES[name])  # type: ignore[arg-type]
    results = []
    for entry in (plan, train):
        outcome = run_processes(entry, job, 1)
        assert not outcome.failures, outcome.failures
        results.append(outcome.results[0])
    planned, taken = results

    lasting = planned.weights + planned.buffers + planned.gradients + planned.optimizer + planned.average
    assert lasting - SMALL < taken.end < lasting + SMALL
    assert lasting + planned.set_aside - SMALL < taken.peak < planned.total + SMALL
    assert planned.total == lasting + planned.set_aside + planned.exchange
