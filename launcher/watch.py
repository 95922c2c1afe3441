"""Watching a run that was submitted: from its directory, and the cluster only as long as that says nothing."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from cluster.errors import ClusterError
from cluster.run_directory import RunDirectory
from cluster.scheduler import ENDED, Job, Scheduler
from launcher.description import parse
from launcher.progress import Progress
from launcher.status import LONG_SILENCE_S, read_status
from launcher.submitted import why_ended

_INTERVAL_S = 2.0
_JOB_INTERVAL_S = 10.0
"""How often the cluster is asked."""
_LAST_WORDS_S = 15.0
"""How long the directory of a run may take to tell of its end after that of the job, or the other way round."""
_ALIVE = ("submitted", "running")


def watch(
    run: RunDirectory,
    job_id: str | None,
    scheduler: Scheduler,
    display: Progress,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[dict[str, Any], int]:
    """Shows how a run stands until it ends.

    Args:
        run: Which.
        job_id: What the cluster calls it; none: it is no job of the cluster.
        scheduler: Knows whether the job lives, which the run directory does not before the run has begun.
        display: Shows it.
        clock, sleep: Seconds that only grow, and waiting for some.

    Returns:
        The ``--json`` document, and the exit code of the run.

    Raises:
        ClusterError: The job has ended, and the run was not begun by it or not ended by it.
    """
    epochs = parse(run.read_job(), f"{run.url}/job.yaml").spec.train.epochs
    job: Job | None = None
    asked_at, ended_at = -_JOB_INTERVAL_S, None
    said = ""
    while True:
        document = read_status(run, LONG_SILENCE_S)
        if document["status"] == "failed" and document.get("begun") is False:
            raise _failed_early(run, document, job_id, scheduler, clock, sleep)
        if document["status"] not in _ALIVE:
            return document, _exit_code(document, job_id, scheduler, clock, sleep)
        if document["status"] == "running" and "total_steps" in document:
            display.update(
                epoch=document["epoch"],
                epochs=epochs,
                step=document["step"],
                total_steps=document["total_steps"],
                metrics=document["metrics"],
                images_per_second=document.get("images_per_second"),
                workers=document["workers"],
            )
        if job_id is not None and clock() - asked_at >= _JOB_INTERVAL_S:
            asked_at = clock()
            with contextlib.suppress(ClusterError):  # out of reach for now; the run directory tells how the run stands
                job = scheduler.read(job_id)
        if job is not None and job.status in ENDED:
            ended_at = clock() if ended_at is None else ended_at
            if clock() - ended_at > _LAST_WORDS_S:
                raise _lost(run, job, document, scheduler)
        elif job is not None and document["status"] == "submitted":
            text = f"job {job.id} is {job.status}" + (f": {job.message}" if job.message else "")
            if text != said:
                display.phase(text)
            said = text
        sleep(_INTERVAL_S)


def _exit_code(
    document: dict[str, Any],
    job_id: str | None,
    scheduler: Scheduler,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> int:
    """That of the command which drove the run; it ends a little later than the run."""
    own = int(document["status"] == "failed")
    deadline = clock() + _LAST_WORDS_S
    while job_id is not None and document["status"] != "completed" and clock() < deadline:
        try:
            job = scheduler.read(job_id)
        except ClusterError:
            return own
        if job is None:
            return own
        if job.status in ENDED:
            # A signal that killed it is no code of ours.
            return own if job.exit_code is None or job.exit_code < 0 else job.exit_code or own
        sleep(_INTERVAL_S)
    return own


def _failed_early(
    run: RunDirectory,
    document: dict[str, Any],
    job_id: str | None,
    scheduler: Scheduler,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> ClusterError:
    """What ended the job before the run began: as its log tells once it has ended, else as the directory does."""
    deadline = clock() + _LAST_WORDS_S
    while job_id is not None and clock() < deadline:
        try:
            job = scheduler.read(job_id)
        except ClusterError:
            break
        if job is None or job.status in ENDED:
            if job is not None:
                return _lost(run, job, document, scheduler)
            break
        sleep(_INTERVAL_S)
    error = ClusterError(f"{run.url}: {document['error']}")
    error.document = document
    return error


def _lost(run: RunDirectory, job: Job, document: dict[str, Any], scheduler: Scheduler) -> ClusterError:
    error = ClusterError(f"{run.url}: {why_ended(job, document, scheduler)}; submit the run again to go on")
    error.document = document | {"status": "failed"}
    return error
