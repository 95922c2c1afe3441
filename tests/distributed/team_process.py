"""Runs the workers of a job as real processes over gloo, without Ray.

The harness stands in for agents and driver alone: it forks the processes, passes rank 0's meeting place on, and
commits checkpoints. What happens inside a process is the product's own.
"""

import contextlib
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from cluster.errors import LauncherError
from cluster.process import fork_server
from cluster.process.activity import Activity
from cluster.process.agent_link import AgentLink
from cluster.process.data_messages import SampleSkipped
from cluster.process.messages import (
    Beat,
    EnvironmentsCompared,
    FellBack,
    MeetingPlace,
    Report,
    RowLogged,
    SaveSkipped,
    ShareWritten,
    StepEvent,
    TrainingStarted,
)
from cluster.process.orders import LOOPBACK, Meet, Task
from cluster.run.manifest import Share, join
from cluster.run.run_directory import RunDirectory
from jobs.checkpoint.loop_state import LoopState
from jobs.components.build import build_parts
from jobs.parallel.worker_team import Team
from jobs.spec import JobSpec
from jobs.training.worker import compare_environments, meet, train
from tests.states import decode, digest

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class _Result:
    """What a rank came to in the end, beside the reports of the product's own."""

    result: Any


@dataclass(frozen=True)
class _Failure:
    """The error of a rank."""

    text: str


@dataclass(kw_only=True)
class Outcome:
    """What the processes of one launch said."""

    started: int = 0
    """The step they went on from."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    """What happened, and at which step."""
    skipped: list[SampleSkipped] = field(default_factory=list)
    """The bad samples that ranks told of."""
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """The steps at which a checkpoint was left out, and the rank that was not ready."""
    digests: dict[int, str] = field(default_factory=dict)
    """The digest in the manifest of each checkpoint, by step."""
    results: dict[int, Any] = field(default_factory=dict)
    """What each rank came to in the end."""
    fell_back: list[int] = field(default_factory=list)
    """Steps of the checkpoints that were passed over."""
    failures: dict[int, str] = field(default_factory=dict)
    """The error of each rank that failed."""
    environments: list[EnvironmentsCompared] = field(default_factory=list)
    """What was told of the workers."""
    shares: dict[int, list[Share]] = field(default_factory=dict)
    """What ranks have written of checkpoints, by step."""

    @property
    def digest(self) -> str:
        """The digest at the end: all ranks came to the same one, and the newest manifest has it."""
        (digest,) = set(self.results.values())
        assert self.digests[max(self.digests)] == digest
        return digest


def run_job(
    spec: JobSpec, world_size: int, *, hosts: Sequence[int] | None = None, stop_after: int | None = None
) -> Outcome:
    """Trains the run of this name in the spec's store, from where it stands; no rank may fail.

    Args:
        spec: The job.
        world_size: Workers.
        hosts: The number of workers on each host, which the workers believe; None: all are on one.
        stop_after: Rank 0 hears a wish to stop when it has told of this step.
    """
    outcome = run_processes(train_job, spec, world_size, hosts=hosts, stop_after=stop_after)
    assert not outcome.failures, "\n".join(outcome.failures.values())
    return outcome


def train_job(link: AgentLink, task: Task, hosts: Sequence[int] | None = None, stop_after: int | None = None) -> str:
    """``jobs.training.worker.main`` taken apart, for a look at the state that this rank ends with."""
    spec: JobSpec = task.content
    device = torch.device("cpu")
    meet(link, task, TIMEOUT_S)
    addresses = [f"host-{number}" for number, count in enumerate(hosts or [task.world_size]) for _ in range(count)]
    team = Team(
        rank=task.rank,
        world_size=task.world_size,
        shards=spec.train.shards,
        exact=spec.train.exact,
        device=device,
        address=addresses[task.rank],
        bucket_mb=spec.train.bucket_mb,
        activity=link.activity,
    )
    parts = build_parts(spec, device)
    compare_environments(link, task, parts, team)
    stopping_link: Any = _StoppingLink(link, stop_after)
    train(stopping_link, RunDirectory(task.run_url), spec, parts, LoopState(), team)
    return digest(parts.state())


def run_directory(spec: JobSpec) -> RunDirectory:
    return RunDirectory(f"{spec.store}/{spec.name}")


def newest_state(spec: JobSpec) -> dict[str, Any]:
    """What the newest checkpoint of a run holds."""
    checkpoints = run_directory(spec).checkpoints
    return decode(checkpoints.read(checkpoints.steps()[-1])[1])


def run_processes(entry: Callable[..., Any], spec: JobSpec, world_size: int, **options: Any) -> Outcome:
    """Calls ``entry(link, task, **options)`` in a process per rank, and hears them all to their ends."""
    fork_server.start([__name__])
    run = run_directory(spec)
    outcome = Outcome()
    processes = []
    rank_of: dict[Any, int] = {}
    try:
        for rank in range(world_size):
            task = Task(
                entry="", run_url=run.url, import_paths=(), working_directory=".", rank=rank, world_size=world_size,
                content=spec,
            )  # fmt: skip
            ours, theirs = multiprocessing.Pipe()
            process = fork_server.fork(_run, (theirs, entry, task, options), f"rank-{rank}")
            processes.append(process)
            theirs.close()
            rank_of[ours] = rank
        _listen(rank_of, run, outcome)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for link in rank_of:
            link.close()
    assert outcome.results.keys() | outcome.failures.keys() == set(range(world_size)), f"a rank died: {outcome}"
    return outcome


def _listen(rank_of: dict[Any, int], run: RunDirectory, outcome: Outcome) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    talking = set(rank_of)
    while talking:
        ready = wait(talking, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"not at their ends after {TIMEOUT_S} s: ranks {[rank_of[link] for link in talking]}; {outcome}"
        for link in ready:
            try:
                messages = link.recv()
            except (EOFError, ConnectionResetError):
                talking.remove(link)
                continue
            for message in messages:
                if isinstance(message, Beat):
                    continue
                if isinstance(message, MeetingPlace):
                    for other in talking:
                        with contextlib.suppress(OSError):  # it has just died, which its end of file will tell
                            other.send(Meet(LOOPBACK, message.port))
                else:
                    _hear(message, rank_of[link], run, outcome)


def _hear(message: Report | _Result | _Failure, rank: int, run: RunDirectory, outcome: Outcome) -> None:
    """Notes it, and does what the driver does: a checkpoint exists when its manifest is committed here."""
    match message:
        case TrainingStarted(step=step):
            outcome.started = step
        case RowLogged(row=row):
            outcome.rows.append({**row})
        case StepEvent(kind=kind, step=step):
            outcome.events.append((kind, step))
        case SampleSkipped():
            outcome.skipped.append(message)
        case SaveSkipped(step=step):
            outcome.left_out.append((step, rank))
        case ShareWritten(share=share):
            shares = outcome.shares.setdefault(share.step, [])
            shares.append(share)
            manifest = join(shares)
            if manifest is not None:
                run.checkpoints.commit(manifest)
                outcome.digests[manifest.step] = manifest.state_sha256
        case EnvironmentsCompared():
            outcome.environments.append(message)
        case FellBack(step=step):
            outcome.fell_back.append(step)
        case _Result(result):
            outcome.results[rank] = result
        case _Failure(text):
            outcome.failures[rank] = text


def _run(connection: Connection, entry: Callable[..., Any], task: Task, options: dict[str, Any]) -> None:
    """A process, from its first line to its end."""
    warnings.simplefilter("error")
    address = fork_server.own_address()
    if address is not None:
        fork_server.use(address)  # loader processes come from it too
    link: Any = AgentLink(connection, Activity())
    try:
        link.send(_Result(entry(link, task, **options)))
    except LauncherError as error:
        link.send(_Failure(str(error)))
    except Exception:  # whatever it is, the test reads it
        link.send(_Failure(traceback.format_exc()))
    link.close()
    os._exit(0)  # as under an agent: a peer that failed may have left a collective open


class _StoppingLink:
    """A link over which the order to stop arrives when it has told of a step."""

    def __init__(self, link: AgentLink, stop_after: int | None) -> None:
        self.stop_wanted, self.activity = link.stop_wanted, link.activity
        self._link = link
        self._stop_after = stop_after

    def send(self, report: Report) -> None:
        self._link.send(report)
        if isinstance(report, RowLogged) and report.row["step"] == self._stop_after:
            self.stop_wanted.set()
