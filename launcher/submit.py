"""Submitting a run: it is checked here and on the cluster, then its directory is written, then a job begins.

The job is ``launcher resume RUN_URL``, so a submission is a run directory and nothing else. What is refused is refused
before the first object is written. Many may submit the same run at once: the name of its job follows from the run's
URL and from how often it was begun, and the cluster begins a job of one name once.
"""

import getpass
import hashlib
import os
import re
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.bundle import Bundle
from cluster.errors import ClusterError
from cluster.run_directory import RunDirectory
from cluster.scheduler import ENDED, Scheduler
from cluster.storage import Store
from cluster.store_check import inspect_cluster
from launcher.code import directory_in_code, pack_job
from launcher.description import Description, Difference, parse
from launcher.nodes import check_nodes, fit, own_versions
from launcher.plan import Plan, Tried, try_job
from launcher.progress import Progress
from launcher.runs import check_unchanged, compare, git_state, left_to_plan, one_line, placed_at, run_directory
from launcher.status import is_driven, read_status
from launcher.user_code import make_import_paths

_ASK_AGAIN_S = 2.0
_DIGITS = 12
"""Of a digest, in the name of a job."""
_LONGEST_NAME = 40
_VARIABLE = re.compile(r"\$\{oc\.env:([A-Za-z_][A-Za-z0-9_]*)\}")
"""One that a description cannot do without; with a default, it can."""


class Place(Protocol):
    """What is read of the description of a cluster."""

    @property
    def address(self) -> str:
        """What to call it."""

    @property
    def env(self) -> tuple[str, ...]:
        """The names of the variables that its nodes must have."""

    @property
    def stop_grace_s(self) -> int:
        """Seconds between SIGTERM and SIGKILL when a job is stopped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Standing:
    """How a run stands before it is submitted.

    Attributes:
        stored: Its description; none: there is no such run.
        status: What its last driver wrote; none: it never had one.
        submission: The last one; none: it was never submitted.
        changed: What is to change in its description.
        reached: The step of its newest checkpoint.
    """

    stored: Description | None
    status: Mapping[str, Any] | None
    submission: Mapping[str, Any] | None
    changed: list[Difference]
    reached: int


def submit(
    description: Description, folder: Path, scheduler: Scheduler, place: Place, display: Progress
) -> dict[str, Any]:
    """Hands a run over to a cluster, unless it is there, or is complete.

    Args:
        description: What to run.
        folder: Of the job file.
        scheduler: Begins a command on the cluster.
        place: The description of the cluster.
        display: Shows what is done.

    Returns:
        ``run``, its URL; ``job``, what the cluster calls it, none if it is no job; ``cluster``; ``status``.

    Raises:
        DescriptionError: The description cannot run as written, or the run exists with another one.
        ClusterError: The cluster is not fit for it.
        LauncherError: Else; nothing has begun.
    """
    run = run_directory(description)
    standing = _look_at(run, description)
    number, why_not = _next_number(run, standing, scheduler)
    if why_not:
        return _left_alone(run, standing, place, why_not, display)
    display.phase("trying the job out")
    to_plan, store, tried = _try_here(run, standing, description, folder)
    bundle = pack_job(folder, tried.modules)
    display.phase(f"inspecting the nodes of {place.address}")
    plan = _fit_there(to_plan, store, tried, scheduler, place, display)
    if standing.status is not None and standing.reached >= plan.end_step < plan.total_steps:
        why_not = f"{run.url} has reached train.max_steps={plan.end_step}; raise it to go on"
        return _left_alone(run, standing, place, why_not, display)
    for change in _look_at(run, description).changed:  # again: somebody may have submitted another run by this name
        display.message(f"changed {change}")
    job_id, command = make_job_id(run.url, number), make_command(run.url)
    about = {"job": job_id, "number": number, "command": command, "cluster": place.address}
    about |= {"driver_before": (standing.status or {}).get("claimed"), "code_directory": directory_in_code(folder)}
    _write(run, description, bundle, about)
    display.phase(f"beginning {job_id}")
    if _begin(run, scheduler, job_id, command, place.stop_grace_s):
        display.message(f"submitted {one_line(description.spec, plan)}")
    else:
        job = scheduler.read(job_id)
        now = "is not known any more" if job is None else f"is {job.status}"
        display.message(f"{run.url} was submitted by somebody else at the same time; job {job_id} {now}")
    return _result(run, job_id, place)


def make_job_id(run_url: str, number: int) -> str:
    """What a run is called on a cluster when it is begun for the ``number``-th time, from 0; the same everywhere."""
    name = re.sub("[^A-Za-z0-9_-]", "-", run_url.rstrip("/").rpartition("/")[2])[:_LONGEST_NAME]
    return f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:_DIGITS]}-{number}"


def make_command(run_url: str) -> str:
    """What goes on with a run, as a line for the shell of a host of the cluster; Ray names the cluster there."""
    return f'exec launcher resume {shlex.quote(run_url)} --json --cluster "$RAY_ADDRESS"'


# --- How the run stands ---


def _look_at(run: RunDirectory, wanted: Description) -> _Standing:
    """Raises DescriptionError if the run is another than the one that is wanted."""
    if not run.exists():
        return _Standing(stored=None, status=None, submission=run.read_submission(), changed=[], reached=0)
    stored = parse(run.read_job(), f"{run.url}/job.yaml")
    changed, _ = compare(run, stored, wanted)
    return _Standing(
        stored=stored,
        status=run.read_status(),
        submission=run.read_submission(),
        changed=changed,
        reached=max(run.checkpoints.steps(), default=0),
    )


def _next_number(run: RunDirectory, standing: _Standing, scheduler: Scheduler) -> tuple[int, str]:
    """How often the run was begun before, and why it is not to be begun now; empty: it is.

    A job that the cluster does not know, though it was submitted, is begun now by the same name: whoever submitted it
    may not have come that far, or just be about to.
    """
    status, stop = standing.status, f"stop it with `launcher stop {shlex.quote(run.url)}`"
    if status is not None and status["status"] == "completed":
        return 0, f"{run.url} is complete; nothing to do (another name starts another run)"
    number = 0
    if standing.submission is not None:
        number = int(standing.submission.get("number", 0))
        while (job := scheduler.read(make_job_id(run.url, number))) is not None:
            if job.status not in ENDED:
                return number, f"{run.url} is there already, job {job.id} is {job.status}; {stop}"
            number += 1
    if status is not None and status["status"] == "running" and is_driven(run, dict(status)):
        return number, f"{run.url}: process {status['pid']} on {status['host']} is running it; {stop}"
    return number, ""


def _left_alone(run: RunDirectory, standing: _Standing, place: Place, why: str, display: Progress) -> dict[str, Any]:
    """A run that is not begun, told of."""
    display.message(why)
    for change in standing.changed:
        display.warn(f"not changed: {change}")
    return _result(run, (standing.submission or {}).get("job"), place)


def _result(run: RunDirectory, job_id: str | None, place: Place) -> dict[str, Any]:
    return {"run": run.url, "job": job_id, "cluster": place.address, "status": read_status(run)["status"]}


# --- The steps ---


def _try_here(
    run: RunDirectory, standing: _Standing, description: Description, folder: Path
) -> tuple[Description, Store, Tried]:
    """What is left to plan, its store, and what trying it out on this machine told."""
    to_plan = description
    if standing.stored is not None:
        is_in_place = description.spec.store == standing.stored.spec.store
        to_plan = left_to_plan(run, placed_at(run, description) if is_in_place else description, standing.reached)
    store, tried = try_job(to_plan, make_import_paths(folder))
    if standing.stored is not None:
        check_unchanged(run, description, tried)
    return to_plan, store, tried


def _fit_there(
    description: Description, store: Store, tried: Tried, scheduler: Scheduler, place: Place, display: Progress
) -> Plan:
    """The plan on the cluster, whose nodes are fit for it."""
    # What every node must have set: what the cluster's description says, and what the job takes.
    variables = tuple(dict.fromkeys([*place.env, *_VARIABLE.findall(description.text)]))
    report = inspect_cluster(scheduler, store, variables)
    check_nodes(report, description.spec, place.address, own_versions(), display.warn)
    plan = fit(description, store, tried, report.capacity, place.address)
    if plan.why_cpu:
        display.warn(plan.why_cpu)
    return plan


def _write(run: RunDirectory, description: Description, bundle: Bundle, about: Mapping[str, Any]) -> None:
    """Writes the run directory; with its last object the run exists, and a driver has all that it needs."""
    run.write_code(bundle.sha256, bundle.data)
    run.write_submission(
        {
            **about,
            "code": bundle.sha256,
            "time": round(time.time(), 3),
            "user": _user(),
            "host": socket.gethostname(),
            "working_directory": os.getcwd(),
            "versions": own_versions(),
            "git": git_state(),
        }
    )
    run.write_job(description.text)


def _begin(run: RunDirectory, scheduler: Scheduler, job_id: str, command: str, stop_grace_s: int) -> bool:
    """Begins the job; returns whether it was not begun by somebody else.

    Raises:
        ClusterError: It may not have begun, though the run directory is written.
    """
    metadata = {"run": run.url, "user": _user(), "host": socket.gethostname()}
    try:
        return scheduler.begin(job_id, command, {}, stop_grace_s=stop_grace_s, metadata=metadata)
    except ClusterError:  # perhaps only the answer was lost
        time.sleep(_ASK_AGAIN_S)
    try:
        scheduler.begin(job_id, command, {}, stop_grace_s=stop_grace_s, metadata=metadata)
    except ClusterError as error:
        raise ClusterError(f"{error}; {run.url} is written, submit it again to begin it") from error
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return str(os.getuid())
