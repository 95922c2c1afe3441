"""A worker waits for the others as long as it was told, wherever it waits."""

import time
from pathlib import Path

import torch
from torch import nn

from cluster.errors import LauncherError
from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.parallel.worker_team import Team
from jobs.training.failure_causes import to_launcher_error
from jobs.training.worker import meet
from tests.distributed.small_job import full_job
from tests.distributed.team_process import TIMEOUT_S, run_processes

WAIT_S = 5.0


def wait_for_rank_1(link: AgentLink, task: Task, is_over: Path) -> list[tuple[str, str]]:
    """What rank 0 comes to that alone exchanges gradients, and then meets at a barrier."""
    meet(link, task, TIMEOUT_S)
    device = torch.device("cpu")
    team = Team(rank=task.rank, world_size=2, shards=4, exact=True, device=device, timeout_s=WAIT_S)
    replica = team.replicate(nn.Linear(3, 2))
    team.barrier()
    if task.rank == 1:
        while not is_over.exists():
            time.sleep(0.05)
        return []
    loss = replica(torch.ones(1, 3)).sum()
    told: list[LauncherError] = []
    for exchange in (loss.backward, team.barrier):
        try:
            exchange()
        except Exception as error:
            told.append(to_launcher_error(error, step=0))
    is_over.touch()
    return [(error.cause, str(error)) for error in told]


def test_nobody_waits_longer_than_told(tmp_path: Path) -> None:
    outcome = run_processes(wait_for_rank_1, full_job(tmp_path, "run"), world_size=2, is_over=tmp_path / "over")

    assert not outcome.failures, "\n".join(outcome.failures.values())
    exchange, barrier = outcome.results[0]
    assert exchange[0] == barrier[0] == "exchange_timeout"
    assert exchange[1].startswith("lost the others: ")
