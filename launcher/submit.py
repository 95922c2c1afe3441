"""Submitting a run: it is checked here and on the cluster, then its directory is written, then a job begins.

The job is ``launcher resume RUN_URL``, so what is submitted is a run directory and nothing else. What is refused is
refused before the first object is written. Many may submit the same run at once: the name of its job follows from the
run's URL and from how often it was begun, the cluster begins a job of one name once, and its driver takes the
submission of whoever began it.
"""

import getpass
import hashlib
import os
import re
import shlex
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cluster.bundle import Bundle
from cluster.errors import ClusterError
from cluster.run_directory import RunDirectory
from cluster.scheduler import ENDED, Scheduler
from cluster.storage import Store
from cluster.store_check import inspect_cluster
from cluster.submissions import Submission, SubmissionReport
from cluster.versions import check_ray_version
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
        submission: The newest one; none: it was never submitted.
        changed: What is to change in its description.
        reached: The step of its newest checkpoint.
    """

    stored: Description | None
    status: Mapping[str, Any] | None
    submission: SubmissionReport | None
    changed: list[Difference]
    reached: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Next:
    """What is next for a run.

    Attributes:
        number: How many jobs of it were begun before.
        job_id: Of the job that is there already; none: there is none.
        why_not: Why none is to be begun now; empty: one is.
    """

    number: int
    job_id: str | None = None
    why_not: str = ""


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
    check_ray_version()  # the nodes have the same, as they are asked below
    run = run_directory(description)
    standing = _look_at(run, description)
    following = _what_is_next(run, standing, scheduler)
    if following.why_not:
        return _left_alone(run, standing, place, following, display)
    display.phase("trying the job out")
    to_plan, store, tried = _try_here(run, standing, description, folder)
    bundle = pack_job(folder, tried.modules)
    display.phase(f"inspecting the nodes of {place.address}")
    plan = _fit_there(to_plan, store, tried, scheduler, place, display)
    if standing.status is not None and standing.reached >= plan.end_step < plan.total_steps:
        reached = f"{run.url} has reached train.max_steps={plan.end_step}; raise it to go on"
        return _left_alone(run, standing, place, replace(following, why_not=reached), display)
    for change in _look_at(run, description).changed:  # again: somebody may have submitted another run by this name
        display.message(f"changed {change}")
    submission = Submission(
        number=following.number,
        job=make_job_id(run.url, following.number),
        cluster=place.address,
        description=description.text,
        code_sha256=bundle.sha256,
        code_directory=directory_in_code(folder),
        working_directory=os.getcwd(),
        user=_user(),
        host=socket.gethostname(),
        time=round(time.time(), 3),
        versions=own_versions(),
        git=git_state(),
    )
    submission_id = _write(run, submission, bundle)
    display.phase(f"beginning {submission.job}")
    if _begin(run, scheduler, submission, submission_id, place.stop_grace_s):
        display.message(f"submitted {one_line(description.spec, plan)}")
    else:
        run.submissions.withdraw(submission_id)
        display.message(f"{run.url} was submitted by somebody else at the same time, as job {submission.job}")
    return _result(run, submission.job, place)


def make_job_id(run_url: str, number: int) -> str:
    """What a run is called on a cluster when it is begun for the ``number``-th time, from 0; the same everywhere."""
    name = re.sub("[^A-Za-z0-9_-]", "-", run_url.rstrip("/").rpartition("/")[2])[:_LONGEST_NAME]
    return f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:_DIGITS]}-{number}"


def make_command(run_url: str, submission_id: str) -> str:
    """What takes up a submission, as a line for the shell of a host of the cluster; Ray names the cluster there.

    The same command again goes on with the run.
    """
    return f'exec launcher resume {shlex.quote(run_url)} --submission {submission_id} --json --cluster "$RAY_ADDRESS"'


# --- How the run stands ---


def _look_at(run: RunDirectory, wanted: Description) -> _Standing:
    """Raises DescriptionError if the run is another than the one that is wanted."""
    newest = run.submissions.newest()
    if not run.exists():
        return _Standing(stored=None, status=None, submission=newest, changed=[], reached=0)
    stored = parse(run.read_job(), f"{run.url}/job.yaml")
    changed, _ = compare(run, stored, wanted)
    return _Standing(
        stored=stored,
        status=run.read_status(),
        submission=newest,
        changed=changed,
        reached=max(run.checkpoints.steps(), default=0),
    )


def _what_is_next(run: RunDirectory, standing: _Standing, scheduler: Scheduler) -> _Next:
    """What a submission of a run has to do.

    A job that the cluster does not know, though it was submitted, is begun now by the same name: whoever submitted it
    may not have come that far, or just be about to.
    """
    status, stop = standing.status, f"stop it with `launcher stop {shlex.quote(run.url)}`"
    if status is not None and status["status"] == "completed":
        return _Next(number=0, why_not=f"{run.url} is complete; nothing to do (another name starts another run)")
    number, newest = 0, standing.submission
    while newest is not None:
        number = max(number, newest.number)
        job = scheduler.read(make_job_id(run.url, number))
        if job is None and (number > newest.number or newest.state == "waiting"):
            break
        if job is not None and job.status not in ENDED:
            why = f"{run.url} is there already, job {job.id} is {job.status}; {stop}"
            return _Next(number=number, job_id=job.id, why_not=why)
        number += 1
    if status is not None and status["status"] == "running" and is_driven(run, dict(status)):
        why = f"{run.url}: process {status['pid']} on {status['host']} is running it; {stop}"
        return _Next(number=number, why_not=why)
    return _Next(number=number)


def _left_alone(
    run: RunDirectory, standing: _Standing, place: Place, following: _Next, display: Progress
) -> dict[str, Any]:
    """A run for which no job is begun, told of."""
    display.message(following.why_not)
    for change in standing.changed:
        display.warn(f"not changed: {change}")
    return _result(run, following.job_id, place)


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


def _write(run: RunDirectory, submission: Submission, bundle: Bundle) -> str:
    """Writes what a driver needs; returns the id of the submission. A run that exists stays as it is."""
    run.write_code(bundle.sha256, bundle.data)
    submission_id = run.submissions.write(submission)
    if not run.exists():  # with this it does, and is submitted
        run.write_job(submission.description)
    return submission_id


def _begin(
    run: RunDirectory, scheduler: Scheduler, submission: Submission, submission_id: str, stop_grace_s: int
) -> bool:
    """Begins the job; returns whether it is for this submission, and not for one of somebody else.

    Raises:
        ClusterError: It may not have begun.
    """
    try:
        return _is_begun(run, scheduler, submission, submission_id, stop_grace_s)
    except ClusterError:  # perhaps only the answer was lost
        time.sleep(_ASK_AGAIN_S)
    try:
        return _is_begun(run, scheduler, submission, submission_id, stop_grace_s)
    except ClusterError as error:
        raise ClusterError(f"{error}; job {submission.job} may have begun, submit the run again to see") from error


def _is_begun(
    run: RunDirectory, scheduler: Scheduler, submission: Submission, submission_id: str, stop_grace_s: int
) -> bool:
    metadata = {"run": run.url, "submission": submission_id, "user": submission.user, "host": submission.host}
    command = make_command(run.url, submission_id)
    if scheduler.begin(submission.job, command, {}, stop_grace_s=stop_grace_s, metadata=metadata):
        return True
    job = scheduler.read(submission.job)
    return job is not None and job.metadata.get("submission") == submission_id


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return str(os.getuid())
