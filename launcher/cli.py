"""The command line: verbs, their options, exit codes. No logic.

A person reads stdout and stderr; with ``--json`` stdout holds exactly one JSON document, and everything
else is on stderr. torch, Ray and wandb are imported by the verbs that need them, when they do.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import CheckpointError, DescriptionError, Interrupted, LauncherError, StorageError

if TYPE_CHECKING:
    from cluster.kinds.ray import Cluster
    from cluster.run.run_directory import RunDirectory
    from cluster.scheduler import Scheduler
    from cluster.spec import RayClusterSpec
    from launcher.config.description import Description
    from launcher.display.progress import Progress
    from launcher.watching.submitted_job import SubmittedJob


def _remember_json(ctx: click.Context, _: click.Parameter, as_json: bool) -> bool:
    ctx.meta["launcher.json"] = as_json  # for errors, which leave the verb before they are shown
    return as_json


_json_option = click.option(
    "--json", "as_json", is_flag=True, is_eager=True, callback=_remember_json, help="Print one JSON document on stdout."
)
_cluster_option = click.option(
    "--cluster",
    "cluster_name",
    metavar="CLUSTER",
    help="Where to run: the YAML file of a cluster, a name (~/.config/launcher/clusters/NAME.yaml, or one that is "
    "shipped), or HOST:PORT of a Ray head; else this machine.",
)
_jobs_option = click.option(
    "--cluster",
    "cluster_name",
    metavar="CLUSTER",
    help="Ask this cluster too: the YAML file of one that jobs are submitted to, its name, or http://HOST:8265.",
)
_take_over_option = click.option(
    "--take-over", is_flag=True, help="Go on in the place of a driver that is alive; that one ends."
)
_wait_option = click.option(
    "--wait", is_flag=True, help="Show how the run stands until it ends; Ctrl-C ends that, and not the run."
)
_job_argument = click.argument("job", metavar="JOB")
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


class _Verbs(click.Group):
    """Turns every error of ours into its one line and its exit code, for all verbs."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it where people press Ctrl-C
        try:
            return super().invoke(ctx)
        except LauncherError as error:
            click.echo(f"error: {error}", err=True)
            if error.traceback:
                click.echo(error.traceback, err=True)
            if ctx.meta.get("launcher.json"):
                _show({"status": "failed", **(error.document or {}), "error": str(error)}, "", as_json=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted before training began", err=True)
            ctx.exit(Interrupted.exit_code)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="launcher")
def main() -> None:
    """Describe a training run once; run it on any number of workers, stop it, resume it, read it from its store."""


@main.command()
@_job_argument
@_overrides
@_take_over_option
@_cluster_option
@_json_option
def run(job: str, overrides: tuple[str, ...], take_over: bool, cluster_name: str | None, as_json: bool) -> None:
    """Plan, then train JOB: a YAML file, or a shipped one by its name, such as digits.

    A run that exists is continued if it is the same one.
    """
    from launcher.config.description import load
    from launcher.config.job_files import find_job

    cluster, changes = _cluster(cluster_name, overrides)
    path = find_job(job)
    description = load(path, changes)
    if cluster.is_this_machine:
        _cheap_checks(description)
    from launcher.runs.begin import begin

    def work(display: "Progress") -> dict[str, Any]:
        return begin(description, path.parent, cluster, display, take_over=take_over)

    _show_result(work, cluster, as_json)


@main.command()
@click.argument("run_url", metavar="RUN")
@_overrides
@click.option("--at", metavar="STEP", type=click.IntRange(min=0), help="Go back to this checkpoint.")
@click.option("--as", "new", metavar="NEW", help="Go on in a new run, by its name or URL; RUN stays as it is.")
@click.option("--force", is_flag=True, help="Go on even with another description, other data, or workers that differ.")
@click.option("--submission", "submission_id", metavar="ID", help="The submission to take up; jobs of submit have it.")
@click.option(
    "--standby", is_flag=True, help="First report how the nodes are, and wait for the submission, as jobs of submit do."
)
@_take_over_option
@_cluster_option
@_wait_option
@_json_option
def resume(
    run_url: str,
    overrides: tuple[str, ...],
    at: int | None,
    new: str | None,
    force: bool,
    submission_id: str | None,
    standby: bool,
    take_over: bool,
    cluster_name: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Go on with RUN from its newest good checkpoint, or from an earlier one, with any number of workers.

    If jobs are submitted to the cluster that is named, the run is, and this returns.
    """
    if standby:
        if at is not None or new is not None or force or take_over or wait:
            raise DescriptionError(
                "--standby: is for jobs of submit; leave out --at, --as, --force, --take-over, --wait"
            )
        return _resume_from_standby(run_url, overrides, submission_id, cluster_name, as_json)
    run_directory = _existing_run(run_url)
    with run_directory.submissions.answered(submission_id):
        from launcher.config.clusters import jobs_cluster, load_cluster, open_cluster, open_scheduler

        spec, changes = load_cluster(cluster_name, overrides)
        if submission_id is None and spec.takes_jobs:
            if at is not None or new is not None or force or take_over:
                raise DescriptionError(
                    f"--cluster {cluster_name}: takes jobs, which go on with a run as it is; for --at, --as, --force "
                    "and --take-over give HOST:PORT of its Ray head, on one of its hosts"
                )
            place = jobs_cluster(spec)
            scheduler = open_scheduler(place)
            from launcher.submission.submit import submit_again

            def hand_over(display: "Progress") -> dict[str, Any]:
                return submit_again(run_directory, changes, scheduler, place, display)

            return _show_submitted(hand_over, scheduler, wait=wait, as_json=as_json)
        if wait:
            raise DescriptionError(
                "--wait: is for a run that is submitted, and this one goes on here, shown to its end; leave it out, or "
                "give --cluster the Jobs API of a cluster"
            )
        cluster = open_cluster(spec)
        from launcher.runs.resume import resume as resume_run

        def work(display: "Progress") -> dict[str, Any]:
            return resume_run(
                run_directory, changes, cluster, display, force=force, take_over=take_over, at=at, new=new,
                submission_id=submission_id,
            )  # fmt: skip

        return _show_result(work, cluster, as_json)


def _resume_from_standby(
    run_url: str, overrides: tuple[str, ...], submission_id: str | None, cluster_name: str | None, as_json: bool
) -> None:
    """Goes on with a run that is about to be submitted."""
    if submission_id is None:
        raise DescriptionError("--standby: waits for a submission; name it with --submission")
    cluster, changes = _cluster(cluster_name, overrides)
    from cluster.run.run_directory import RunDirectory
    from launcher.runs.resume import resume as resume_run
    from launcher.submission.standby import stand_by

    run_directory = RunDirectory(run_url)

    def work(display: "Progress") -> dict[str, Any]:
        stand_by(run_directory, submission_id, cluster, display.phase)
        with run_directory.submissions.answered(submission_id):
            return resume_run(run_directory, changes, cluster, display, submission_id=submission_id)

    _show_result(work, cluster, as_json)


@main.command()
@_job_argument
@_overrides
@_cluster_option
@_json_option
def plan(job: str, overrides: tuple[str, ...], cluster_name: str | None, as_json: bool) -> None:
    """Check JOB and show everything that follows from it; start nothing.

    JOB is a YAML file, or the name of one that is shipped, such as digits.
    """
    from launcher.config.clusters import jobs_cluster, load_cluster, open_cluster, open_scheduler
    from launcher.config.description import load
    from launcher.config.job_files import find_job
    from launcher.display.progress import open_progress
    from launcher.display.tables import plan_text

    spec, changes = load_cluster(cluster_name, overrides)
    path = find_job(job)
    if spec.takes_jobs:
        place = jobs_cluster(spec)
        description = load(path, changes)
        from launcher.submission.submit import plan_there

        with contextlib.closing(open_progress(sys.stderr)) as display:
            made = plan_there(description, path.parent, open_scheduler(place), place, display)
    else:
        cluster = open_cluster(spec)
        description = load(path, changes)
        from launcher.runs.begin import plan_only

        with contextlib.closing(open_progress(sys.stderr)) as display, _joined(cluster):
            made = plan_only(description, path.parent, cluster, display)
    _show(made.as_dict(), plan_text(description.spec, made), as_json)


@main.command()
@_job_argument
@_overrides
@click.option(
    "--cluster",
    "cluster_name",
    metavar="CLUSTER",
    required=True,
    help="Where to: a YAML file, a name, or http://HOST:8265.",
)
@_wait_option
@_json_option
def submit(job: str, overrides: tuple[str, ...], cluster_name: str, wait: bool, as_json: bool) -> None:
    """Check JOB here and on a cluster, hand it over, and return; a run that ended goes on.

    JOB is a YAML file, or the name of one that is shipped, such as digits.
    """
    from launcher.config.description import load
    from launcher.config.job_files import find_job

    scheduler, place, changes = _scheduler(cluster_name, overrides)
    path = find_job(job)
    description = load(path, changes)
    from launcher.submission.submit import submit as submit_run

    def work(display: "Progress") -> dict[str, Any]:
        return submit_run(description, path.parent, scheduler, place, display)

    _show_submitted(work, scheduler, wait=wait, as_json=as_json)


@main.command()
@click.argument("run_url", metavar="RUN")
@_jobs_option
@_json_option
def status(run_url: str, cluster_name: str | None, as_json: bool) -> None:
    """Show how far RUN is, from its directory; and how its job is, if its cluster is named."""
    from launcher.display.tables import summary
    from launcher.watching.status import read_status

    run_directory = _existing_run(run_url)
    job = _job(run_directory, cluster_name)
    document = read_status(run_directory) if job is None else job.document()
    _show(document, summary(document), as_json)


@main.command()
@click.argument("run_url", metavar="RUN")
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, help="Seconds to wait for it.")
@_jobs_option
@_json_option
def stop(run_url: str, timeout_s: float, cluster_name: str | None, as_json: bool) -> None:
    """Ask RUN, wherever it runs, to save and stop; wait until it has. One that waits on a cluster needs --cluster."""
    from launcher.display.tables import summary
    from launcher.watching.stop import stop_run

    run_directory = _existing_run(run_url)
    document = stop_run(run_directory, timeout_s, _job(run_directory, cluster_name))
    _show(document, summary(document), as_json)


@main.command(name="list")
@click.argument("store", default="runs")
@_jobs_option
@_json_option
def list_(store: str, cluster_name: str | None, as_json: bool) -> None:
    """List the runs in STORE; and the jobs that wait on a cluster, if one is named."""
    from cluster.run.run_directory import list_runs
    from cluster.storage.store import Store
    from launcher.display.tables import runs_table
    from launcher.watching.status import read_statuses
    from launcher.watching.submitted_job import read_statuses_with_jobs

    if cluster_name is None:
        documents = read_statuses(list_runs(Store(store)))
    else:
        scheduler, place, _ = _scheduler(cluster_name)
        documents = read_statuses_with_jobs(Store(store), scheduler, place.address, _warn)
    _show(documents, runs_table(documents), as_json)


@main.command()
@click.argument("run_url", metavar="RUN")
@click.option("--verify", is_flag=True, help="Read and hash all of them.")
@click.option("--repair", is_flag=True, help="Remove what killed saves have left; bad checkpoints stay.")
@_json_option
def checkpoints(run_url: str, verify: bool, repair: bool, as_json: bool) -> None:
    """List RUN's checkpoints by their manifests, or verify them; exit code 3 if one is bad."""
    from launcher.display.tables import checkpoints_table, repair_text
    from launcher.watching.status import checkpoint_documents, remove_orphans

    run_directory = _existing_run(run_url)
    survey = remove_orphans(run_directory) if repair else run_directory.checkpoints.survey()
    documents = checkpoint_documents(run_directory, survey, verify=verify)
    if repair:
        repaired = {"run": run_directory.url, "checkpoints": documents, "orphans_removed": survey.orphans}
        _show(repaired, repair_text(documents, survey.orphans), as_json)
    else:
        _show(documents, checkpoints_table(documents), as_json)
    if any(document["good"] is False for document in documents):
        sys.exit(CheckpointError.exit_code)


@main.command()
@click.argument("run_url", metavar="RUN")
@click.option("--worker", type=int, help="Only this worker's.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@_jobs_option
def logs(run_url: str, worker: int | None, follow: bool, cluster_name: str | None) -> None:
    """Print what RUN's workers printed, as far as it has reached the run directory.

    If its cluster is named, what its driver printed there comes last.
    """
    from launcher.watching.logs import log_pieces

    run_directory = _existing_run(run_url)
    job = _job(run_directory, cluster_name)
    for name, piece in log_pieces(run_directory, worker, follow=follow, warn=_warn, job=job):
        click.echo(f"--- {name}", err=True)
        click.echo(piece, nl=not piece.endswith("\n"))


@main.command()
@click.argument("run_url", metavar="RUN")
@_json_option
def plot(run_url: str, as_json: bool) -> None:
    """Draw RUN's curves.png from its metrics, and a picture of every matrix, such as val-confusion.png."""
    from launcher.display.plots import draw

    run_directory = _existing_run(run_url)
    rows = run_directory.metrics().read()
    pictures = draw(rows, run_directory.read_matrices(), run_directory.name)
    urls = {name: run_directory.write_picture(name, png) for name, png in pictures.items()}
    document = {"run": run_directory.url, "curves": urls["curves"], "pictures": urls, "rows": len(rows)}
    _show(document, "\n".join(urls.values()), as_json)


@main.command()
@click.argument("run_url", metavar="RUN")
@click.option("--at", metavar="STEP", type=click.IntRange(min=0), help="Of this checkpoint; else the newest good one.")
@click.option("--weights", type=click.Choice(["model", "ema"]), default="model", show_default=True)
@click.option("--to", metavar="FILE", help="A path or URL, .safetensors or .onnx; else RUN's name, .safetensors, here.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@_json_option
def export(run_url: str, at: int | None, weights: Any, to: str | None, force: bool, as_json: bool) -> None:
    """Write the weights of one of RUN's checkpoints to a file, and check it by reading it back."""
    run_directory = _existing_run(run_url)
    from launcher.display.tables import export_text
    from launcher.runs.export import export as export_weights

    document = export_weights(run_directory, to=to, at=at, which=weights, force=force)
    _show(document, export_text(document), as_json)


@main.command()
@click.option("--cluster", "kind", metavar="KIND", help="That of clusters of this kind, and not of jobs.")
@_json_option
def schema(kind: str | None, as_json: bool) -> None:
    """Print the job language: every key, its type, its default and what it means."""
    from jobs.spec import JobSpec
    from launcher.config.clusters import language_of
    from launcher.config.reference import describe, describe_json

    language = JobSpec if kind is None else language_of(kind)
    _show(describe_json(language) if as_json else None, "" if as_json else describe(language), as_json)


def _cheap_checks(description: "Description") -> None:
    """What needs neither torch nor Ray is said before either is imported."""
    from launcher.config.description import named_errors
    from launcher.planning.placement import check_machine

    with named_errors(description.source):
        check_machine(description.spec)


def _cluster(named: str | None, overrides: tuple[str, ...]) -> tuple["Cluster", list[str]]:
    """The cluster that is meant, for a driver on one of its hosts, and what is left to change in the job."""
    from launcher.config.clusters import load_cluster, open_cluster

    spec, changes = load_cluster(named, overrides)
    return open_cluster(spec), changes


def _scheduler(named: str | None, overrides: tuple[str, ...] = ()) -> tuple["Scheduler", "RayClusterSpec", list[str]]:
    """What begins runs on the cluster that is meant, its description, and what is left to change in the job."""
    from launcher.config.clusters import load_jobs_cluster, open_scheduler

    place, changes = load_jobs_cluster(named, overrides)
    return open_scheduler(place), place, changes


def _job(run_directory: "RunDirectory", cluster_name: str | None) -> "SubmittedJob | None":
    """The job of a run on the cluster that is meant; none: no cluster is named."""
    if cluster_name is None:
        return None
    from launcher.watching.submitted_job import submitted_job

    scheduler, place, _ = _scheduler(cluster_name)
    return submitted_job(run_directory, scheduler, place.address)


@contextlib.contextmanager
def _joined(cluster: "Cluster") -> Iterator[None]:
    """In the cluster.

    Stdout is for the result. Ray prints notices of its own there, the last of them when it is left, of what the driver
    tells in one line: they are dropped.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), cluster.joined():
        yield


def _show_submitted(
    work: Callable[["Progress"], dict[str, Any]], scheduler: "Scheduler", *, wait: bool, as_json: bool
) -> None:
    """Hands a run over with a display on stderr; then prints what became of it, and exits."""
    from launcher.display.progress import open_progress
    from launcher.display.tables import summary

    display, exit_code = open_progress(sys.stderr), 0
    try:
        document = work(display)
        if wait:
            document, exit_code = _watched(document, scheduler, display)
    finally:
        display.close()
    _show(document, summary(document), as_json)
    sys.exit(exit_code)


def _watched(submitted: dict[str, Any], scheduler: "Scheduler", display: "Progress") -> tuple[dict[str, Any], int]:
    """What was submitted, watched to its end or until Ctrl-C, and the exit code."""
    from cluster.run.run_directory import RunDirectory
    from launcher.watching.status import read_status
    from launcher.watching.watch import watch

    run_directory = RunDirectory(submitted["run"])
    try:
        document, exit_code = watch(run_directory, submitted["job"], scheduler, display)
    except KeyboardInterrupt:
        url = shlex.quote(submitted["run"])
        display.message(f"{submitted['run']} goes on without this terminal; stop it with `launcher stop {url}`")
        document, exit_code = submitted, Interrupted.exit_code
        with contextlib.suppress(StorageError):  # what was submitted is known without the store
            document = read_status(run_directory)
    return document | {"job": submitted["job"], "cluster": submitted["cluster"]}, exit_code


def _existing_run(url: str) -> "RunDirectory":
    from cluster.run.run_directory import RunDirectory

    run_directory = RunDirectory(url)
    if not run_directory.is_known():
        raise DescriptionError(
            f"{run_directory.url} is no run: it has no job.yaml; launcher list shows the runs of a store"
        )
    return run_directory


def _show_result(work: Callable[["Progress"], dict[str, Any]], cluster: "Cluster", as_json: bool) -> None:
    """Runs with a display on stderr, then prints the result and exits as it ended."""
    from launcher.display.progress import open_progress
    from launcher.display.tables import summary

    display = open_progress(sys.stderr)
    try:
        with _joined(cluster):
            result = work(display)
    finally:
        display.close()
    interrupted = result.pop("interrupted", False)
    _show(result, summary(result), as_json)
    if interrupted and result["status"] == "stopped":
        sys.exit(Interrupted.exit_code)


def _warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


def _show(document: Any, text: str, as_json: bool) -> None:
    click.echo(json.dumps(_finite(document), allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
