"""The verbs that need only a run directory or a store: status, stop, list, checkpoints, logs, plot, export, schema.

With ``--cluster``, some of them ask the cluster about the job of the run, too.
"""

import sys
from typing import Any

import click

from cluster.errors import CheckpointError
from launcher.cli.lookup import find_job_of_run, find_run, find_scheduler
from launcher.cli.options import jobs_cluster_option, json_option, run_argument
from launcher.cli.output import show, warn
from launcher.cli.streams import write_out


@click.command()
@run_argument
@jobs_cluster_option
@json_option
def status(run_url: str, cluster_name: str | None, as_json: bool) -> None:
    """Show how far RUN is, from its directory; with --cluster also the state of its job."""
    from launcher.display.tables import summary
    from launcher.watching.status import read_status

    run_directory = find_run(run_url)
    job = find_job_of_run(run_directory, cluster_name)
    document = read_status(run_directory) if job is None else job.document()
    show(document, summary(document), as_json)


@click.command()
@run_argument
@click.option("--timeout", "timeout_s", type=float, default=300.0, show_default=True, help="Seconds to wait for it.")
@jobs_cluster_option
@json_option
def stop(run_url: str, timeout_s: float, cluster_name: str | None, as_json: bool) -> None:
    """Ask RUN, wherever it runs, to save and stop; wait until it has. One that waits on a cluster needs --cluster."""
    from launcher.display.tables import summary
    from launcher.watching.stop import stop_run

    run_directory = find_run(run_url)
    document = stop_run(run_directory, timeout_s, find_job_of_run(run_directory, cluster_name))
    show(document, summary(document), as_json)


@click.command(name="list")
@click.argument("store", default="runs")
@jobs_cluster_option
@json_option
def list_runs(store: str, cluster_name: str | None, as_json: bool) -> None:
    """List the runs in STORE; with --cluster also the jobs that wait there."""
    from cluster.run.run_directory import list_runs as runs_in
    from cluster.storage.store import Store
    from launcher.display.tables import runs_table
    from launcher.watching.status import read_statuses
    from launcher.watching.submitted_job import read_statuses_with_jobs

    if cluster_name is None:
        documents = read_statuses(runs_in(Store(store)))
    else:
        scheduler, jobs_spec, _ = find_scheduler(cluster_name)
        documents = read_statuses_with_jobs(Store(store), scheduler, jobs_spec.address, warn)
    show(documents, runs_table(documents), as_json)


@click.command()
@run_argument
@click.option("--verify", is_flag=True, help="Read and hash every checkpoint.")
@click.option("--repair", is_flag=True, help="Remove what killed saves have left; bad checkpoints stay.")
@json_option
def checkpoints(run_url: str, verify: bool, repair: bool, as_json: bool) -> None:
    """List RUN's checkpoints by their manifests, or verify them; exit code 3 if one is bad."""
    from launcher.display.tables import checkpoints_table, repair_text
    from launcher.watching.status import checkpoint_documents, remove_orphans

    run_directory = find_run(run_url)
    survey = remove_orphans(run_directory) if repair else run_directory.checkpoints.survey()
    documents = checkpoint_documents(run_directory, survey, verify=verify)
    if repair:
        repaired = {"run": run_directory.url, "checkpoints": documents, "orphans_removed": survey.orphans}
        show(repaired, repair_text(documents, survey.orphans), as_json)
    else:
        show(documents, checkpoints_table(documents), as_json)
    if any(document["good"] is False for document in documents):
        sys.exit(CheckpointError.exit_code)


@click.command()
@run_argument
@click.option("--worker", type=int, help="Only the log of this worker.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@jobs_cluster_option
def logs(run_url: str, worker: int | None, follow: bool, cluster_name: str | None) -> None:
    """Print what RUN's workers printed, as far as it has reached the run directory.

    With --cluster, the log of its driver there comes last.
    """
    from launcher.watching.logs import log_pieces

    run_directory = find_run(run_url)
    job = find_job_of_run(run_directory, cluster_name)
    for name, piece in log_pieces(run_directory, worker, follow=follow, warn=warn, job=job):
        click.echo(f"--- {name}", err=True)
        if not write_out(piece, end="" if piece.endswith("\n") else "\n"):
            return


@click.command()
@run_argument
@json_option
def plot(run_url: str, as_json: bool) -> None:
    """Draw RUN's curves.png from its metrics, and a picture of every matrix, such as val-confusion.png."""
    from launcher.display.plots import draw

    run_directory = find_run(run_url)
    rows = run_directory.metrics().read()
    pictures = draw(rows, run_directory.read_matrices(), run_directory.name)
    urls = {name: run_directory.write_picture(name, png) for name, png in pictures.items()}
    document = {"run": run_directory.url, "curves": urls["curves"], "pictures": urls, "rows": len(rows)}
    show(document, "\n".join(urls.values()), as_json)


@click.command()
@run_argument
@click.option(
    "--at", metavar="STEP", type=click.IntRange(min=0), help="The checkpoint to export; else the newest good one."
)
@click.option("--weights", type=click.Choice(["model", "ema"]), default="model", show_default=True)
@click.option("--to", metavar="FILE", help="A path or URL, .safetensors or .onnx; else RUN's name, .safetensors, here.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@json_option
def export(run_url: str, at: int | None, weights: Any, to: str | None, force: bool, as_json: bool) -> None:
    """Write the weights of one of RUN's checkpoints to a file, and check it by reading it back."""
    run_directory = find_run(run_url)
    from launcher.display.tables import export_text
    from launcher.runs.export import export as export_weights

    document = export_weights(run_directory, to=to, at=at, which=weights, force=force)
    show(document, export_text(document), as_json)


@click.command()
@click.option("--cluster", "kind", metavar="KIND", help="Print the keys of a cluster file of this kind instead.")
@json_option
def schema(kind: str | None, as_json: bool) -> None:
    """Print the job language: every key, its type, its default and what it means."""
    from jobs.spec import JobSpec
    from launcher.config.clusters import language_of
    from launcher.config.reference import describe, describe_json

    language = JobSpec if kind is None else language_of(kind)
    show(describe_json(language) if as_json else None, "" if as_json else describe(language), as_json)
