"""Watching a run that was submitted: from its directory, and the cluster only as long as that says nothing."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import ClusterError
from cluster.run.run_directory import RunDirectory
from cluster.scheduler import ENDED, Job, Scheduler
from launcher.config.description import parse
from launcher.display.progress import Progress
from launcher.watching.patience import read_patiently
from launcher.watching.status import Lookout, read_status
from launcher.watching.submitted_job import why_ended

_INTERVAL_S = 2.0
_JOB_INTERVAL_S = 10.0
"""How often the cluster is asked."""
_LAST_WORDS_S = 15.0
"""How long the directory of a run may take to tell of its end after that of the job, or the other way round."""
_PATIENCE_S = 600.0
"""How long the cluster of a run that has not begun may be out of reach."""
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
        ClusterError: The job has ended, or the cluster does not know it any more, and nobody goes on with the run; or
            the run has not begun, and the cluster is out of reach.
        StorageError: The store is out of reach, for longer than ``read_patiently`` bears.
    """
    epochs = read_patiently(lambda: _read_epochs(run), display.warn, clock, sleep)
    asked = None if job_id is None else _Asked(scheduler, job_id, clock)
    said, lookout = "", Lookout(lambda silence_s: read_status(run, silence_s), clock)
    while True:
        document = read_patiently(lookout.look, display.warn, clock, sleep)
        if document["status"] == "failed" and document.get("begun") is False:
            raise _failed_early(run, document, _wait_for_end(job_id, scheduler, clock, sleep), scheduler)
        if document["status"] == "completed":
            return document, 0
        if document["status"] not in _ALIVE:
            return document, _exit_code(document, _wait_for_end(job_id, scheduler, clock, sleep))
        if document["status"] == "running" and document.get("waits_for"):
            text = f"waiting for workers: {document['waits_for']}"
            if text != said:
                display.phase(text)
            said = text
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
        if asked is not None:
            asked.ask(document)
            if asked.is_over and asked.updated_since(document):
                asked = job_id = None  # somebody else goes on with the run
            elif asked.is_over or (asked.is_silent and document["status"] == "submitted"):
                raise _lost(run, asked, document, scheduler)
            elif asked.job is not None and document["status"] == "submitted":
                text = f"job {asked.job_id} is {asked.job.status}"
                why = document.get("waits_for") or asked.job.message
                text += f": {why}" if why else ""
                if text != said:
                    display.phase(text)
                said = text
        sleep(_INTERVAL_S)


def _read_epochs(run: RunDirectory) -> int:
    """How many epochs the run has, as its description says, or its newest submission if it has not begun."""
    newest = None if run.exists() else run.submissions.read_newest()
    text = run.read_job() if newest is None else newest[1].description
    return int(parse(text, run.url).spec.train.epochs)


class _Asked:
    """What a cluster says of a job, which is asked now and then.

    Args:
        scheduler: The cluster.
        job_id: Of the job; the cluster has known it.
        clock: Seconds that only grow.
    """

    def __init__(self, scheduler: Scheduler, job_id: str, clock: Callable[[], float]) -> None:
        self.job_id = job_id
        self.job: Job | None = None
        """The last answer; none: the cluster does not know it any more, or was never reached."""
        self.error = ""
        """Why there was no answer the last time; empty: there was one."""
        self._scheduler, self._clock = scheduler, clock
        self._asked_at = -math.inf
        self._answered_at = clock()
        self._gone_at: float | None = None
        self._updated: float | None = None

    def ask(self, document: Mapping[str, Any]) -> None:
        """Asks the cluster, unless it was asked a moment ago.

        Args:
            document: How the run stands, read before this call and after the one before.
        """
        if self._gone_at is not None and self._updated is None:
            self._updated = document.get("updated")  # the last that the job's driver can have written
        if self._clock() - self._asked_at < _JOB_INTERVAL_S:
            return
        self._asked_at = self._clock()
        try:
            self.job = self._scheduler.read(self.job_id)
        except ClusterError as error:  # out of reach for now; the run directory tells how the run stands
            self.error = str(error)
            return
        self.error, self._answered_at = "", self._clock()
        if self.job is not None and self.job.status not in ENDED:
            self._gone_at = self._updated = None
        elif self._gone_at is None:
            self._gone_at = self._clock()

    @property
    def is_over(self) -> bool:
        """Whether the job ended, or was forgotten, so long ago that the run directory tells of the end of the run."""
        return self._gone_at is not None and self._clock() - self._gone_at > _LAST_WORDS_S

    @property
    def is_silent(self) -> bool:
        """Whether the cluster has not answered for a long time."""
        return self._clock() - self._answered_at > _PATIENCE_S

    def updated_since(self, document: Mapping[str, Any]) -> bool:
        """Whether the run shows signs of life that are younger than the end of the job."""
        return bool(document["status"] == "running" and document.get("updated") != self._updated)


def _exit_code(document: dict[str, Any], ended: Job | None) -> int:
    """That of the command which drove the run; if the cluster does not tell how its job ended, as the run did."""
    own = int(document["status"] == "failed")
    if ended is None or ended.exit_code is None or ended.exit_code < 0:  # a signal that killed it is no code of ours
        return own
    return ended.exit_code or own


def _failed_early(run: RunDirectory, document: dict[str, Any], ended: Job | None, scheduler: Scheduler) -> ClusterError:
    """What ended the job before the run began: as its log tells once it has ended, else as the directory does."""
    if ended is None:
        return _error(run, document["error"], document)
    return _error(run, f"{why_ended(ended, document, scheduler)}; submit the run again to go on", document)


def _wait_for_end(
    job_id: str | None, scheduler: Scheduler, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Job | None:
    """The job of a run that has ended, which ends a little later; none: it does not, or the cluster does not say."""
    deadline = clock() + _LAST_WORDS_S
    while job_id is not None and clock() < deadline:
        try:
            job = scheduler.read(job_id)
        except ClusterError:
            return None
        if job is None or job.status in ENDED:
            return job
        sleep(_INTERVAL_S)
    return None


def _lost(run: RunDirectory, asked: _Asked, document: dict[str, Any], scheduler: Scheduler) -> ClusterError:
    if asked.error:
        why = f"has not begun, and its cluster has not answered for {_PATIENCE_S / 60:.0f} minutes: {asked.error}"
        return _error(run, f"{why}; see whether it is up, and submit the run again", document)
    if asked.job is None:
        return _error(run, f"the cluster does not know job {asked.job_id} any more; submit the run again", document)
    return _error(run, f"{why_ended(asked.job, document, scheduler)}; submit the run again to go on", document)


def _error(run: RunDirectory, why: str, document: dict[str, Any]) -> ClusterError:
    error = ClusterError(f"{run.url}: {why}")
    error.document = document | {"status": "failed"}
    return error
