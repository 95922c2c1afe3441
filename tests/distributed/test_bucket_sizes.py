"""``train.bucket_mb`` changes how many exchanges a step has, and no bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.parallel.worker_team import Team
from jobs.spec import OptimizerSpec
from jobs.training.worker import meet
from tests.distributed.small_job import Net, full_job, target
from tests.distributed.team_process import TIMEOUT_S, Outcome, run_job, run_processes

MANY, ONE = 0.001, 100.0
SIZES = {"torch's default": None, "many": MANY, "one": ONE}


def count_buckets(link: AgentLink, task: Task) -> dict[str, int]:
    """The number of buckets in a step, for each size."""
    meet(link, task, TIMEOUT_S)
    found = {}
    for name, size in SIZES.items():
        team = Team(rank=0, world_size=1, shards=1, exact=True, device=torch.device("cpu"), bucket_mb=size)
        replica = team.replicate(Net())
        for _ in range(2):  # in its first step DDP has one bucket, from which it learns the order of the gradients
            replica(torch.randn(4, 1, 8, 8)).sum().backward()
            team.step_done()
        # gradients are views of their buckets
        gradients = [parameter.grad for parameter in replica.parameters() if parameter.grad is not None]
        found[name] = len({gradient.untyped_storage().data_ptr() for gradient in gradients})
    return found


def test_the_number_of_buckets(tmp_path: Path) -> None:
    outcome = run_processes(count_buckets, full_job(tmp_path, "run"), world_size=1)

    assert not outcome.failures, outcome.failures[0]
    assert outcome.results[0] == {"torch's default": 2, "many": 6, "one": 1}


@pytest.mark.parametrize("hosts", [(1,), (3,), (4,), (1, 1), (2, 2), (3, 1), (1, 2, 1)], ids=str)
def test_many_buckets_give_the_same_bits(undisturbed: Outcome, tmp_path: Path, hosts: tuple[int, ...]) -> None:
    """Several of them are under way at once, at every level of the exchange."""
    outcome = run_job(full_job(tmp_path, "run", bucket_mb=MANY), sum(hosts), hosts=hosts)

    assert outcome.rows == undisturbed.rows
    assert outcome.digests == undisturbed.digests
    assert outcome.digest == undisturbed.digest


def test_an_optimizer_that_multiplies_matrices_gets_the_same_bits(tmp_path: Path) -> None:
    """Its products round by the addresses of the gradients, and these lie elsewhere in buckets of another size."""

    def digest(size: float | None, world_size: int) -> str:
        job = full_job(tmp_path, f"{size}-{world_size}", bucket_mb=size, clip_norm=None)
        optimizer = OptimizerSpec(factory=target("RowSums", lr=0.01))
        return run_job(replace(job, optimizer=optimizer, scheduler=None), world_size).digest

    assert digest(None, 1) == digest(0.01, 1) == digest(0.01, 3)
