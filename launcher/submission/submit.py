"""Submit a run: check it here and on the cluster, then write its submission, which a cluster job takes.

The job is ``launcher resume RUN_URL``, so nothing but a run directory is submitted. A submission that is refused is
refused before anything is written. A cluster whose jobs start at once starts the job first, on standby
(``launcher.submission.standby``), so that it is ready when the checks are done. On a cluster whose jobs wait in a
queue and bring their own nodes, the submission waits in the run directory, and the job inspects its nodes.

Several people may submit the same run at the same time. A job's name follows from the run's URL and the number of
earlier jobs, the cluster starts one job per name, and each job takes only the submission that it was started for. The
first submission that is written wins; the others see it and withdraw.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, DescriptionError, Interrupted, LauncherError
from cluster.inspection.store import inspect_cluster
from cluster.run.run_directory import RunDirectory
from cluster.scheduler import Job, JobRequest, Scheduler
from cluster.spec.kinds import JobsClusterSpec
from cluster.versions import check_ray_version
from launcher.code.packing import directory_in_code, pack_job
from launcher.code.user_code import find_code, make_import_paths
from launcher.config.description import Description
from launcher.display.progress import Progress
from launcher.planning.plan import Plan, try_job
from launcher.planning.store_check import checked_store
from launcher.runs.begin import run_directory
from launcher.runs.environment import git_state
from launcher.runs.found_description import find_description
from launcher.submission.handover import OvertakenError, ask_twice, is_for
from launcher.submission.submitting import NothingToDoError, PackedCode, Submitting, fit_there, variables_of


def submit(
    description: Description, folder: Path, scheduler: Scheduler, place: JobsClusterSpec, display: Progress
) -> dict[str, Any]:
    """Hand a run over to a cluster, unless a job of it is there already or the run is complete.

    Args:
        description: The job.
        folder: The folder of the job file.
        scheduler: The cluster.
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
    run = run_directory(description)
    with _named_in_errors(run, place):
        return _submitting(run, description, folder, scheduler, place, display).submit()


def render(
    description: Description, folder: Path, scheduler: Scheduler, place: JobsClusterSpec, display: Progress
) -> dict[str, Any]:
    """Do the same as ``submit``, except that the batch script of the job is returned, and a person hands it over.

    A submission that was rendered before, and whose job has not started, is replaced.

    Args:
        description: The job.
        folder: The folder of the job file.
        scheduler: The cluster.
        place: The description of the cluster.
        display: Shows progress.

    Returns:
        ``run``, ``job``, ``cluster`` and ``status`` as ``submit``; ``script``.

    Raises:
        DescriptionError: The cluster takes no scripts; or the description cannot run as written, or the run exists with
            another one.
        ClusterError: The cluster is not fit for the run; or a job of the run is there already, or nothing is left to
            do.
        LauncherError: Another error.
    """
    run = run_directory(description)
    with _named_in_errors(run, place):
        return _submitting(run, description, folder, scheduler, place, display).render()


def submit_array(
    descriptions: Mapping[int, Description], folder: Path, scheduler: Scheduler, place: JobsClusterSpec,
    display: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Hand several runs over to a cluster as the tasks of one array, except those that need no job.

    Args:
        descriptions: The jobs by the numbers of their tasks.
        folder, scheduler, place, display: See ``submit``.

    Returns:
        The document of each run, as ``submit``.

    Raises:
        LauncherError: See ``submit``; no run is submitted then, unless the message says that a job may have started.
    """
    with ExitStack() as withdrawal:
        array = _offer(withdrawal, descriptions, folder, scheduler, place, display)
        if not array.requests:
            return array.documents()
        display.phase(f"beginning {len(array.requests)} tasks of an array")
        kept = withdrawal.pop_all()  # from now on jobs may begin, which need their submissions
    try:
        array.note(ask_twice(lambda: scheduler.begin_array(array.requests)), display)
        return array.documents()
    except BaseException as error:  # also Ctrl-C
        if _has_none(scheduler, array.requests):
            kept.close()
            raise
        may_run = f"{str(error) or 'interrupted'}; jobs of the array may have begun, submit it again to see"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(may_run) from error
        error.args = (may_run,)
        raise


def render_array(
    descriptions: Mapping[int, Description], folder: Path, scheduler: Scheduler, place: JobsClusterSpec,
    display: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Do the same as ``submit_array``, except that the batch script is returned, and a person hands it over.

    Returns:
        ``runs``, the document of each run; ``script``.

    Raises:
        ClusterError: No run needs a job; or see ``render``.
        LauncherError: See ``render``.
    """
    with ExitStack() as withdrawal:
        array = _offer(withdrawal, descriptions, folder, scheduler, place, display)
        if not array.requests:
            raise ClusterError(f"{place.address}: each run of the array has a job already, or is complete")
        script = scheduler.array_script(array.requests)
        withdrawal.pop_all()
    return {"runs": array.documents(), "script": script}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Array:
    """The runs of an array, by the numbers of their tasks.

    Attributes:
        runs: The submission of each.
        requests: The requests for jobs, of the runs that need one.
        job_ids: The name of each run's job; None: it needs none.
    """

    runs: dict[int, Submitting] = field(default_factory=dict)
    requests: dict[int, JobRequest] = field(default_factory=dict)
    job_ids: dict[int, str | None] = field(default_factory=dict)

    def note(self, jobs: Mapping[int, Job], display: Progress) -> None:
        """Withdraw the submissions of the runs that somebody else has submitted at the same time, and won."""
        for number, request in self.requests.items():
            if not is_for(request.metadata["submission"], jobs[number]):
                self.runs[number].withdraw(request)
                display.message(f"{self.runs[number].run.url}: {OvertakenError(jobs[number].id)}")

    def documents(self) -> list[dict[str, Any]]:
        """Return the document of each run."""
        return [submitting.result(self.job_ids[number]) for number, submitting in self.runs.items()]


def _offer(
    withdrawal: ExitStack,
    descriptions: Mapping[int, Description],
    folder: Path,
    scheduler: Scheduler,
    place: JobsClusterSpec,
    display: Progress,
) -> _Array:
    """Check the runs of an array, and write all that their jobs need.

    Args:
        withdrawal: Withdraws what was written when it is closed.
        descriptions, folder, scheduler, place, display: See ``submit_array``.
    """
    array = _Array()
    for number, description in descriptions.items():
        run = run_directory(description)
        with _named_in_errors(run, place):
            array.runs[number] = _submitting(run, description, folder, scheduler, place, display)
            try:
                array.requests[number] = array.runs[number].offer(withdrawal)
                array.job_ids[number] = array.requests[number].id
            except (NothingToDoError, OvertakenError) as nothing:
                display.message(str(nothing))
                array.job_ids[number] = nothing.job_id
    return array


def _has_none(scheduler: Scheduler, requests: Mapping[int, JobRequest]) -> bool:
    """Return whether the cluster answers that it has none of the jobs of an array; Ctrl-C ends the question."""
    try:
        return not scheduler.has_any(requests)
    except (ClusterError, KeyboardInterrupt):
        return False


def submit_again(
    run: RunDirectory, overrides: Sequence[str], scheduler: Scheduler, place: JobsClusterSpec, display: Progress
) -> dict[str, Any]:
    """Hand a run over to any cluster, given its directory alone, with the code that it was submitted with.

    Changes the working directory of this process.

    Args:
        run: A run that was submitted before, to this cluster or another one.
        overrides: Changes of its description, ``key=value``.
        scheduler: The cluster.
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
        packed = PackedCode(
            sha256=code.sha256, directory=code.directory, working_directory=code.submitted_from, git=code.git
        )
        return Submitting(
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
    report = inspect_cluster(scheduler, store, variables_of(description, place))
    return fit_there(description, store, tried, report, scheduler, place, display)


def _submitting(
    run: RunDirectory,
    description: Description,
    folder: Path,
    scheduler: Scheduler,
    place: JobsClusterSpec,
    display: Progress,
) -> Submitting:
    """Return the submission of a job file."""

    def pack(modules: Collection[str]) -> PackedCode:
        bundle = pack_job(folder, modules)
        return PackedCode(
            sha256=bundle.sha256,
            directory=directory_in_code(folder),
            working_directory=os.getcwd(),
            git=git_state(),
            data=bundle.data,
        )

    return Submitting(
        run=run,
        description=description,
        import_paths=make_import_paths(folder),
        pack=pack,
        scheduler=scheduler,
        place=place,
        display=display,
    )


@contextmanager
def _named_in_errors(run: RunDirectory, place: JobsClusterSpec) -> Iterator[None]:
    """Add run and cluster to the ``--json`` document of errors raised in the block."""
    try:
        yield
    except LauncherError as error:
        error.document = {"run": run.url, "job": None, "cluster": place.address} | (error.document or {})
        raise
