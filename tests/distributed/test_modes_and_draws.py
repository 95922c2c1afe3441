"""Modes of modules and the random draws of an optimizer: exact on any number of workers, and after a resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.spec import CheckpointSpec, JobSpec, OptimizerSpec, Target
from jobs.training.evaluation import evaluation_mode
from tests.distributed.small_job import CLASSES, full_job
from tests.distributed.team_process import run_job

STEPS, RESUMED_AT = 4, 2


class PartlyFrozen(nn.Module):
    """Its batch norm keeps the statistics that it was built with, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), nn.BatchNorm1d(CLASSES).eval()

    def forward(self, images_N188: Tensor) -> Tensor:
        logits_NK: Tensor = self.norm(self.net(images_N188))
        return logits_NK


class Langevin(torch.optim.SGD):
    """Adds noise to each step, on the device of the weights."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(torch.randn_like(parameter), alpha=0.1)
        return super().step(closure)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": Target(f"{__name__}.PartlyFrozen", {})},
        {"optimizer": OptimizerSpec(factory=Target(f"{__name__}.Langevin", {"lr": 0.1}))},
    ],
    ids=["frozen batch norm", "noisy updates"],
)
def test_any_number_of_workers_and_a_resume_give_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    job: JobSpec = full_job(tmp_path, "run", max_steps=STEPS, validate_every_steps=1)
    job = replace(job, optimizer=replace(job.optimizer, groups=()), checkpoint=CheckpointSpec(every_steps=1, keep=9))
    job = replace(job, **changes)
    alone, together = (run_job(replace(job, name=f"on-{workers}"), workers) for workers in (1, 2))
    assert (together.rows, together.digests) == (alone.rows, alone.digests)

    first = run_job(replace(job, train=replace(job.train, max_steps=RESUMED_AT)), 2)
    second = run_job(job, 1)
    assert first.rows + second.rows == alone.rows
    assert second.digest == alone.digest


def test_an_evaluation_leaves_each_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
