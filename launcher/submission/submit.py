"""Submit a run: check it here and on the cluster, then write its submission, which a cluster job takes.

The job is ``launcher resume RUN_URL``, so nothing but a run directory is submitted. A submission that is refused is
refused before anything is written. The job is started first and waits on standby (``launcher.submission.standby``), so
that it is ready when the checks are done.

Several people may submit the same run at the same time. A job's name follows from the run's URL and the number of
earlier jobs, the cluster starts one job per name, and each job takes only the submission that it was started for. The
first submission that is written wins; the others see it and withdraw.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import DescriptionError, LauncherError
from cluster.inspection.store import inspect_cluster, open_check
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission
from cluster.scheduler import ClusterReport, Scheduler
from cluster.spec.kinds import JobsClusterSpec
from cluster.storage.store import Store
from cluster.versions import check_ray_version
from launcher.code.packing import directory_in_code, pack_job
from launcher.code.user_code import find_code, make_import_paths
from launcher.config.description import Description
from launcher.display.progress import Progress
from launcher.planning.nodes import check_nodes, fit, own_versions
from launcher.planning.plan import DryRunResult, Plan, modules_for, try_job
from launcher.planning.store_check import checked_store
from launcher.runs.begin import one_line, run_directory
from launcher.runs.environment import git_state
from launcher.runs.found_description import find_description
from launcher.runs.resumed_plan import check_unchanged, left_to_plan, placed_at
from launcher.submission.handover import HandOver, OvertakenError, Standby
from launcher.submission.job_command import submitter
from launcher.submission.next_job import NextJob, find_next_job
from launcher.submission.run_snapshot import RunSnapshot, take_snapshot
from launcher.watching.status import read_status

_DIGITS = 12
"""Digits of a digest in messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PackedCode:
    """The code bundle of a submission; the attributes are those of ``Submission``, and ``data``.

    Attributes:
        data: The bytes of the bundle; None: the run directory holds it already.
    """

    sha256: str
    directory: str | None
    working_directory: str | None
    git: Mapping[str, str | None] | None
    data: bytes | None = None


def submit(
    description: Description, folder: Path, scheduler: Scheduler, place: JobsClusterSpec, display: Progress
) -> dict[str, Any]:
    """Hand a run over to a cluster, unless a job of it is there already or the run is complete.

    Args:
        description: The job.
        folder: The folder of the job file.
        scheduler: The Jobs API of the cluster.
        place: The description of the cluster.
        display: Shows progress.

    Returns:
        ``run``, the URL; ``job``, its name on the cluster, None if no job was started; ``cluster``; ``status``.

    Raises:
        DescriptionError: The description cannot run as written, or the run exists with another one.
        ClusterError: The cluster is not fit for the run, or does not start the job.
        Interrupted: Ctrl-C was pressed when the job may have started.
        LauncherError: Another error; nothing has started, unless the message says that a job may have.
    """

    def pack(modules: Collection[str]) -> _PackedCode:
        bundle = pack_job(folder, modules)
        return _PackedCode(
            sha256=bundle.sha256,
            directory=directory_in_code(folder),
            working_directory=os.getcwd(),
            git=git_state(),
            data=bundle.data,
        )

    run = run_directory(description)
    with _named_in_errors(run, place):
        return _Submitting(
            run=run,
            description=description,
            import_paths=make_import_paths(folder),
            pack=pack,
            scheduler=scheduler,
            place=place,
            display=display,
        ).submit()


def submit_again(
    run: RunDirectory, overrides: Sequence[str], scheduler: Scheduler, place: JobsClusterSpec, display: Progress
) -> dict[str, Any]:
    """Hand a run over to any cluster, given its directory alone, with the code that it was submitted with.

    Changes the working directory of this process.

    Args:
        run: A run that was submitted before, to this cluster or another one.
        overrides: Changes of its description, ``key=value``.
        scheduler: The Jobs API of the cluster.
        place: The description of the cluster.
        display: Shows progress.

    Returns:
        The same as ``submit``.

    Raises:
        DescriptionError: The run cannot go on with these changes; or it was begun by ``launcher run``, so that its
            directory does not hold its code.
        ClusterError: The cluster is not fit for the run, or does not start the job.
        Interrupted: Ctrl-C was pressed when the job may have started.
        LauncherError: Another error; nothing has started, unless the message says that a job may have.
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
        packed = _PackedCode(
            sha256=code.sha256, directory=code.directory, working_directory=code.submitted_from, git=code.git
        )
        return _Submitting(
            run=run,
            description=wanted,
            import_paths=code.import_paths,
            pack=lambda _: packed,
            scheduler=scheduler,
            place=place,
            display=display,
        ).submit()


def plan_there(
    description: Description, folder: Path, scheduler: Scheduler, place: JobsClusterSpec, display: Progress
) -> Plan:
    """Make all checks of ``submit`` and return the plan, without handing the run over.

    Raises:
        DescriptionError: The description cannot run as written.
        ClusterError: The cluster is not fit for the run.
    """
    check_ray_version()
    store = checked_store(description)
    display.phase("trying the job out")
    tried = try_job(description, make_import_paths(folder), display.phase)
    pack_job(folder, tried.modules)
    display.phase(f"inspecting the nodes of {place.address}")
    report = inspect_cluster(scheduler, store, _variables(description, place))
    return _fit_there(description, store, tried, report, place, display)


@contextmanager
def _named_in_errors(run: RunDirectory, place: JobsClusterSpec) -> Iterator[None]:
    """Add run and cluster to the ``--json`` document of errors raised in the block."""
    try:
        yield
    except LauncherError as error:
        error.document = {"run": run.url, "job": None, "cluster": place.address} | (error.document or {})
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class _Submitting:
    """One call of ``submit`` or ``submit_again``.

    Attributes:
        run: The run, which may not exist yet.
        description: The description to submit.
        import_paths: Where the user's modules are on this machine.
        pack: Takes the names of the user's modules that the dry run imported; returns the code bundle.
        scheduler: The Jobs API of the cluster.
        place: The description of the cluster.
        display: Shows progress.
    """

    run: RunDirectory
    description: Description
    import_paths: tuple[str, ...]
    pack: Callable[[Collection[str]], _PackedCode]
    scheduler: Scheduler
    place: JobsClusterSpec
    display: Progress

    def submit(self) -> dict[str, Any]:
        """Check and hand over; return the document of ``submit``."""
        check_ray_version()  # the nodes are checked below to have the same
        run, place, display = self.run, self.place, self.display
        before = take_snapshot(run, self.description)
        if before.newest is not None and before.submission is None:
            display.warn(f"{run.url}: submission {before.newest.id} cannot be read, and is passed over")
        following = find_next_job(run, before, self.scheduler, place)
        if following.why_not:
            return self._leave_alone(before, following)
        if before.waits_on not in (None, place.address):
            display.warn(
                f"{run.url} waits on {before.waits_on}, too; the job that begins first has it, the other one ends"
            )
        try:
            return self._check_and_hand_over(before, following)
        except OvertakenError as overtaken:
            display.message(str(overtaken))
            return self._result(overtaken.job_id)

    def _check_and_hand_over(self, before: RunSnapshot, following: NextJob) -> dict[str, Any]:
        """Start a job on standby, make all checks meanwhile, then write the submission for that job.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile.
            LauncherError: A check failed, or the cluster does not start the job.
        """
        to_plan = self._left_to_plan(before)
        store = checked_store(to_plan)
        # The job's own worker settings travel in its description.
        worker = self.place.worker.keeping(self.description.of_cluster)
        hand_over = HandOver(
            self.run, before.known, self.scheduler, replace(self.place, worker=worker), self.display.phase
        )
        with ExitStack() as checking:
            check = checking.enter_context(open_check(store))
            needs = check.needs(_variables(to_plan, self.place), modules_for(to_plan.spec))
            with hand_over.standby(before.job_id(0), following.number, needs) as standby:
                tried, code = self._try_out(before, to_plan)
                self.display.phase(f"inspecting the nodes of {self.place.address}")
                report = check.completed(self.scheduler.report(standby.job_id))
                checking.close()
                plan = _fit_there(to_plan, store, tried, report, self.place, self.display)
                if before.status is not None and before.reached >= plan.end_step < plan.total_steps:
                    reached = f"{self.run.url} has reached train.max_steps={plan.end_step}; raise it to go on"
                    return self._leave_alone(before, replace(following, why_not=reached))
                return self._hand_over(hand_over, standby, code, plan)

    def _left_to_plan(self, before: RunSnapshot) -> Description:
        """Return the description that is left to plan for the run, which may have begun."""
        is_in_place = before.stored is None or self.description.spec.store == before.stored.spec.store
        to_plan = placed_at(self.run, self.description) if is_in_place else self.description
        return to_plan if before.stored is None else left_to_plan(self.run, to_plan, before.reached)

    def _try_out(self, before: RunSnapshot, to_plan: Description) -> tuple[DryRunResult, _PackedCode]:
        """Make the dry run on this machine, and pack the code that it imported.

        Raises:
            DescriptionError: The description cannot run as written; or the data of the run have changed.
        """
        self.display.phase("trying the job out")
        tried = try_job(to_plan, self.import_paths, self.display.phase)
        if before.stored is not None:
            check_unchanged(self.run, self.description, tried)
        return tried, self.pack(tried.modules)

    def _hand_over(self, hand_over: HandOver, standby: Standby, code: _PackedCode, plan: Plan) -> dict[str, Any]:
        """Write code and submission for the job on standby; return the document of ``submit``.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile.
            Interrupted, LauncherError: A job may have started, if the message says so.
        """
        now = take_snapshot(self.run, self.description)  # again: somebody may have submitted another run by this name
        for change in now.changed:
            self.display.message(f"changed {change}")
        if now.code_sha256 not in (None, code.sha256):
            self.display.message(f"changed code: {now.code_sha256[:_DIGITS]} -> {code.sha256[:_DIGITS]}")
        if code.data is not None:
            self.run.write_code(code.sha256, code.data)
        job_id = hand_over.submit(self._submission(standby, code, now), standby)
        with hand_over.may_run(job_id):
            self.display.message(f"submitted {one_line(self.description.spec, plan)}")
            return self._result(job_id)

    def _submission(self, standby: Standby, code: _PackedCode, now: RunSnapshot) -> Submission:
        """Return the submission for the job on standby."""
        return Submission(
            number=standby.number,
            job=standby.job_id,
            cluster=self.place.address,
            description=self.description.text,
            code_sha256=code.sha256,
            code_directory=code.directory,
            working_directory=code.working_directory,
            **submitter(),
            time=round(time.time(), 3),
            versions=own_versions(),
            git=code.git,
            claimed=None if now.status is None else now.status.get("claimed"),
        )

    def _leave_alone(self, before: RunSnapshot, following: NextJob) -> dict[str, Any]:
        """Say why no job is started, and which changes are not made; return the document of ``submit``."""
        self.display.message(following.why_not)
        for change in before.changed:
            self.display.warn(f"not changed: {change}")
        return self._result(following.job_id)

    def _result(self, job_id: str | None) -> dict[str, Any]:
        status = read_status(self.run)["status"]
        return {"run": self.run.url, "job": job_id, "cluster": self.place.address, "status": status}


def _variables(description: Description, place: JobsClusterSpec) -> tuple[str, ...]:
    """Return the environment variables that every node must have: those of the cluster's description and of the job.

    A variable with a default counts if it is set here: without it, the nodes would train with another value than was
    planned.
    """
    return tuple(dict.fromkeys([*place.env, *description.variables()]))


def _fit_there(
    description: Description,
    store: Store,
    tried: DryRunResult,
    report: ClusterReport,
    place: JobsClusterSpec,
    display: Progress,
) -> Plan:
    """Return the plan on the cluster, after checking that its nodes are fit for it.

    Raises:
        ClusterError: The nodes lack what the run needs, or can never hold its workers.
    """
    report = replace(report, capacity=report.capacity.declared(place.node_groups))
    check_nodes(report, description.spec, place.address, own_versions(), display.warn)
    plan = fit(description, store, tried, report.capacity, place.address)
    if plan.why_cpu:
        display.warn(plan.why_cpu)
    if plan.why_wait:
        display.message(plan.why_wait)
    return plan
