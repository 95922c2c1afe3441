"""One submission of a run: the checks on this machine and on the cluster, then one of the ways to hand it over."""

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cluster.capacity import Places
from cluster.errors import ClusterError, DescriptionError
from cluster.inspection.store import inspect_cluster, open_check
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission
from cluster.scheduler import ClusterReport, JobRequest, Scheduler
from cluster.spec.kinds import JobsClusterSpec
from cluster.storage.store import Store
from cluster.versions import check_ray_version
from launcher.config.clusters import job_nodes
from launcher.config.description import Description, Difference
from launcher.display.progress import Progress
from launcher.planning.nodes import check_nodes, fit, own_versions
from launcher.planning.placement import places_of
from launcher.planning.plan import DryRunResult, Plan, modules_for, try_job
from launcher.planning.store_check import checked_store
from launcher.runs.begin import one_line
from launcher.runs.resumed_plan import check_unchanged, left_to_plan, placed_at
from launcher.submission.handover import HandOver, OvertakenError
from launcher.submission.job_command import submitter
from launcher.submission.next_job import find_next_job
from launcher.submission.run_snapshot import RunSnapshot, take_snapshot
from launcher.submission.standby_handover import StandbyHandOver
from launcher.watching.requeued import warn_of_next_try
from launcher.watching.status import read_status

_DIGITS = 12
"""Digits of a digest in messages."""

HandOverT = TypeVar("HandOverT", bound=HandOver)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCode:
    """The code bundle of a submission; the attributes are those of ``Submission``, and ``data``.

    Attributes:
        data: The bytes of the bundle; None: the run directory holds it already.
    """

    sha256: str
    directory: str | None
    working_directory: str | None
    git: Mapping[str, str | None] | None
    data: bytes | None = None


class NothingToDoError(ClusterError):
    """No job is to be started for a run.

    Attributes:
        job_id: The job that is already there; None: there is none.
        changed: The changes of the description, which are not made.
    """

    def __init__(self, why: str, job_id: str | None, changed: list[Difference]) -> None:
        super().__init__(why)
        self.job_id, self.changed = job_id, changed


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitting:
    """One submission of a run.

    Attributes:
        run: The run, which may not exist yet.
        description: The description to submit.
        import_paths: Where the user's modules are on this machine.
        pack: Takes the names of the user's modules that the dry run imported; returns the code bundle.
        scheduler: The cluster.
        place: The description of the cluster.
        display: Shows progress.
    """

    run: RunDirectory
    description: Description
    import_paths: tuple[str, ...]
    pack: Callable[[Collection[str]], PackedCode]
    scheduler: Scheduler
    place: JobsClusterSpec
    display: Progress

    def submit(self) -> dict[str, Any]:
        """Check and hand over; return the document of ``launcher.submission.submit.submit``."""
        try:
            before, number = self._find_next()
            if self.scheduler.starts_at_once:
                return self._submit_with_standby(before, number)
            hand_over, submission, plan = self._prepare(before, number)
            return self._submitted(hand_over, hand_over.begin(submission, self._places(plan)), plan)
        except NothingToDoError as nothing:
            self.display.message(str(nothing))
            self._warn_unchanged(nothing)
            return self.result(nothing.job_id)
        except OvertakenError as overtaken:
            self.display.message(str(overtaken))
            return self.result(overtaken.job_id)

    def render(self) -> dict[str, Any]:
        """Check, and write all that a job needs; return the document of ``launcher.submission.submit.render``."""
        with ExitStack() as withdrawal:
            request = self.offer(withdrawal)
            script = self.scheduler.script(request)
            withdrawal.pop_all()
        return self.result(request.id) | {"script": script}

    def offer(self, withdrawal: ExitStack) -> JobRequest:
        """Check, and write all that a job needs, which is yet to be started; return the request for it.

        Args:
            withdrawal: Withdraws that when it is closed.

        Raises:
            DescriptionError: The cluster takes no scripts; or the description cannot run as written.
            NothingToDoError: A job of the run is there already, or the run is complete.
            OvertakenError: Somebody else has submitted the run meanwhile.
            LauncherError: A check failed.
        """
        if self.scheduler.starts_at_once:
            raise DescriptionError(f"{self.place.address}: takes commands, and no scripts; use launcher submit")
        try:
            before, number = self._find_next()
            hand_over, submission, plan = self._prepare(before, number)
        except NothingToDoError as nothing:
            self._warn_unchanged(nothing)
            nothing.document = self.result(nothing.job_id)
            raise
        request = hand_over.offer(submission, self._places(plan))
        withdrawal.callback(self.withdraw, request)
        self.display.message(f"prepared {one_line(self.description.spec, plan)}")
        return request

    def withdraw(self, request: JobRequest) -> None:
        """Withdraw what was offered, so that a job which starts for it all the same ends."""
        self.run.submissions.withdraw(request.metadata["submission"])

    def _find_next(self) -> tuple[RunSnapshot, int]:
        """Return the state of the run, and the number of its next job.

        Raises:
            NothingToDoError: A job of the run is there already, or the run is complete.
            DescriptionError: The run exists with another description.
            ClusterError: The cluster does not answer.
        """
        check_ray_version()  # the nodes are checked to have the same
        run, place, display = self.run, self.place, self.display
        before = take_snapshot(run, self.description)
        if before.newest is not None and before.submission is None:
            display.warn(f"{run.url}: submission {before.newest.id} cannot be read, and is passed over")
        following = find_next_job(run, before, self.scheduler, place)
        if following.why_not:
            raise NothingToDoError(following.why_not, following.job_id, before.changed)
        if before.waits_on not in (None, place.address):
            display.warn(
                f"{run.url} waits on {before.waits_on}, too; the job that begins first has it, the other one ends"
            )
        warn_of_next_try(run, before.status, display.warn, here=place.address)
        return before, following.number

    def _submit_with_standby(self, before: RunSnapshot, number: int) -> dict[str, Any]:
        """Start a job on standby, make all checks meanwhile, then write the submission for that job.

        Raises:
            NothingToDoError: The run has reached its last step.
            OvertakenError: Somebody else has submitted the run meanwhile.
            LauncherError: A check failed, or the cluster does not start the job.
        """
        to_plan = self._left_to_plan(before)
        store, variables = checked_store(to_plan), variables_of(to_plan, self.place)
        hand_over = self._open(StandbyHandOver, before, variables)
        with ExitStack() as checking:
            check = checking.enter_context(open_check(store))
            needs = check.needs(variables, modules_for(to_plan.spec))
            with hand_over.standby(before.job_id(0), number, needs) as standby:
                tried, code = self._try_out(before, to_plan)
                self.display.phase(f"inspecting the nodes of {self.place.address}")
                report = check.completed(self.scheduler.report(standby.job_id))
                checking.close()
                plan = self._fit(before, to_plan, store, tried, report)
                submission = self._write_code(code, standby.number, standby.job_id)
                job_id = hand_over.submit(submission, standby, self._places(plan))
                return self._submitted(hand_over, job_id, plan)

    def _prepare(self, before: RunSnapshot, number: int) -> tuple[HandOver, Submission, Plan]:
        """Make all checks for a job that brings its own nodes, and write its code.

        Raises:
            NothingToDoError: The run has reached its last step.
            LauncherError: A check failed.
        """
        to_plan = self._left_to_plan(before)
        store, variables = checked_store(to_plan), variables_of(to_plan, self.place)
        tried, code = self._try_out(before, to_plan)
        self.display.phase(f"looking at the nodes of {self.place.address}")
        report = inspect_cluster(self.scheduler, store, variables)
        plan = self._fit(before, to_plan, store, tried, report)
        submission = self._write_code(code, number, before.job_id(number))
        return self._open(HandOver, before, variables), submission, plan

    def _open(self, kind: type[HandOverT], before: RunSnapshot, variables: tuple[str, ...]) -> HandOverT:
        """Return the hand-over; the job's own worker settings travel in its description, and not in its command."""
        place = replace(self.place, worker=self.place.worker.keeping(self.description.of_cluster))
        return kind(self.run, before.known, self.scheduler, place, variables, self.display.phase)

    def _left_to_plan(self, before: RunSnapshot) -> Description:
        """Return the description that is left to plan for the run, which may have begun."""
        is_in_place = before.stored is None or self.description.spec.store == before.stored.spec.store
        to_plan = placed_at(self.run, self.description) if is_in_place else self.description
        return to_plan if before.stored is None else left_to_plan(self.run, to_plan, before.reached)

    def _try_out(self, before: RunSnapshot, to_plan: Description) -> tuple[DryRunResult, PackedCode]:
        """Make the dry run on this machine, and pack the code that it imported.

        Raises:
            DescriptionError: The description cannot run as written; or the data of the run have changed.
        """
        self.display.phase("trying the job out")
        tried = try_job(to_plan, self.import_paths, self.display.phase)
        if before.stored is not None:
            check_unchanged(self.run, self.description, tried)
        return tried, self.pack(tried.modules)

    def _fit(
        self, before: RunSnapshot, to_plan: Description, store: Store, tried: DryRunResult, report: ClusterReport
    ) -> Plan:
        """Return the plan on the cluster, of a run that has steps left.

        Raises:
            NothingToDoError: It has none.
            ClusterError: The nodes lack what the run needs, or can never hold its workers.
        """
        plan = fit_there(to_plan, store, tried, report, self.scheduler, self.place, self.display)
        if before.status is not None and before.reached >= plan.end_step < plan.total_steps:
            why = f"{self.run.url} has reached train.max_steps={plan.end_step}; raise it to go on"
            raise NothingToDoError(why, None, before.changed)
        return plan

    def _write_code(self, code: PackedCode, number: int, job_id: str) -> Submission:
        """Write the code bundle, and return the submission for a job, which is yet to be written.

        Raises:
            DescriptionError: Somebody has submitted another run by this name meanwhile.
        """
        now = take_snapshot(self.run, self.description)  # again: somebody may have submitted the run meanwhile
        for change in now.changed:
            self.display.message(f"changed {change}")
        if now.code_sha256 not in (None, code.sha256):
            self.display.message(f"changed code: {now.code_sha256[:_DIGITS]} -> {code.sha256[:_DIGITS]}")
        if code.data is not None:
            self.run.write_code(code.sha256, code.data)
        return Submission(
            number=number,
            job=job_id,
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

    def _places(self, plan: Plan) -> Places:
        return places_of(self.description.spec.workers, plan.gpus)

    def _submitted(self, hand_over: HandOver, job_id: str, plan: Plan) -> dict[str, Any]:
        """Say that a job has started; return the document."""
        with hand_over.may_run(job_id):
            self.display.message(f"submitted {one_line(self.description.spec, plan)}")
            return self.result(job_id)

    def _warn_unchanged(self, nothing: NothingToDoError) -> None:
        for change in nothing.changed:
            self.display.warn(f"not changed: {change}")

    def result(self, job_id: str | None) -> dict[str, Any]:
        """Return the document about the run and its job, if it has one."""
        status = read_status(self.run)["status"]
        return {"run": self.run.url, "job": job_id, "cluster": self.place.address, "status": status}


def variables_of(description: Description, place: JobsClusterSpec) -> tuple[str, ...]:
    """Return the environment variables that every node must have: those of the cluster's description and of the job.

    A variable with a default counts if it is set here: without it, the nodes would train with another value than was
    planned.
    """
    return tuple(dict.fromkeys([*place.env, *description.variables()]))


def fit_there(
    description: Description,
    store: Store,
    tried: DryRunResult,
    report: ClusterReport,
    scheduler: Scheduler,
    place: JobsClusterSpec,
    display: Progress,
) -> Plan:
    """Return the plan on the cluster, after checking that its nodes are fit for it.

    Raises:
        ClusterError: The nodes lack what the run needs, or can never hold its workers.
    """
    capacity = report.capacity.declared(place.node_groups)
    report = replace(report, capacity=replace(capacity, is_complete=not scheduler.starts_at_once))
    check_nodes(report, description.spec, place.address, own_versions(), display.warn)
    plan = fit(description, store, tried, report.capacity, place.address)
    plan = replace(plan, job_nodes=job_nodes(place, places_of(description.spec.workers, plan.gpus)))
    if plan.why_cpu:
        display.warn(plan.why_cpu)
    if plan.why_wait:
        display.message(plan.why_wait)
    return plan
