"""How many sets of gradients a worker holds at a time."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.components.build import build_parts
from jobs.data.loader import LoadedBatch
from jobs.parallel.worker_team import Team
from jobs.training.step import TrainingStep
from jobs.training.step_batches import StepBatch
from jobs.training.worker import meet
from tests.distributed.small_job import UNFROZEN_FROM_STEP, full_job
from tests.distributed.team_process import TIMEOUT_S, run_processes
from tests.memory import free_in_this_thread, measured_memory

CPU = torch.device("cpu")
LAYERS, WIDTH = 16, 256


def take_steps(link: AgentLink, task: Task, shards: int) -> list[float]:
    """Computes the gradients of steps; returns the sets of gradients that each step has held beside DDP's buckets."""
    free_in_this_thread()
    meet(link, task, TIMEOUT_S)
    team = Team(rank=0, world_size=1, shards=shards, exact=True, device=CPU, bucket_mb=0.5)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    trained = list(model.parameters())
    replica, found = team.replicate(model), []
    for _ in range(3):
        with measured_memory() as memory:
            for shard in team.block[:-1]:
                with replica.no_sync():
                    replica(torch.ones(1, WIDTH)).sum().backward()
                team.set_aside_gradients(shard, trained)
            replica(torch.ones(1, WIDTH)).sum().backward()
            team.step_done()
        model.zero_grad(set_to_none=True)
        found.append(memory.peak / sum(parameter.nbytes for parameter in trained))
    team.close()
    return found


@pytest.mark.parametrize(("shards", "sets"), [(1, 0), (2, 1), (4, 2), (6, 3), (7, 3), (8, 3), (16, 4)])
def test_a_worker_holds_the_partial_sums_of_the_tree_and_no_copy(tmp_path: Path, shards: int, sets: int) -> None:
    """The sums of the shards so far, and the gradients of one more shard, of which the last has DDP's buckets."""
    outcome = run_processes(take_steps, full_job(tmp_path, "run"), 1, shards=shards)

    assert not outcome.failures, outcome.failures
    first, second, third = outcome.results[0]
    one_layer = 1 / LAYERS
    assert sets <= first <= sets + 2 * one_layer
    assert sets <= third <= sets + 2 * one_layer
    assert second <= sets + 1 + 2 * one_layer, "DDP allocates its new buckets before it frees the old ones"


def unfreeze(link: AgentLink, task: Task) -> list[bool]:
    """Takes a step before and one after a group unfreezes; returns for each replica whether the one before was gone."""
    meet(link, task, TIMEOUT_S)
    team = Team(rank=0, world_size=1, shards=1, exact=True, device=CPU)
    parts = build_parts(task.content, CPU)
    replicas: list[Any] = []
    was_gone = []

    def replicate(model: nn.Module) -> Any:
        was_gone.append(all(replica() is None for replica in replicas))
        made = Team.replicate(team, model)
        replicas.append(weakref.ref(made))
        return made

    team.replicate = replicate  # type: ignore[method-assign]
    training = TrainingStep(task.content, parts, team, lambda *_: None)
    images, labels = zip(*(parts.train_set[number] for number in range(4)))
    batch = StepBatch([LoadedBatch(torch.stack(images), torch.tensor(labels))])
    for step in (0, 1, UNFROZEN_FROM_STEP):
        training.take(step, batch)
    team.close()
    return was_gone


def test_new_buckets_replace_the_old_ones(tmp_path: Path) -> None:
    job = full_job(tmp_path, "run", shards=1)
    outcome = run_processes(unfreeze, replace(job, scheduler=None), 1)

    assert not outcome.failures, outcome.failures
    assert outcome.results[0] == [True, True]
