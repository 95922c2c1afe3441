"""Runs the workers of a job on GPUs, one each, as real processes without Ray: the tests' bodies run in these.

So each test has a CUDA context of its own, and what a failed kernel or a setting of torch leaves behind ends with it.
On the CPU the same processes meet over gloo.
"""

import hashlib
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cluster.process.agent_link import AgentLink
from cluster.process.messages import Report, RowLogged
from cluster.process.orders import Task
from cluster.run.run_directory import RunDirectory
from jobs.components.build import worker_device
from jobs.parallel.worker_team import Team
from jobs.spec import JobSpec
from jobs.training.worker import join_team, main
from tests.distributed.team_process import Outcome, run_directory, run_processes
from tests.processes import wait_until


def run_here(
    body: Callable[..., Any], spec: JobSpec, device: torch.device, num_workers: int = 1, **options: Any
) -> Outcome:
    """Calls ``body(link, task, **options)`` in a process per worker; none may fail.

    Args:
        body: A function of a module; its task says whether it is on a GPU, which is the only one that it sees.
        spec: The content of the task, whose store holds the run directory.
        device: The device of the workers.
        num_workers: How many there are.
        options: What else the body needs.
    """
    outcome = run_processes(_on_device, spec, num_workers, body=body, on_gpu=device.type == "cuda", options=options)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    return outcome


def _on_device(link: AgentLink, task: Task, body: Callable[..., Any], on_gpu: bool, options: dict[str, Any]) -> Any:
    if on_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        number = str(task.rank) if visible is None else visible.split(",")[task.rank]
        os.environ["CUDA_VISIBLE_DEVICES"] = number
    warnings.simplefilter("default")  # torch's own, others in each version; users find them in the log, and so do we
    return body(link, replace(task, on_gpu=on_gpu), **options)


def train(link: AgentLink, task: Task) -> None:
    """A body: the whole of a worker."""
    main(link, task)


def train_and_die(link: AgentLink, task: Task, at_step: int, saved_step: int) -> None:
    """A body: a worker that is killed at a step, once there is the checkpoint of an earlier one."""
    mortal: Any = _MortalLink(link, RunDirectory(task.run_url), at_step, saved_step)
    main(mortal, task)


class _MortalLink:
    """A link whose process is killed when it reports a step."""

    def __init__(self, link: AgentLink, run: RunDirectory, at_step: int, saved_step: int) -> None:
        self.stop_wanted, self.activity = link.stop_wanted, link.activity
        self._link, self._run, self._at_step, self._saved_step = link, run, at_step, saved_step

    def send(self, report: Report) -> None:
        self._link.send(report)
        if isinstance(report, RowLogged) and report.row["step"] == self._at_step:
            wait_until(lambda: self._saved_step in self._run.checkpoints.steps())
            os.kill(os.getpid(), signal.SIGKILL)


def join(link: AgentLink, task: Task) -> tuple[Team, torch.device]:
    """For bodies: the team of a worker, and its device, which is there from now on."""
    device = worker_device(on_gpu=task.on_gpu)
    return join_team(link, task, device), device


def saved_files(spec: JobSpec, step: int | None = None) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, by default of the newest: all state is in them."""
    checkpoints = run_directory(spec).checkpoints
    _, files = checkpoints.read(checkpoints.steps()[-1] if step is None else step)
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
