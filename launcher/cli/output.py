"""What verbs print: the result on stdout as text or JSON, progress and warnings on stderr."""

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from cluster.errors import Interrupted, Requeued, StorageError
from cluster.host.batch_job import batch_job
from launcher.cli.streams import write_out

if TYPE_CHECKING:
    from cluster.kinds.cluster import Cluster
    from cluster.scheduler import Scheduler
    from launcher.display.progress import Progress


def show(document: Any, text: str, as_json: bool) -> None:
    """Print a result on stdout: the document as JSON, or the text; if nobody reads it, that is no error.

    Raises:
        StorageError: It cannot be written.
    """
    write_out(json.dumps(_without_nonfinite(document), allow_nan=False) if as_json else text)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.echo(f"warning: {text}", err=True)


def drive_and_show(work: Callable[["Progress"], dict[str, Any]], cluster: "Cluster", *, as_json: bool) -> None:
    """Drive a run with a progress display on stderr, print its result, and exit as the run ended."""
    from launcher.display.progress import open_progress
    from launcher.display.tables import summary

    batch_job()  # a variable of it that means nothing is an error before anything starts
    display = open_progress(sys.stderr)
    try:
        with joined(cluster):
            result = work(display)
    finally:
        display.close()
    interrupted = result.pop("interrupted", False)
    is_requeued = result["status"] == "requeued"
    try:
        show(result, summary(result), as_json)
    except StorageError as error:  # the output of a batch job may be on a full disk
        if not is_requeued:
            raise
        warn(str(error))
    if interrupted and result["status"] == "stopped":
        sys.exit(Interrupted.exit_code)
    if is_requeued:
        sys.exit(Requeued.exit_code)


def submit_and_show(
    work: Callable[["Progress"], dict[str, Any]], scheduler: "Scheduler", *, wait: bool, as_json: bool
) -> None:
    """Submit a run with a progress display on stderr, with ``wait`` watch it to its end, print its status and exit."""
    from launcher.display.progress import open_progress
    from launcher.display.tables import summary

    display, exit_code = open_progress(sys.stderr), 0
    try:
        document = work(display)
        if wait:
            document, exit_code = watch_submitted(document, scheduler, display)
    finally:
        display.close()
    show(document, summary(document), as_json)
    sys.exit(exit_code)


def watch_submitted(
    submitted: dict[str, Any], scheduler: "Scheduler", display: "Progress"
) -> tuple[dict[str, Any], int]:
    """Watch a submitted run until it ends or until Ctrl-C; return its document and the exit code."""
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
        with contextlib.suppress(StorageError):  # without the store, the document of the submission is printed
            document = read_status(run_directory)
    return document | {"job": submitted["job"], "cluster": submitted["cluster"]}, exit_code


@contextlib.contextmanager
def joined(cluster: "Cluster") -> Iterator[None]:
    """Join the cluster, and discard what is printed on stdout meanwhile.

    Stdout is for the result. Ray prints notices of its own there, the last one when the process disconnects.
    """
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), cluster.joined():
        yield


def _without_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with None."""
    if isinstance(value, dict):
        return {name: _without_nonfinite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
