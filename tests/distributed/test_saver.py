"""All ranks save the same steps, whichever of them has slow storage: each checkpoint that is begun becomes whole."""

import math
import re
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from cluster.run.run_directory import RunDirectory
from cluster.storage.local import SyncedLocalFileSystem
from jobs.checkpoint import host_buffers
from jobs.checkpoint.host_buffers import HostBuffer
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.saver import Saver
from jobs.components.build import build_parts
from jobs.parallel.worker_team import Team
from jobs.training.loop import Loop
from jobs.training.worker import meet
from tests.distributed.small_job import full_job, plain_job
from tests.distributed.team_process import TIMEOUT_S, run_directory, run_processes

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A save is due at each of some steps, and uploads of some ranks are slow."""

    num_steps: int
    slow: Collection[tuple[int, int]]
    """Ranks, and which of their uploads, counted from 0."""
    held_for: int
    """A slow upload ends when so many more saves are due, or none is any more."""
    needed: Collection[int] = ()
    best: Collection[int] = ()
    """The steps that are better than all before."""
    whole: Collection[int]
    """The steps of the checkpoints that there are in the end."""
    left_out: Collection[tuple[int, int]] = ()
    """The steps at which it is said that a checkpoint is left out, and the rank that was not ready."""


CASES = {
    "one rank after the other": Case(
        num_steps=8,
        slow={(0, 0), (1, 1), (0, 2), (1, 3)},
        held_for=2,
        whole=(1, 3, 5, 7),
        left_out=((2, 0), (4, 1), (6, 0), (8, 1)),
    ),
    "by themselves the ranks would never save the same step": Case(
        num_steps=8,
        slow={(0, 0), *((rank, upload) for rank in (0, 1) for upload in range(1, 8))},
        held_for=2,
        whole=(1, 3, 5, 7),
        left_out=((2, 0), (4, 0), (6, 0), (8, 0)),
    ),
    "one that waits is replaced by a newer one": Case(
        num_steps=4, slow={(0, 0)}, held_for=3, needed=(2, 3, 4), whole=(1, 3, 4)
    ),
    "one that is due when one that waited is begun": Case(
        num_steps=4, slow={(0, 0), (0, 1)}, held_for=2, needed=(2,), whole=(1, 2, 3, 4)
    ),
    "the best one waits beside the last": Case(
        num_steps=4, slow={(0, 0)}, held_for=9, needed=(2, 4), best=(2,), whole=(1, 2, 4), left_out=((3, 0),)
    ),
    "unless a better one has taken its place": Case(
        num_steps=4, slow={(1, 0)}, held_for=9, needed=(2, 3, 4), best=(2, 3), whole=(1, 3, 4)
    ),
    "the last one, after one was left out": Case(
        num_steps=3, slow={(1, 0)}, held_for=9, needed=(3,), whole=(1, 3), left_out=((2, 1),)
    ),
}


class Uploads:
    """The file system of a rank, on which some uploads end only when it is told so; and a clock to go with it."""

    def __init__(self, slow: Collection[int], held_for: int) -> None:
        self._slow = slow
        self._held_for = held_for
        self._due: float = 0
        self._begun: list[int] = []
        self._slow_steps: set[int] = set()
        self._changed = threading.Condition()
        self._now = 0.0
        write = SyncedLocalFileSystem.pipe_file

        def pipe_file(files: SyncedLocalFileSystem, path: str, value: bytes, **options: Any) -> None:
            self._upload(int(re.findall(r"/step-(\d+)/", path)[-1]))
            write(files, path, value, **options)

        SyncedLocalFileSystem.pipe_file = pipe_file

    def due(self, step: float) -> None:
        """A save is due."""
        with self._changed:
            self._due = step
            self._changed.notify_all()

    def has_begun(self, step: int) -> bool:
        return step in self._begun

    def clock(self) -> float:
        """Stands still, and leaps beyond every wait while an upload is held."""
        with self._changed:
            self._now += 1000.0 if any(map(self._is_held, self._slow_steps)) else 0.0
            return self._now

    def _upload(self, step: int) -> None:
        with self._changed:
            if step not in self._begun:
                self._begun.append(step)
            if self._begun.index(step) in self._slow:
                self._slow_steps.add(step)
                self._changed.wait_for(lambda: not self._is_held(step))

    def _is_held(self, step: int) -> bool:
        return self._due < step + self._held_for


def save_every_step(link: AgentLink, task: Task, case: Case, *, tends: bool = False) -> None:
    """Saves at each step a state that has changed as a whole."""
    meet(link, task, TIMEOUT_S)
    team = Team(rank=task.rank, world_size=task.world_size, shards=4, exact=True, device=CPU)
    parts, progress = build_parts(task.content, CPU), LoopState()
    uploads = Uploads({upload for rank, upload in case.slow if rank == team.rank}, case.held_for)
    checkpoints = RunDirectory(task.run_url).checkpoints
    saver = Saver(parts, progress, checkpoints, link, team, None, clock=uploads.clock)
    for progress.step in range(1, case.num_steps + 1):
        with torch.no_grad():
            for parameter in parts.model.parameters():
                parameter.add_(1)
        uploads.due(progress.step)
        if progress.step in case.best:
            progress.best_step = progress.step
        saver.save({}, is_needed=progress.step in case.needed)
    uploads.due(math.inf)
    while tends and not all(team.gather_flags(uploads.has_begun(case.num_steps))):
        saver.start_waiting()
    team.barrier()
    team.close()
    saver.wait()


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_save_the_same_steps(name: str, tmp_path: Path) -> None:
    case, job = CASES[name], plain_job(tmp_path, "run")
    outcome = run_processes(save_every_step, job, world_size=2, case=case)

    assert not outcome.failures, "\n".join(outcome.failures.values())
    assert {step: len(shares) for step, shares in outcome.shares.items()} == dict.fromkeys(case.whole, 2)
    assert sorted(outcome.left_out) == sorted(case.left_out)
    checkpoints = run_directory(job).checkpoints
    assert checkpoints.steps() == sorted(case.whole)
    for step in case.whole:
        checkpoints.verify(checkpoints.manifest(step))


def test_one_that_waits_is_begun_between_saves(tmp_path: Path) -> None:
    """Else the processes would go on tending for ever."""
    case = Case(num_steps=2, slow={(1, 0)}, held_for=9, needed=(2,), whole=(1, 2))
    outcome = run_processes(save_every_step, plain_job(tmp_path, "run"), world_size=2, case=case, tends=True)

    assert not outcome.failures, "\n".join(outcome.failures.values())
    assert sorted(outcome.digests) == [1, 2]


def save_once(link: AgentLink, task: Task) -> list[str]:
    """Tends to saves and then saves; returns the threads in which memory was allocated, up to each of both."""
    meet(link, task, TIMEOUT_S)
    team = Team(rank=task.rank, world_size=task.world_size, shards=4, exact=True, device=CPU)
    parts, progress = build_parts(task.content, CPU), LoopState(step=1)
    for parameter in parts.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parts.optimizer.step()
    threads = []

    class Recorded(HostBuffer):
        def __init__(self, size: int, *, is_locked: bool) -> None:
            threads.append(threading.current_thread().name)
            super().__init__(size, is_locked=is_locked)

    host_buffers.HostBuffer = Recorded  # type: ignore[misc]
    saver = Saver(parts, progress, RunDirectory(task.run_url).checkpoints, link, team, None)
    for progress.step in (1, 10, 10**6, 10**9):
        saver.start_waiting()
        saver.save({}, is_needed=True)
    team.barrier()
    team.close()
    saver.wait()
    return threads


def test_the_memory_of_a_copy_is_allocated_beside_the_steps_and_once(tmp_path: Path) -> None:
    outcome = run_processes(save_once, plain_job(tmp_path, "run"), world_size=2)

    assert not outcome.failures, "\n".join(outcome.failures.values())
    for threads in outcome.results.values():
        assert threads == ["checkpoint-memory_0"]


def pauses(link: AgentLink, task: Task) -> list[tuple[str, int]]:
    """What the loop asks for between steps."""
    meet(link, task, TIMEOUT_S)
    team = Team(rank=task.rank, world_size=task.world_size, shards=4, exact=True, device=CPU)
    progress = LoopState()
    asked: list[tuple[str, int]] = []
    Loop(
        task.content,
        build_parts(task.content, CPU),
        progress,
        team,
        metrics={},
        log=lambda _: None,
        tell=lambda _: None,
        save=lambda _, **__: asked.append(("save", progress.step)),
        stop_wanted=lambda: False,
        after_step=lambda: asked.append(("tend", progress.step)),
    ).run()
    team.close()
    return asked


def test_the_loop_tends_to_saves_after_every_step(tmp_path: Path) -> None:
    """One that waits is begun within a step, however far the next pause is."""
    job = full_job(tmp_path, "run", epochs=2, validate_every_steps=2)  # saves every 3 steps; an epoch has 4
    outcome = run_processes(pauses, job, world_size=1)

    assert not outcome.failures, "\n".join(outcome.failures.values())
    asked = outcome.results[0]
    assert [step for what, step in asked if what == "save"] == [3, 6, 8]
    assert [step for what, step in asked if what == "tend"] == [1, 2, 3, 4, 5, 6, 7, 8]
