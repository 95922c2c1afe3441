"""What a worker needs of its host's memory when it restores a checkpoint or begins with given weights."""

import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from cluster.run.run_directory import RunDirectory
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.saver import Saver
from jobs.components.build import Components, build_parts
from jobs.parallel.worker_team import Team
from jobs.spec import InitSpec, JobSpec, OptimizerSpec, Target
from jobs.training.restore import restore_newest
from jobs.training.worker import meet
from tests.distributed.small_job import plain_job
from tests.distributed.team_process import TIMEOUT_S, run_directory, run_processes
from tests.states import digest

CPU = torch.device("cpu")
WEIGHTS = 100 * 2**20
"""The bytes of the weights."""
PARTS = 100 * 2**20
"""More than the parts in flight, 4 MiB for each of 8 requests, and what allocators keep of them."""


class Wide(nn.Module):
    """A model of ``WEIGHTS`` bytes that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, size, bias=False) for size in (20 * 2**18, 79 * 2**18, 2**17, 2**17))


def wide_job(store: object, name: str) -> JobSpec:
    optimizer = OptimizerSpec(factory=Target("SGD", {"lr": 0.1, "momentum": 0.9}))
    job = plain_job(store, name)
    return replace(job, model=Target(f"{__name__}.Wide"), optimizer=optimizer)


def status_bytes(field: str) -> int:
    """A number of kB in the status that Linux keeps of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def prepared(link: AgentLink, task: Task) -> tuple[Team, Components]:
    meet(link, task, TIMEOUT_S)
    team = Team(rank=task.rank, world_size=task.world_size, shards=4, exact=True, device=CPU)
    return team, build_parts(task.content, CPU)


def save_a_step(link: AgentLink, task: Task) -> str:
    """Saves a state with moments; returns its digest."""
    team, parts = prepared(link, task)
    for parameter in parts.model.parameters():
        parameter.grad = torch.rand_like(parameter)
    parts.optimizer.step()
    saver = Saver(parts, LoopState(step=1), RunDirectory(task.run_url).checkpoints, link, team, None)
    saver.save({}, is_needed=True)
    saver.wait()
    return digest(parts.state())


def save_two_steps(link: AgentLink, task: Task) -> str:
    """Saves two states; returns the digest of the first."""
    first = save_a_step(link, task)
    team, parts = Team(rank=0, world_size=1, shards=4, exact=True, device=CPU), build_parts(task.content, CPU)
    for parameter in parts.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parts.optimizer.step()
    saver = Saver(parts, LoopState(step=2), RunDirectory(task.run_url).checkpoints, link, team, None)
    saver.save({}, is_needed=True)
    saver.wait()
    return first


def restore_measured(link: AgentLink, task: Task) -> tuple[int, str]:
    """Returns how far the memory of this process rose while it restored, and the digest of its state."""
    team, parts = prepared(link, task)
    team.barrier()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
    restore_newest(link, RunDirectory(task.run_url), parts, LoopState(), team)
    rise = status_bytes("VmHWM") - before
    found = digest(parts.state())
    team.barrier()
    team.close()
    return rise, found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_restore_needs_memory_for_the_state_once(tmp_path: Path, world_size: int) -> None:
    job = wide_job(tmp_path, "run")
    saved = run_processes(save_a_step, job, 1)
    assert not saved.failures, saved.failures
    restored = run_processes(restore_measured, job, world_size)

    assert not restored.failures, restored.failures
    state = 2 * WEIGHTS  # as much momentum
    for rise, found in restored.results.values():
        assert found == saved.results[0]
        assert state * 0.95 < rise < state + PARTS, f"{rise / 2**20:.0f} MiB, of a state of {state / 2**20:.0f} MiB"


def fall_back_measured(link: AgentLink, task: Task) -> tuple[int, str]:
    """Like ``restore_measured``, without the collector that would free a state that nobody needs."""
    gc.disable()
    return restore_measured(link, task)


def test_a_checkpoint_that_is_not_good_takes_no_memory_from_the_one_before(tmp_path: Path) -> None:
    job = wide_job(tmp_path, "run")
    saved = run_processes(save_two_steps, job, 1)
    assert not saved.failures, saved.failures
    run = run_directory(job)
    damaged = Path(run.url, "checkpoints", run.checkpoints.manifest(2).part(("optimizer.safetensors", 1)).object)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    restored = run_processes(fall_back_measured, job, 1)

    assert not restored.failures, restored.failures
    assert restored.fell_back == [2]
    state = 2 * WEIGHTS
    rise, found = restored.results[0]
    assert found == saved.results[0]
    # Twice the state if the first one stays; what allocators keep of its small tensors and parts is below half of that.
    assert rise < 1.82 * state, f"{rise / 2**20:.0f} MiB, of a state of {state / 2**20:.0f} MiB"


def test_weights_of_another_run_are_read_by_one_rank(tmp_path: Path) -> None:
    saved = run_processes(save_a_step, wide_job(tmp_path, "first"), 1)
    assert not saved.failures, saved.failures
    init_from = InitSpec(url=f"{tmp_path}/first")
    begun = run_processes(restore_measured, replace(wide_job(tmp_path, "second"), init_from=init_from), 2)

    assert not begun.failures, begun.failures
    (_, digest_of_reader), (rise, found) = begun.results[0], begun.results[1]
    assert found == digest_of_reader
    assert WEIGHTS * 0.95 < rise < WEIGHTS + PARTS, f"{rise / 2**20:.0f} MiB, of {WEIGHTS / 2**20:.0f} MiB of weights"
