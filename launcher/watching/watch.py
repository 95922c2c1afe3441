"""Watches a submitted run until it ends: through its directory, and through the cluster for the state of its job."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import ClusterError, Interrupted, Requeued
from cluster.run.run_directory import RunDirectory
from cluster.scheduler import ENDED, Job, Scheduler
from launcher.config.description import parse
from launcher.display.progress import Progress
from launcher.watching.patience import read_patiently
from launcher.watching.requeued import as_requeued, outcome_of, with_next_try
from launcher.watching.status import Lookout, read_status
from launcher.watching.submitted_job import why_ended

_INTERVAL_S = 2.0
_JOB_INTERVAL_S = 10.0
"""How often the cluster is asked."""
_END_DELAY_S = 15.0
"""How much later than its job a run may show its end in its directory, or the other way round."""
_PATIENCE_S = 600.0
"""How long the cluster may not answer while no driver has the run."""
_ALIVE = ("submitted", "running", "requeued")


def watch(
    run: RunDirectory,
    job_id: str | None,
    scheduler: Scheduler,
    display: Progress,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[dict[str, Any], int]:
    """Show the status of a run until it ends. One that is requeued has not: its job will start it again.

    If that is a job which this process does not watch, such as one on another cluster, it is waited for ten minutes.

    Args:
        run: The run.
        job_id: The cluster's id of the run's job. None: the run has no job on the cluster.
        scheduler: The cluster, which knows whether the job is alive; before the run begins, its directory does not.
        display: Shows the status.
        clock: Monotonic seconds.
        sleep: Waits for some seconds.

    Returns:
        The ``--json`` document, and the exit code of the run.

    Raises:
        ClusterError: The job has ended, or the cluster does not know it any more, and no other driver goes on with the
            run; or no driver has the run, and the cluster does not answer for ten minutes.
        StorageError: The store does not answer for longer than ``read_patiently`` retries.
    """
    epochs = read_patiently(lambda: _read_epochs(run), display.warn, clock, sleep)
    watched_job = None if job_id is None else _WatchedJob(scheduler, job_id, clock)
    requeued_at: float | None = None
    last_phase, lookout = "", Lookout(lambda silence_s: read_status(run, silence_s), clock)
    while True:
        document = read_patiently(lookout.look, display.warn, clock, sleep)
        if watched_job is not None:
            document = watched_job.with_next_try(document)
        if document["status"] == "failed" and document.get("begun") is False:
            raise _failed_early(run, document, _wait_for_end(job_id, scheduler, clock, sleep), scheduler)
        if document["status"] == "completed":
            return document, 0
        if document["status"] not in _ALIVE:
            return document, _exit_code(document, _wait_for_end(job_id, scheduler, clock, sleep))
        if document["status"] == "running" and document.get("waits_for"):
            text = f"waiting for workers: {document['waits_for']}"
            if text != last_phase:
                display.phase(text)
            last_phase = text
        elif document["status"] == "running" and "total_steps" in document:
            display.update(
                epoch=document["epoch"],
                epochs=epochs,
                step=document["step"],
                total_steps=document["total_steps"],
                metrics=document["metrics"],
                images_per_second=document.get("images_per_second"),
                workers=document["workers"],
            )
        if watched_job is not None:
            watched_job.ask(document)
            if watched_job.is_over and watched_job.updated_since(document):
                watched_job = job_id = None  # another driver goes on with the run
            elif watched_job.is_over and watched_job.job is not None and document["status"] == "requeued":
                why = f"{why_ended(watched_job.job, document, scheduler)}; submit the run again to go on"
                document = document | {"status": outcome_of(watched_job.job), "error": why}
                return document, _exit_code(document, watched_job.job)
            elif watched_job.is_over or (watched_job.is_silent and document["status"] != "running"):
                raise _lost(run, watched_job, document, scheduler)
            elif watched_job.job is not None and document["status"] in ("submitted", "requeued"):
                text = f"job {watched_job.job_id} is {watched_job.job.status}"
                why = document.get("waits_for") or watched_job.job.message
                text += f": {why}" if why else ""
                if text != last_phase:
                    display.phase(text)
                last_phase = text
        elif document["status"] != "requeued":
            requeued_at = None
        else:  # by a job that this process does not know, and cannot ask about
            requeued_at = clock() if requeued_at is None else requeued_at
            if clock() - requeued_at > _PATIENCE_S:
                return document, Requeued.exit_code
        sleep(_INTERVAL_S)


def _read_epochs(run: RunDirectory) -> int:
    """Return the number of epochs in the run's description, or in its newest submission if it has not begun."""
    newest = None if run.exists() else run.submissions.read_newest()
    text = run.read_job() if newest is None else newest[1].description
    return int(parse(text, run.url).spec.train.epochs)


class _WatchedJob:
    """The state of a job, for which the cluster is asked every ``_JOB_INTERVAL_S``.

    Args:
        scheduler: The cluster.
        job_id: A job that the cluster has known.
        clock: Monotonic seconds.
    """

    def __init__(self, scheduler: Scheduler, job_id: str, clock: Callable[[], float]) -> None:
        self.job_id = job_id
        self.job: Job | None = None
        """The last answer. None: the cluster does not know the job any more, or has not answered yet."""
        self.error = ""
        """Why the cluster did not answer the last time; empty if it did."""
        self._scheduler, self._clock = scheduler, clock
        self._asked_at = -math.inf
        self._answered_at = clock()
        self._gone_at: float | None = None
        self._updated: float | None = None
        self._lost_at: float | None = None

    def ask(self, document: Mapping[str, Any]) -> None:
        """Ask the cluster, unless it was asked less than ``_JOB_INTERVAL_S`` ago.

        Args:
            document: The status of the run, read after the previous call.
        """
        if self._gone_at is not None and self._updated is None:
            self._updated = document.get("updated")  # no later status is from the job's driver
        if self._clock() - self._asked_at < _JOB_INTERVAL_S:
            return
        self._asked_at = self._clock()
        try:
            self.job = self._scheduler.read(self.job_id)
        except ClusterError as error:  # retried later; the run directory has the status
            self.error = str(error)
            return
        self.error, self._answered_at = "", self._clock()
        if self.job is not None and self.job.status not in ENDED:
            self._gone_at = self._updated = None
        elif self._gone_at is None:
            self._gone_at = self._clock()

    def with_next_try(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the document of a run, as that of a requeued one if its driver is lost and its job starts it again.

        While the job is in the try of the lost driver, that is so for ten minutes: a scheduler takes some to notice
        that a node is lost.
        """
        if "claimed" not in document or self._scheduler.starts_at_once:
            self._lost_at = None
            return document
        self.ask(document)
        self._lost_at = self._clock() if self._lost_at is None else self._lost_at
        may_change = bool(self.error) or (self.job is not None and self.job.status not in ENDED)
        if may_change and self._clock() - self._lost_at <= _PATIENCE_S:
            return as_requeued(document)
        return document if self.job is None else with_next_try(document, self.job)

    @property
    def is_over(self) -> bool:
        """Whether the job ended, or became unknown, so long ago that its driver's last status must be written."""
        return self._gone_at is not None and self._clock() - self._gone_at > _END_DELAY_S

    @property
    def is_silent(self) -> bool:
        """Whether the cluster has not answered for ten minutes."""
        return self._clock() - self._answered_at > _PATIENCE_S

    def updated_since(self, document: Mapping[str, Any]) -> bool:
        """Return whether a driver has written a status after the end of the job."""
        return bool(document["status"] == "running" and document.get("updated") != self._updated)


def _exit_code(document: dict[str, Any], ended: Job | None) -> int:
    """Return the exit code of the job; if that is unknown or 0, then 1 for a run that failed, else 0."""
    of_run = int(document["status"] == "failed")
    if ended is None or ended.exit_code is None or ended.exit_code < 0:  # negative: killed by a signal
        return of_run
    if ended.exit_code == Requeued.exit_code:  # its scheduler has not started it again
        return Interrupted.exit_code
    return ended.exit_code or of_run


def _failed_early(run: RunDirectory, document: dict[str, Any], ended: Job | None, scheduler: Scheduler) -> ClusterError:
    """Return the error of a run whose job ended before it began: from the job's log, else from the directory."""
    if ended is None:
        return _error(run, document["error"], document)
    return _error(run, f"{why_ended(ended, document, scheduler)}; submit the run again to go on", document)


def _wait_for_end(
    job_id: str | None, scheduler: Scheduler, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Job | None:
    """Wait for the end of the job of a run that has ended; None: it does not end in time, or the state is unknown."""
    deadline = clock() + _END_DELAY_S
    while job_id is not None and clock() < deadline:
        try:
            job = scheduler.read(job_id)
        except ClusterError:
            return None
        if job is None or job.status in ENDED:
            return job
        sleep(_INTERVAL_S)
    return None


def _lost(run: RunDirectory, job: _WatchedJob, document: dict[str, Any], scheduler: Scheduler) -> ClusterError:
    """Return the error of a run whose job has ended, is unknown, or whose cluster does not answer."""
    if job.error:
        silent = f"its cluster has not answered for {_PATIENCE_S / 60:.0f} minutes: {job.error}"
        why = f"is {document['status']}, and {silent}"
        return _error(run, f"{why}; see whether it is up, and submit the run again", document)
    if job.job is None:
        return _error(run, f"the cluster does not know job {job.job_id} any more; submit the run again", document)
    return _error(run, f"{why_ended(job.job, document, scheduler)}; submit the run again to go on", document)


def _error(run: RunDirectory, why: str, document: dict[str, Any]) -> ClusterError:
    error = ClusterError(f"{run.url}: {why}")
    error.document = document | {"status": "failed"}
    return error
