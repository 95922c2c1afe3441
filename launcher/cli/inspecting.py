"""The verb that shows the data of a job: data."""

import contextlib
import sys

import click

from cluster.errors import TrainingError
from launcher.cli.options import job_argument, json_option, overrides_argument
from launcher.cli.output import show
from launcher.cli.running import settings_checked


@click.command()
@job_argument
@overrides_argument
@click.option("--split", type=click.Choice(["train", "val"]), help="Only this dataset; else both.")
@click.option(
    "--sample",
    "num_sampled",
    metavar="N",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Read so many samples of each, for sizes, formats and modes.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read and decode every image. Ctrl-C keeps what was verified, and the same command goes on.",
)
@click.option("--duplicates", is_flag=True, help="Find images with equal content; reads all, as --verify does.")
@click.option("--sheet", metavar="FILE.png", help="Draw the first sixteen training samples, augmented; a path or URL.")
@json_option
def data(
    job: str,
    overrides: tuple[str, ...],
    split: str | None,
    num_sampled: int,
    verify: bool,
    duplicates: bool,
    sheet: str | None,
    as_json: bool,
) -> None:
    """Show JOB's data: classes, sizes, formats, what is broken; exit code 1 if a sample is.

    JOB is a YAML file, or the name of a shipped one, such as digits.
    """
    from launcher.config.description import load
    from launcher.config.job_files import find_job
    from launcher.display.data_text import data_text
    from launcher.display.progress import open_progress
    from launcher.inspecting.inspect import Wanted, has_broken, inspect_data

    path = find_job(job)
    description = load(path, overrides)
    wanted = Wanted(split=split, num_sampled=num_sampled, verify=verify, duplicates=duplicates, sheet=sheet)
    with contextlib.closing(open_progress(sys.stderr)) as display, settings_checked():
        document = inspect_data(description, path.parent, wanted, display)
    show(document, data_text(document), as_json)
    if has_broken(document):
        sys.exit(TrainingError.exit_code)
