"""The verbs that begin or continue a run: run, resume, plan, submit, render."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import DescriptionError
from cluster.host.temporary_folder import TemporaryFolderError
from cluster.spec.local import LocalClusterSpec
from launcher.cli.lookup import find_cluster, find_run, find_scheduler
from launcher.cli.options import (
    cluster_option,
    job_argument,
    json_option,
    overrides_argument,
    run_argument,
    submit_cluster_option,
    take_over_option,
    wait_option,
)
from launcher.cli.output import drive_and_show, joined, show, submit_and_show

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.scheduler import Scheduler
    from cluster.spec.kinds import JobsClusterSpec
    from launcher.config.description import Description
    from launcher.display.progress import Progress


@click.command()
@job_argument
@overrides_argument
@take_over_option
@cluster_option
@json_option
def run(job: str, overrides: tuple[str, ...], take_over: bool, cluster_name: str | None, as_json: bool) -> None:
    """Plan, then train JOB: a YAML file, or the name of a shipped one, such as digits.

    A run that exists is continued if its description is the same.
    """
    from launcher.config.description import load
    from launcher.config.job_files import find_job

    cluster, job_overrides = find_cluster(cluster_name, overrides)
    path = find_job(job)
    description = load(path, job_overrides)
    if cluster.is_this_machine:
        _check_machine(description)
    from launcher.runs.begin import begin

    def work(display: "Progress") -> dict[str, Any]:
        return begin(description, path.parent, cluster, display, take_over=take_over)

    drive_and_show(work, cluster, as_json=as_json)


@click.command()
@run_argument
@overrides_argument
@click.option("--at", metavar="STEP", type=click.IntRange(min=0), help="Go back to this checkpoint.")
@click.option("--as", "new", metavar="NEW", help="Go on in a new run, by its name or URL; RUN stays as it is.")
@click.option("--force", is_flag=True, help="Go on even with another description, other data, or workers that differ.")
@click.option("--submission", "submission_id", metavar="ID", help="The submission to take up; jobs of submit pass it.")
@click.option(
    "--standby",
    is_flag=True,
    help="First report on the nodes and wait for the submission; jobs of submit pass it.",
)
@click.option("--inspect", is_flag=True, help="First inspect the nodes; jobs of submit that bring their own pass it.")
@take_over_option
@cluster_option
@wait_option
@json_option
def resume(
    run_url: str,
    overrides: tuple[str, ...],
    at: int | None,
    new: str | None,
    force: bool,
    submission_id: str | None,
    standby: bool,
    inspect: bool,
    take_over: bool,
    cluster_name: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Go on with RUN from its newest good checkpoint, or from an earlier one, with any number of workers.

    If --cluster names a cluster that takes jobs, RUN is submitted there, and the command returns.
    """
    if standby:
        if at is not None or new is not None or force or inspect or take_over or wait:
            raise DescriptionError(
                "--standby: is for jobs of submit; leave out --at, --as, --force, --inspect, --take-over, --wait"
            )
        return _resume_from_standby(run_url, overrides, submission_id, cluster_name, as_json)
    if inspect and submission_id is None:
        raise DescriptionError("--inspect: is for jobs of submit, which name their --submission; leave it out")
    run_directory = find_run(run_url)
    from launcher.runs.next_try import answered

    with answered(run_directory, submission_id):
        from launcher.config.clusters import jobs_cluster, load_cluster, open_cluster, open_scheduler

        cluster_spec, job_overrides = load_cluster(cluster_name, overrides)
        if submission_id is None and cluster_spec.takes_jobs:
            if at is not None or new is not None or force or take_over:
                raise DescriptionError(
                    f"--cluster {cluster_name}: takes jobs, which go on with a run as it is; for --at, --as, --force "
                    "and --take-over leave out --cluster, or give HOST:PORT of a Ray head, on one of its hosts"
                )
            jobs_spec = jobs_cluster(cluster_spec)
            scheduler = open_scheduler(jobs_spec)
            from launcher.submission.submit import submit_again

            def hand_over(display: "Progress") -> dict[str, Any]:
                return submit_again(run_directory, job_overrides, scheduler, jobs_spec, display)

            return submit_and_show(hand_over, scheduler, wait=wait, as_json=as_json)
        if wait:
            raise DescriptionError(
                "--wait: is for a run that is submitted, and this one goes on here, shown to its end; leave it out, or "
                "give --cluster one that takes jobs"
            )
        cluster = open_cluster(cluster_spec)
        variables = () if isinstance(cluster_spec, LocalClusterSpec) else cluster_spec.env
        from launcher.runs.resume import resume as resume_run

        def work(display: "Progress") -> dict[str, Any]:
            return resume_run(
                run_directory, job_overrides, cluster, display, force=force, take_over=take_over, at=at, new=new,
                submission_id=submission_id, inspects=variables if inspect else None,
            )  # fmt: skip

        return drive_and_show(work, cluster, as_json=as_json)


def _resume_from_standby(
    run_url: str, overrides: tuple[str, ...], submission_id: str | None, cluster_name: str | None, as_json: bool
) -> None:
    """Wait for a submission to be written, then resume its run."""
    if submission_id is None:
        raise DescriptionError("--standby: waits for a submission; name it with --submission")
    cluster, job_overrides = find_cluster(cluster_name, overrides)
    from cluster.run.run_directory import RunDirectory
    from launcher.runs.next_try import answered
    from launcher.runs.resume import resume as resume_run
    from launcher.submission.standby import stand_by

    run_directory = RunDirectory(run_url)

    def work(display: "Progress") -> dict[str, Any]:
        stand_by(run_directory, submission_id, cluster, display.phase)
        with answered(run_directory, submission_id):
            return resume_run(run_directory, job_overrides, cluster, display, submission_id=submission_id)

    drive_and_show(work, cluster, as_json=as_json)


@click.command()
@job_argument
@overrides_argument
@cluster_option
@json_option
def plan(job: str, overrides: tuple[str, ...], cluster_name: str | None, as_json: bool) -> None:
    """Check JOB and show everything that follows from it; start nothing.

    JOB is a YAML file, or the name of a shipped one, such as digits.
    """
    from launcher.config.clusters import jobs_cluster, load_cluster, open_cluster, open_scheduler
    from launcher.config.description import load
    from launcher.config.job_files import find_job
    from launcher.display.progress import open_progress
    from launcher.display.tables import plan_text

    cluster_spec, job_overrides = load_cluster(cluster_name, overrides)
    path = find_job(job)
    with contextlib.closing(open_progress(sys.stderr)) as display, settings_checked():
        if cluster_spec.takes_jobs:
            jobs_spec = jobs_cluster(cluster_spec)
            description = load(path, job_overrides)
            from launcher.submission.submit import plan_there

            plan_made = plan_there(description, path.parent, open_scheduler(jobs_spec), jobs_spec, display)
        else:
            cluster = open_cluster(cluster_spec)
            description = load(path, job_overrides)
            from launcher.runs.begin import plan_only

            with joined(cluster):
                plan_made = plan_only(description, path.parent, cluster, display)
    show(plan_made.as_dict(), plan_text(description.spec, plan_made), as_json)


@click.command()
@job_argument
@overrides_argument
@submit_cluster_option
@wait_option
@json_option
def submit(job: str, overrides: tuple[str, ...], cluster_name: str, wait: bool, as_json: bool) -> None:
    """Check JOB here and on a cluster, submit it, and return; a run that ended goes on.

    JOB is a YAML file, or the name of a shipped one, such as digits.
    """
    from launcher.config.description import load
    from launcher.config.job_files import find_job

    scheduler, jobs_spec, job_overrides = find_scheduler(cluster_name, overrides)
    path = find_job(job)
    description = load(path, job_overrides)
    if jobs_spec.array_numbers:
        if wait:
            raise DescriptionError(
                "--wait: shows one run, and an array has several; leave it out, and use launcher list"
            )
        descriptions = _of_array(description, path, job_overrides, jobs_spec.array_numbers)
        _submit_array(descriptions, path.parent, scheduler, jobs_spec, as_json=as_json)
        return
    from launcher.submission.submit import submit as submit_run

    def work(display: "Progress") -> dict[str, Any]:
        return submit_run(description, path.parent, scheduler, jobs_spec, display)

    submit_and_show(work, scheduler, wait=wait, as_json=as_json)


@click.command()
@job_argument
@overrides_argument
@submit_cluster_option
@json_option
def render(job: str, overrides: tuple[str, ...], cluster_name: str, as_json: bool) -> None:
    """Do what submit does, except that the batch script is printed: read it, then hand it to `sbatch` yourself.

    If a job of the run is there already, or nothing is left to do, that is an error, with exit code 5.
    """
    from launcher.config.description import load
    from launcher.config.job_files import find_job
    from launcher.display.progress import open_progress

    scheduler, jobs_spec, job_overrides = find_scheduler(cluster_name, overrides)
    path = find_job(job)
    description = load(path, job_overrides)
    from launcher.submission.submit import render as render_run
    from launcher.submission.submit import render_array

    with contextlib.closing(open_progress(sys.stderr)) as display:
        if jobs_spec.array_numbers:
            descriptions = _of_array(description, path, job_overrides, jobs_spec.array_numbers)
            document = render_array(descriptions, path.parent, scheduler, jobs_spec, display)
        else:
            document = render_run(description, path.parent, scheduler, jobs_spec, display)
    show(document, document["script"].removesuffix("\n"), as_json)


def _of_array(
    description: "Description", path: "Path", overrides: Sequence[str], numbers: Sequence[int]
) -> "dict[int, Description]":
    """Return the job of each task of an array, by its number: the run NAME-NUMBER, with the number as its seed.

    Raises:
        DescriptionError: An override sets the seed, too.
    """
    from launcher.config.description import load
    from launcher.config.overrides import key_of

    for override in overrides:
        if key_of(override) == "seed":
            raise DescriptionError(
                f"command line: {override}: each task of cluster.array has its number as its seed; leave out seed"
            )
    name = description.spec.name
    return {
        number: load(path, [*overrides, f"name={json.dumps(f'{name}-{number}')}", f"seed={number}"])
        for number in numbers
    }


def _submit_array(
    descriptions: "dict[int, Description]",
    folder: "Path",
    scheduler: "Scheduler",
    place: "JobsClusterSpec",
    *,
    as_json: bool,
) -> None:
    """Submit the runs of an array, and print the document of each."""
    from launcher.display.progress import open_progress
    from launcher.display.tables import summary
    from launcher.submission.submit import submit_array

    with contextlib.closing(open_progress(sys.stderr)) as display:
        documents = submit_array(descriptions, folder, scheduler, place, display)
    show(documents, "\n\n".join(map(summary, documents)), as_json)


@contextlib.contextmanager
def settings_checked() -> Iterator[None]:
    """Context of a command that only checks: a temporary folder that cannot be used is an error of what it was given.

    Raises:
        DescriptionError: The variable that names the folder must be changed.
    """
    try:
        yield
    except TemporaryFolderError as error:
        raise DescriptionError(str(error)) from error


def _check_machine(description: "Description") -> None:
    """Refuse a job that this machine cannot hold, before torch and Ray are imported."""
    from launcher.config.description import named_errors
    from launcher.planning.placement import check_machine

    with named_errors(description.source):
        check_machine(description.spec)
