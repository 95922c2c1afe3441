"""Submitting a run: it is checked here and on the cluster, then its submission is written, which its job takes up.

The job is ``launcher resume RUN_URL``, so what is submitted is a run directory and nothing else. What is refused is
refused before the first object is written. The job is begun first and stands by, see ``launcher.submission.standby``,
so that it is ready when all is checked. Many may submit the same run at once: the name of a job follows from the run's
URL and from how often it was begun, the cluster begins a job of one name once, and each job takes the submission that
it was begun for. Of several submissions the first that is written has the run, and the others find that out.
"""

import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, DescriptionError, LauncherError
from cluster.inspection.store import inspect_cluster, open_check
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, SubmissionReport, UnreadableSubmissionError
from cluster.scheduler import ENDED, ClusterReport, Job, Scheduler
from cluster.spec import RayClusterSpec
from cluster.storage.store import Store
from cluster.versions import check_ray_version
from launcher.code.packing import directory_in_code, pack_job
from launcher.code.user_code import find_code, make_import_paths
from launcher.config.description import Description, Difference, parse
from launcher.display.progress import Progress
from launcher.planning.nodes import check_nodes, fit, own_versions
from launcher.planning.plan import DryRunResult, Plan, checked_store, modules_for, try_job
from launcher.runs.begin import one_line, run_directory
from launcher.runs.changes import changes_of, compare
from launcher.runs.environment import git_state
from launcher.runs.found_description import find_description
from launcher.runs.resumed_plan import check_unchanged, left_to_plan, placed_at
from launcher.submission.handover import STANDBY, HandOver, OvertakenError, Standby, make_job_id, numbered, submitter
from launcher.submission.standby import WAIT_S
from launcher.watching.status import is_driven, read_status

_DIGITS = 12
"""Of a digest, in messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _RunSnapshot:
    """How a run stands before it is submitted.

    Attributes:
        stored: Its description; none: there is no such run.
        status: What its last driver wrote; none: it never had one.
        known: The ids of its submissions.
        newest: How its newest submission stands; none: it was never submitted.
        submission: What that holds; none: it was never submitted, or that cannot be read.
        changed: What is to change in its description.
        code_sha256: The digest of the code that it has; none: that is no bundle, or there is no such run.
        reached: The step of its newest checkpoint.
    """

    stored: Description | None
    status: Mapping[str, Any] | None
    known: frozenset[str]
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
    to_plan = _left_to_plan(run, before, description)
    store = checked_store(to_plan)
    place = replace(place, worker=place.worker.keeping(description.of_cluster))  # the job has the rest in its text
    hand_over = HandOver(run, before.known, scheduler, place, display.phase)
    try:
        with ExitStack() as checking:
            check = checking.enter_context(open_check(store))
            needs = check.needs(_variables(to_plan, place), modules_for(to_plan.spec))
            with hand_over.standby(_job_id(run, before, 0), following.number, needs) as standby:
                display.phase("trying the job out")
                tried = try_job(to_plan, import_paths)
                if before.stored is not None:
                    check_unchanged(run, description, tried)
                code = pack(tried.modules)
                display.phase(f"inspecting the nodes of {place.address}")
                report = check.completed(scheduler.report(standby.job_id))
                checking.close()
                plan = _fit_there(to_plan, store, tried, report, place, display)
                if before.status is not None and before.reached >= plan.end_step < plan.total_steps:
                    reached = f"{run.url} has reached train.max_steps={plan.end_step}; raise it to go on"
                    return _leave_alone(run, before, place, replace(following, why_not=reached), display)
                now = _snapshot(run, description)  # again: somebody may have submitted another run by this name
                for change in now.changed:
                    display.message(f"changed {change}")
                if now.code_sha256 not in (None, code.sha256):
                    display.message(f"changed code: {now.code_sha256[:_DIGITS]} -> {code.sha256[:_DIGITS]}")
                if code.data is not None:
                    run.write_code(code.sha256, code.data)
                job_id = hand_over.submit(_submission(standby, place, description, code, now), standby)
                with hand_over.may_run(job_id):
                    display.message(f"submitted {one_line(description.spec, plan)}")
                    return _result(run, job_id, place)
    except OvertakenError as overtaken:
        display.message(str(overtaken))
        return _result(run, overtaken.job_id, place)


def plan_there(
    description: Description, folder: Path, scheduler: Scheduler, place: RayClusterSpec, display: Progress
) -> Plan:
    """Checks and decides all that ``submit`` does, and hands nothing over.

    Raises:
        DescriptionError: The description cannot run as written.
        ClusterError: The cluster is not fit for it.
    """
    check_ray_version()
    store = checked_store(description)
    display.phase("trying the job out")
    tried = try_job(description, make_import_paths(folder))
    pack_job(folder, tried.modules)
    display.phase(f"inspecting the nodes of {place.address}")
    report = inspect_cluster(scheduler, store, _variables(description, place))
    return _fit_there(description, store, tried, report, place, display)


# --- How the run stands ---


def _snapshot(run: RunDirectory, wanted: Description) -> _RunSnapshot:
    """Raises DescriptionError if the run is another than the one that is wanted."""
    known = frozenset(report.id for report in run.submissions.reports())
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
    return _RunSnapshot(
        stored=stored,
        status=run.read_status(),
        known=known,
        newest=newest,
        submission=submission,
        changed=changed,
        code_sha256=code,
        reached=max(run.checkpoints.steps(), default=0),
    )


def _what_is_next(run: RunDirectory, before: _RunSnapshot, scheduler: Scheduler, place: RayClusterSpec) -> _Next:
    """What a submission of a run has to do.

    A job that the cluster does not know, though it was submitted there, is begun now by the same name. The cluster may
    know jobs that the run directory does not: one that stands by for somebody who may yet be refused, and those of a
    directory that was deleted. The number of a job is not used again.

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
            reports = run.submissions.reports()
            if _may_stand_by(job) and job.metadata.get("submission") not in {report.id for report in reports}:
                number += 1
                continue
            if not reports:
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


def _may_stand_by(job: Job) -> bool:
    """Whether a job may stand by: it began so, and is young. Twice as long, for its cluster may have another clock."""
    return STANDBY in job.metadata and (job.began_at is None or time.time() - job.began_at < 2 * WAIT_S)


def _job_id(run: RunDirectory, before: _RunSnapshot, number: int) -> str:
    """What a run is called on a cluster, as in its newest submission: a URL can be spelled in several ways."""
    return make_job_id(run.url, number) if before.submission is None else numbered(before.submission.job, number)


def _leave_alone(
    run: RunDirectory, before: _RunSnapshot, place: RayClusterSpec, following: _Next, display: Progress
) -> dict[str, Any]:
    """A run for which no job is begun, told of."""
    display.message(following.why_not)
    for change in before.changed:
        display.warn(f"not changed: {change}")
    return _result(run, following.job_id, place)


def _result(run: RunDirectory, job_id: str | None, place: RayClusterSpec) -> dict[str, Any]:
    return {"run": run.url, "job": job_id, "cluster": place.address, "status": read_status(run)["status"]}


# --- The steps ---


def _left_to_plan(run: RunDirectory, before: _RunSnapshot, description: Description) -> Description:
    """What is left to plan of a run that may have begun."""
    is_in_place = before.stored is None or description.spec.store == before.stored.spec.store
    to_plan = placed_at(run, description) if is_in_place else description
    return to_plan if before.stored is None else left_to_plan(run, to_plan, before.reached)


def _submission(
    standby: Standby, place: RayClusterSpec, description: Description, code: _Code, now: _RunSnapshot
) -> Submission:
    """What the job that stands by is to take."""
    return Submission(
        number=standby.number,
        job=standby.job_id,
        cluster=place.address,
        description=description.text,
        code_sha256=code.sha256,
        code_directory=code.directory,
        working_directory=code.working_directory,
        **submitter(),
        time=round(time.time(), 3),
        versions=own_versions(),
        git=code.git,
        claimed=None if now.status is None else now.status.get("claimed"),
    )


def _variables(description: Description, place: RayClusterSpec) -> tuple[str, ...]:
    """The environment variables that every node must have: those of the cluster's description, and those of the job.

    A variable with a default is asked for if it is set here: without it, the nodes would train with another value than
    is planned.
    """
    return tuple(dict.fromkeys([*place.env, *description.variables()]))


def _fit_there(
    description: Description,
    store: Store,
    tried: DryRunResult,
    report: ClusterReport,
    place: RayClusterSpec,
    display: Progress,
) -> Plan:
    """The plan on the cluster, whose nodes are fit for it."""
    report = replace(report, capacity=report.capacity.declared(place.node_groups))
    check_nodes(report, description.spec, place.address, own_versions(), display.warn)
    plan = fit(description, store, tried, report.capacity, place.address)
    if plan.why_cpu:
        display.warn(plan.why_cpu)
    if plan.why_wait:
        display.message(plan.why_wait)
    return plan
