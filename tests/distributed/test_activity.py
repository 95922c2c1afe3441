"""What workers spend their time on: who is slow reads or computes, the others wait for it in the exchange."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.spec import CheckpointSpec, DataSpec, LossSpec, Target
from tests.distributed.small_job import CLASSES, SAMPLES, Images, plain_job
from tests.distributed.team_process import run_processes, train_job

SLEEP_S = 0.1
STEPS = 8
SLEPT_S = STEPS * 6 * SLEEP_S
"""By the worker that is slow, for its six samples of each step."""

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "in the order of shards": (True, {}),
    "in the backend's order": (False, {}),
    "weights of the targets, before the gradients": (True, {"weight": [1.0 + number for number in range(CLASSES)]}),
}


class SlowImages(Images):
    """Images that one worker reads slowly."""

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if dist.get_rank() == 1:
            time.sleep(SLEEP_S)
        return super().__getitem__(number)


def timed_job(link: AgentLink, task: Task) -> tuple[dict[str, float], bool]:
    """What this rank spends its time on, and whether that adds up to the time it takes."""
    outer_at, before, inner_at = time.monotonic(), sum(link.activity.spent().values()), time.monotonic()
    train_job(link, task)
    inner_s, spent, outer_s = time.monotonic() - inner_at, link.activity.spent(), time.monotonic() - outer_at
    return spent, inner_s <= sum(spent.values()) - before <= outer_s


@pytest.mark.parametrize("name", CASES)
def test_the_fast_one_waits_in_the_exchange(name: str, tmp_path: Path) -> None:
    exact, loss = CASES[name]
    job = replace(
        plain_job(tmp_path, "run", exact=exact),
        data=DataSpec(train=Target(f"{__name__}.SlowImages", {"length": SAMPLES})),
        loss=LossSpec(factory=Target("CrossEntropyLoss", loss)),
        checkpoint=CheckpointSpec(every_steps=4),
    )
    outcome = run_processes(timed_job, job, world_size=2)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    (fast, adds_up), (slow, adds_up_too) = outcome.results[0], outcome.results[1]

    assert slow["data"] >= SLEPT_S
    assert fast["data"] < 0.5 * SLEPT_S
    # In the first step it waits for the other while DDP is set up; two batches are read by then. Some of it is noise.
    assert fast["exchange"] > 0.3 * SLEPT_S
    assert slow["exchange"] < 0.5 * fast["exchange"]
    assert fast["restore"] > 0
    assert adds_up
    assert adds_up_too
