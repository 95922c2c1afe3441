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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, DescriptionError, Interrupted, LauncherError
from cluster.run_directory import RunDirectory
from cluster.scheduler import ENDED, Job, Scheduler
from cluster.spec import RayClusterSpec
from cluster.storage import Store
from cluster.store_check import inspect_cluster
from cluster.submissions import Submission, SubmissionReport, UnreadableSubmissionError
from cluster.versions import check_ray_version
from launcher.clusters import PREFIX
from launcher.code import directory_in_code, pack_job
from launcher.description import Description, Difference, parse
from launcher.nodes import check_nodes, fit, own_versions
from launcher.plan import Plan, Tried, try_job
from launcher.progress import Progress
from launcher.runs import (
    changes_of,
    check_unchanged,
    compare,
    find_description,
    git_state,
    left_to_plan,
    one_line,
    placed_at,
    run_directory,
)
from launcher.status import is_driven, read_status
from launcher.user_code import find_code, make_import_paths

_ASK_AGAIN_S = 2.0
_DIGITS = 12
"""Of a digest, in the name of a job and in messages."""
_LONGEST_NAME = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    """How a run stands before it is submitted.

    Attributes:
        stored: Its description; none: there is no such run.
        status: What its last driver wrote; none: it never had one.
        newest: How its newest submission stands; none: it was never submitted.
        submission: What that holds; none: it was never submitted, or that cannot be read.
        changed: What is to change in its description.
        code_sha256: The digest of the code that it has; none: that is no bundle, or there is no such run.
        reached: The step of its newest checkpoint.
    """

    stored: Description | None
    status: Mapping[str, Any] | None
    newest: SubmissionReport | None
    submission: Submission | None
    changed: list[Difference]
    code_sha256: str | None
    reached: int

    @property
    def waits_on(self) -> str | None:
        """The address of the cluster of its newest submission, if that waits for a driver there."""
        is_waiting = self.newest is not None and self.newest.state == "waiting"
        return self.submission.cluster if is_waiting and self.submission is not None else None


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Code:
    """The user's code that a job takes along; the attributes are those of ``Submission``, but for one.

    Attributes:
        data: The bundle; none: the run directory has it.
    """

    sha256: str
    directory: str | None
    working_directory: str | None
    git: Mapping[str, str | None] | None
    data: bytes | None = None


def submit(
    description: Description, folder: Path, scheduler: Scheduler, place: RayClusterSpec, display: Progress
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
        ClusterError: The cluster is not fit for it, or does not begin the job.
        Interrupted: By Ctrl-C, when the job may have begun.
        LauncherError: Else; nothing has begun, unless the message says that a job may have.
    """

    def pack(modules: Collection[str]) -> _Code:
        bundle = pack_job(folder, modules)
        return _Code(
            sha256=bundle.sha256,
            directory=directory_in_code(folder),
            working_directory=os.getcwd(),
            git=git_state(),
            data=bundle.data,
        )

    run = run_directory(description)
    with _named_in_errors(run, place):
        return _submit(run, description, make_import_paths(folder), pack, scheduler, place, display)


def submit_again(
    run: RunDirectory, overrides: Sequence[str], scheduler: Scheduler, place: RayClusterSpec, display: Progress
) -> dict[str, Any]:
    """Hands a run over to a cluster, any one, from its directory alone: with the code that it was submitted with.

    Changes the working directory of this process.

    Args:
        run: It was submitted before, to this cluster or another one.
        overrides: What to change in its description.
        scheduler: Begins a command on the cluster.
        place: The description of the cluster.
        display: Shows what is done.

    Returns:
        As ``submit``.

    Raises:
        DescriptionError: It cannot go on with these changes; or it was begun in place, so that its code is not there.
        ClusterError: The cluster is not fit for it, or does not begin the job.
        Interrupted: By Ctrl-C, when the job may have begun.
        LauncherError: Else; nothing has begun, unless the message says that a job may have.
    """
    with _named_in_errors(run, place):
        found = find_description(run)
        wanted = found.continued(overrides, max(run.checkpoints.steps(), default=0))
        code = find_code(run, found.submission_id)
        if code.sha256 is None:
            raise DescriptionError(
                f"{run.url}: was begun by launcher run, so that its directory does not hold the user's code; launcher "
                "submit its job file, which goes on with it"
            )
        packed = _Code(
            sha256=code.sha256, directory=code.directory, working_directory=code.submitted_from, git=code.git
        )
        return _submit(run, wanted, code.import_paths, lambda _: packed, scheduler, place, display)


@contextmanager
def _named_in_errors(run: RunDirectory, place: RayClusterSpec) -> Iterator[None]:
    """Within it, an error knows which run was to be submitted and where to, for ``--json``."""
    try:
        yield
    except LauncherError as error:
        error.document = {"run": run.url, "job": None, "cluster": place.address} | (error.document or {})
        raise


def _submit(
    run: RunDirectory,
    description: Description,
    import_paths: tuple[str, ...],
    pack: Callable[[Collection[str]], _Code],
    scheduler: Scheduler,
    place: RayClusterSpec,
    display: Progress,
) -> dict[str, Any]:
    """See ``submit``.

    Args:
        run: Which may not exist yet.
        description: What to run.
        import_paths: Where the user's modules are on this machine.
        pack: Told which of them the job has imported; returns the code that it takes along.
        scheduler: Begins a command on the cluster.
        place: The description of the cluster.
        display: Shows what is done.
    """
    check_ray_version()  # the nodes have the same, as they are asked below
    before = _snapshot(run, description)
    if before.newest is not None and before.submission is None:
        display.warn(f"{run.url}: submission {before.newest.id} cannot be read, and is passed over")
    following = _what_is_next(run, before, scheduler, place)
    if following.why_not:
        return _leave_alone(run, before, place, following, display)
    if before.waits_on not in (None, place.address):
        display.warn(f"{run.url} waits on {before.waits_on}, too; the job that begins first has it, the other one ends")
    display.phase("trying the job out")
    to_plan, store, tried = _try_here(run, before, description, import_paths)
    code = pack(tried.modules)
    display.phase(f"inspecting the nodes of {place.address}")
    plan = _fit_there(to_plan, store, tried, scheduler, place, display)
    if before.status is not None and before.reached >= plan.end_step < plan.total_steps:
        reached = f"{run.url} has reached train.max_steps={plan.end_step}; raise it to go on"
        return _leave_alone(run, before, place, replace(following, why_not=reached), display)
    now = _snapshot(run, description)  # again: somebody may have submitted another run by this name
    for change in now.changed:
        display.message(f"changed {change}")
    if now.code_sha256 not in (None, code.sha256):
        display.message(f"changed code: {now.code_sha256[:_DIGITS]} -> {code.sha256[:_DIGITS]}")
    submission = Submission(
        number=following.number,
        job=_job_id(run, before, following.number),
        cluster=place.address,
        description=description.text,
        code_sha256=code.sha256,
        code_directory=code.directory,
        working_directory=code.working_directory,
        user=_user(),
        host=socket.gethostname(),
        time=round(time.time(), 3),
        versions=own_versions(),
        git=code.git,
        claimed=None if now.status is None else now.status.get("claimed"),
    )
    if code.data is not None:
        run.write_code(code.sha256, code.data)
    place = replace(place, worker=place.worker.keeping(description.of_cluster))  # the job has the rest in its text
    try:
        return _hand_over(run, submission, one_line(description.spec, plan), scheduler, place, display)
    except KeyboardInterrupt as interrupt:
        error = Interrupted(
            f"interrupted while a job of {run.url} was begun, which may run now; stop it with `launcher stop "
            f"{shlex.quote(run.url)} --cluster {shlex.quote(place.address)}`"
        )
        error.document = {"job": submission.job}
        raise error from interrupt


def plan_there(
    description: Description, folder: Path, scheduler: Scheduler, place: RayClusterSpec, display: Progress
) -> Plan:
    """Checks and decides all that ``submit`` does, and hands nothing over.

    Raises:
        DescriptionError: The description cannot run as written.
        ClusterError: The cluster is not fit for it.
    """
    check_ray_version()
    display.phase("trying the job out")
    store, tried = try_job(description, make_import_paths(folder))
    pack_job(folder, tried.modules)
    display.phase(f"inspecting the nodes of {place.address}")
    return _fit_there(description, store, tried, scheduler, place, display)


def make_job_id(run_url: str, number: int) -> str:
    """What a run is called on a cluster when it is begun for the ``number``-th time, from 0.

    The same everywhere for one spelling of the URL, so that of two who submit a new run at once one job begins.
    """
    name = re.sub("[^A-Za-z0-9_-]", "-", run_url.rstrip("/").rpartition("/")[2])[:_LONGEST_NAME]
    return f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:_DIGITS]}-{number}"


def make_command(run_url: str, submission_id: str, place: RayClusterSpec) -> str:
    """What takes up a submission, as a line for the shell of a host of the cluster; Ray names the cluster there.

    The same command again goes on with the run.
    """
    changes = "".join(f" {shlex.quote(f'{PREFIX}{change}')}" for change in place.driver_overrides())
    resume = f"exec launcher resume {shlex.quote(run_url)} --submission {submission_id} --json"
    return f'{resume} --cluster "$RAY_ADDRESS"{changes}'


# --- How the run stands ---


def _snapshot(run: RunDirectory, wanted: Description) -> _Snapshot:
    """Raises DescriptionError if the run is another than the one that is wanted."""
    try:
        newest, submission = run.submissions.read_newest() or (None, None)
    except UnreadableSubmissionError:  # its name has the number, and the next one takes its place
        newest, submission = run.submissions.newest(), None
    stored, changed, code = None, list[Difference](), None
    if run.exists():
        stored = parse(run.read_job(), f"{run.url}/job.yaml")
        changed, _ = compare(run, stored, wanted)
        code = run.read_environment().get("code")
    elif submission is not None:  # nothing was trained: it may become another
        changed = changes_of(submission.description, wanted)
        code = submission.code_sha256
    return _Snapshot(
        stored=stored,
        status=run.read_status(),
        newest=newest,
        submission=submission,
        changed=changed,
        code_sha256=code,
        reached=max(run.checkpoints.steps(), default=0),
    )


def _what_is_next(run: RunDirectory, before: _Snapshot, scheduler: Scheduler, place: RayClusterSpec) -> _Next:
    """What a submission of a run has to do.

    A job that the cluster does not know, though it was submitted there, is begun now by the same name: whoever
    submitted it may not have come that far, or just be about to. The cluster may know jobs that the run directory does
    not, if that was deleted: the number of a job that has ended is not used again.

    Raises:
        ClusterError: The cluster does not answer; or a job of the run lives there, and the run directory was deleted.
    """
    status, stop = before.status, f"stop it with `launcher stop {shlex.quote(run.url)}`"
    if status is not None and status["status"] == "completed":
        return _Next(number=0, why_not=f"{run.url} is complete; nothing to do (another name starts another run)")
    newest = before.newest
    number = 0 if newest is None else newest.number
    while True:
        job = scheduler.read(_job_id(run, before, number))
        if job is None and (newest is None or number > newest.number or before.waits_on == place.address):
            break
        if job is not None and job.status not in ENDED:
            if run.submissions.newest() is None:
                raise ClusterError(
                    f"{place.address}: job {job.id} is {job.status}, and {run.url} holds no submission any more; stop "
                    "that job on the cluster, and submit the run again"
                )
            why = f"{run.url} is there already, job {job.id} is {job.status}; {stop}"
            return _Next(number=number, job_id=job.id, why_not=why)
        number += 1
    if status is not None and status["status"] == "running" and is_driven(run, dict(status)):
        why = f"{run.url}: process {status['pid']} on {status['host']} is running it; {stop}"
        return _Next(number=number, why_not=why)
    return _Next(number=number)


def _job_id(run: RunDirectory, before: _Snapshot, number: int) -> str:
    """What a run is called on a cluster, as in its newest submission: a URL can be spelled in several ways."""
    return make_job_id(run.url, number) if before.submission is None else _numbered(before.submission, number)


def _numbered(submission: Submission, number: int) -> str:
    """What the job of a submission would be called if it had another number."""
    return f"{submission.job.rpartition('-')[0]}-{number}"


def _leave_alone(
    run: RunDirectory, before: _Snapshot, place: RayClusterSpec, following: _Next, display: Progress
) -> dict[str, Any]:
    """A run for which no job is begun, told of."""
    display.message(following.why_not)
    for change in before.changed:
        display.warn(f"not changed: {change}")
    return _result(run, following.job_id, place)


def _result(run: RunDirectory, job_id: str | None, place: RayClusterSpec) -> dict[str, Any]:
    return {"run": run.url, "job": job_id, "cluster": place.address, "status": read_status(run)["status"]}


# --- The steps ---


def _try_here(
    run: RunDirectory, before: _Snapshot, description: Description, import_paths: tuple[str, ...]
) -> tuple[Description, Store, Tried]:
    """What is left to plan, its store, and what trying it out on this machine told."""
    is_in_place = before.stored is None or description.spec.store == before.stored.spec.store
    to_plan = placed_at(run, description) if is_in_place else description
    if before.stored is not None:
        to_plan = left_to_plan(run, to_plan, before.reached)
    store, tried = try_job(to_plan, import_paths)
    if before.stored is not None:
        check_unchanged(run, description, tried)
    return to_plan, store, tried


def _fit_there(
    description: Description, store: Store, tried: Tried, scheduler: Scheduler, place: RayClusterSpec, display: Progress
) -> Plan:
    """The plan on the cluster, whose nodes are fit for it."""
    # What every node must have set: what the cluster's description says, and what the job takes. A variable with a
    # default is asked for if it is set here: without it, the nodes would train with another value than is planned.
    variables = tuple(dict.fromkeys([*place.env, *description.variables()]))
    report = inspect_cluster(scheduler, store, variables)
    report = replace(report, capacity=report.capacity.declared(place.node_groups))
    check_nodes(report, description.spec, place.address, own_versions(), display.warn)
    plan = fit(description, store, tried, report.capacity, place.address)
    if plan.why_cpu:
        display.warn(plan.why_cpu)
    if plan.why_wait:
        display.message(plan.why_wait)
    return plan


def _hand_over(
    run: RunDirectory, submission: Submission, what: str, scheduler: Scheduler, place: RayClusterSpec, display: Progress
) -> dict[str, Any]:
    """Writes a submission and begins its job, unless somebody else does at the same time; ``what`` it is, in a line."""
    while True:
        submission_id = run.submissions.write(submission)  # the run itself stays as it is
        display.phase(f"beginning {submission.job}")
        job = _begin(run, scheduler, submission, submission_id, place)
        if job.metadata.get("submission") == submission_id:
            display.message(f"submitted {what}")
            break
        run.submissions.withdraw(submission_id)
        if job.status not in ENDED:
            display.message(f"{run.url} was submitted by somebody else at the same time, as job {submission.job}")
            break
        number = submission.number + 1
        submission = replace(submission, number=number, job=_numbered(submission, number))
    return _result(run, submission.job, place)


def _begin(
    run: RunDirectory, scheduler: Scheduler, submission: Submission, submission_id: str, place: RayClusterSpec
) -> Job:
    """Begins the job, unless somebody else has; returns the one that is there.

    Raises:
        ClusterError: It may not have begun. If the cluster answers that it has not, the submission is withdrawn, so
            that a job which comes late ends.
    """
    command = make_command(run.url, submission_id, place)
    metadata = {"run": run.url, "submission": submission_id, "user": submission.user, "host": submission.host}
    begin = partial(scheduler.begin, submission.job, command, {}, stop_grace_s=place.stop_grace_s, metadata=metadata)
    try:
        return begin()
    except ClusterError:  # perhaps only the answer was lost
        time.sleep(_ASK_AGAIN_S)
    try:
        return begin()
    except ClusterError as error:
        if _knows_no(scheduler, submission.job):
            run.submissions.withdraw(submission_id)
            raise ClusterError(f"{error}; no job has begun, submit the run again") from error
        unsure = ClusterError(f"{error}; job {submission.job} may have begun, submit the run again to see")
        unsure.document = {"job": submission.job}
        raise unsure from error


def _knows_no(scheduler: Scheduler, job_id: str) -> bool:
    """Whether a cluster answers that it has no such job."""
    try:
        return scheduler.read(job_id) is None
    except ClusterError:
        return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return str(os.getuid())
