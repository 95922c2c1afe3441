"""A save on a GPU copies the state of its step while training goes on."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from cluster.process.agent_link import AgentLink
from cluster.process.orders import Task
from cluster.run.run_directory import RunDirectory
from jobs.checkpoint import saver as saver_module
from jobs.checkpoint.host_buffers import HostBuffer, HostBuffers
from jobs.checkpoint.loop_state import LoopState
from jobs.checkpoint.saver import Saver
from jobs.components.build import Components, build_parts
from jobs.training.loop import Loop
from tests.distributed.small_job import full_job
from tests.gpu.workers import join, run_here, saved_files
from tests.processes import wait_until
from tests.states import encode

pytestmark = pytest.mark.gpu

STEPS = 3
SAVED = (3, 4, 5)
SLEEP_CYCLES = 1_000_000_000
"""Of a GPU's clock: about half a second."""


class WatchedBuffers(HostBuffers):
    """Notes whether the GPU can copy into the buffers without a wait."""

    are_pinned: list[bool] = []

    def take(self, size: int) -> HostBuffer:
        buffer = super().take(size)
        self.are_pinned.append(buffer.data.is_pinned())
        return buffer


def save_while_weights_change(link: AgentLink, task: Task) -> dict[str, Any]:
    """Saves behind work that the GPU has yet to do, and changes all weights right after each save."""
    replaced: Any = saver_module
    replaced.HostBuffers = WatchedBuffers
    team, device = join(link, task)
    components, state = build_parts(task.content, device), LoopState()
    checkpoints = RunDirectory(task.run_url).checkpoints
    saver = Saver(components, state, checkpoints, link, team, None)
    Loop(
        task.content, components, state, team, metrics={}, log=lambda _: None, tell=lambda _: None,
        save=lambda *_, **__: None, stop_wanted=lambda: False, after_step=saver.start_waiting,
    ).run()  # fmt: skip
    expected, was_busy = [], []
    for step in SAVED:
        state.step = step
        if device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)
        disturb(components)
        expected.append(copy_of({**components.state(), "progress": asdict(state)}))
        saver.save({}, is_needed=True)
        was_busy.append(device.type == "cuda" and not torch.cuda.current_stream().query())
        disturb(components)
        wait_until(lambda step=step: step in checkpoints.steps())
    saver.wait()
    files = [{name: hashlib.sha256(content).hexdigest() for name, content in encode(each).items()} for each in expected]
    return {"files": files, "was_busy": was_busy, "are_pinned": WatchedBuffers.are_pinned}


def disturb(components: Components) -> None:
    with torch.no_grad():
        for tensor in [*components.model.parameters(), *components.model.buffers()]:
            tensor.add_(1)
        for moments in components.optimizer.state.values():
            for moment in moments.values():
                moment.add_(1)


def copy_of(state: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(torch.Tensor, torch.clone, state)


def test_a_checkpoint_holds_the_state_of_its_step(device: torch.device, on_gpu: bool, tmp_path: Path) -> None:
    """To the bit; and the loop waits neither for the copy, nor for what the GPU does before it."""
    job = full_job(tmp_path, "run", epochs=1, max_steps=STEPS)

    result = run_here(save_while_weights_change, job, device).results[0]

    for step, files in zip(SAVED, result["files"]):
        assert saved_files(job, step) == files
    assert result["are_pinned"] == [on_gpu] * len(SAVED)
    assert result["was_busy"][1:] == [on_gpu] * len(SAVED[1:]), "the first save may wait for memory"
