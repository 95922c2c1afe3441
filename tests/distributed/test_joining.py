"""How workers come together before any code of the user runs."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.collectives import groups, slice_exchange
from cluster.errors import LauncherError
from cluster.process.activity import Activity
from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from jobs.parallel.worker_team import Team
from jobs.training import worker
from tests.distributed.small_job import full_job
from tests.distributed.team_process import TIMEOUT_S, run_processes

CPU = torch.device("cpu")


def connect_as_nccl(link: AgentLink, task: Task, hosts: Sequence[int]) -> list[tuple[int, ...]]:
    """Opens a team whose groups are connected while they are opened; returns their members."""
    worker.meet(link, task, TIMEOUT_S)
    connected = []

    def new_group(timeout_s: float | None, ranks: Sequence[int]) -> dist.ProcessGroup:
        group = groups.new_group(timeout_s, ranks=ranks)
        groups._connect(group, CPU)
        connected.append(tuple(ranks))
        return group

    replaced: Any = slice_exchange
    replaced.new_group = new_group
    host = [number for number, count in enumerate(hosts) for _ in range(count)][task.rank]
    team = Team(
        rank=task.rank,
        world_size=task.world_size,
        shards=12,
        exact=True,
        device=CPU,
        address=f"host-{host}",
        timeout_s=TIMEOUT_S,
    )
    team.barrier()
    team.close()
    return connected


@pytest.mark.parametrize("hosts", [(4,), (2, 2), (3, 1), (1, 2, 1)], ids=str)
def test_groups_that_are_connected_at_once_wait_for_each_other_in_no_circle(
    hosts: tuple[int, ...], tmp_path: Path
) -> None:
    outcome = run_processes(connect_as_nccl, full_job(tmp_path, "run", shards=12), sum(hosts), hosts=hosts)

    assert not outcome.failures, "\n".join(outcome.failures.values())
    for rank, connected in outcome.results.items():
        assert connected
        assert all(rank in ranks for ranks in connected)


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (
            dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, unhandled system error"),
            "connection_lost",
            "did not meet the others: NCCL error in: ",
        ),
        (RuntimeError("Connection refused"), "connection_lost", "did not meet the others: Connection refused"),
        (TimeoutError("no meeting place"), "exchange_timeout", "did not meet the others: no meeting place"),
        (torch.OutOfMemoryError("CUDA out of memory"), "gpu_out_of_memory", "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_failure_while_groups_are_opened_is_not_one_of_a_step(
    error: Exception, cause: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doing = []
    link: Any = SimpleNamespace(activity=Activity())

    def fail(**_: Any) -> None:
        doing.append(link.activity.beat().doing)
        raise error

    monkeypatch.setattr(worker, "meet", lambda *_: doing.append(link.activity.beat().doing))
    monkeypatch.setattr(worker, "Team", fail)
    task = Task(entry="", run_url="", import_paths=(), working_directory=".", content=full_job(tmp_path, "run"))
    with pytest.raises(LauncherError) as caught:
        worker.join_team(link, task, CPU)

    assert caught.value.cause == cause
    assert caught.value.step == 0
    assert str(caught.value).startswith(message)
    assert doing == ["exchange", "exchange"]


def test_a_worker_that_has_met_the_others_does_not_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link: Any = SimpleNamespace(activity=Activity())
    monkeypatch.setattr(worker, "meet", lambda *_: None)
    monkeypatch.setattr(worker, "Team", lambda **_: "the team")
    task = Task(entry="", run_url="", import_paths=(), working_directory=".", content=full_job(tmp_path, "run"))
    team: Any = worker.join_team(link, task, CPU)

    assert team == "the team"
    assert link.activity.beat().doing == "start"
