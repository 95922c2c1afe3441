"""The job of a submitted run: its state on the cluster, combined with what the run directory says.

The run directory decides: once a driver has taken the run, the status in the directory counts. A cluster is asked only
if the user names one, for what the directory cannot know: whether the job waits, why it ended before a driver took the
run, and what it printed.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError, DescriptionError, StorageError
from cluster.inspection.nodes import without_report
from cluster.run.run_directory import RunDirectory, list_runs
from cluster.run.submissions import Submission
from cluster.scheduler import ENDED, Job, Scheduler
from cluster.storage.store import Store
from launcher.config.cluster_addresses import cluster_option, give_cluster
from launcher.watching.requeued import end_requeued, outcome_of, with_next_try
from launcher.watching.status import (
    LONG_SILENCE_S,
    NOT_BEGUN,
    SILENCE_S,
    about_submission,
    read_status,
    read_statuses,
    read_without_checkpoints,
    with_newest_checkpoint,
)

_STOP_INTERVAL_S = 0.5
_QUEUE_STOP_INTERVAL_S = 10.0
"""The same for a job in a queue: its site may count, and limit, what it is asked."""
_LOG_LINES = 3


class UnknownJobError(ClusterError):
    """The cluster answers, and does not know the job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedJob:
    """The last job of a run on the cluster that the user named.

    Attributes:
        run: The run.
        submission_id: The id of the run's newest submission to the cluster; of its newest to any cluster, if none.
        submission: The submission with this id.
        scheduler: The cluster that is asked; the run may have been submitted to another one.
        cluster: The address of the cluster that is asked.
    """

    run: RunDirectory
    submission_id: str
    submission: Submission
    scheduler: Scheduler
    cluster: str

    @property
    def id(self) -> str:
        """The cluster's id of the job."""
        return self.submission.job

    def read(self) -> Job:
        """Return the state of the job.

        Raises:
            ClusterError: The cluster does not answer.
            UnknownJobError: It does not know the job.
        """
        job = self.scheduler.read(self.id)
        if job is None:
            raise UnknownJobError(
                f"{self.cluster}: knows no job {self.id}; {self.run.url} was submitted to "
                f"{self.submission.cluster}: {give_cluster(self.submission.cluster)}, or submit the run again"
            )
        return job

    def log(self) -> str:
        """Return what the job has printed so far.

        Raises:
            ClusterError: The cluster does not answer, or does not know the job.
        """
        return without_report(self.scheduler.log(self.id))

    def is_due(self) -> bool:
        """Return whether the job has yet to take the run."""
        return self.run.submissions.standing(self.submission_id) == "due"

    def is_alive(self, end_by: float) -> bool:
        """Return whether the cluster knows the job, and it has not ended.

        Args:
            end_by: Until when a job that runs may end, by ``time.monotonic``.

        Raises:
            ClusterError: The cluster does not answer.
        """
        while (job := self.scheduler.read(self.id)) is not None and job.status == "running":
            if time.monotonic() >= end_by:
                return True
            time.sleep(self._interval_s)
        return job is not None and job.status not in ENDED

    def document(self, silence_s: float = SILENCE_S) -> dict[str, Any]:
        """Return the ``--json`` document of the run, see ``read_status``, with the state of the job.

        ``job_status`` is None if the state is unknown; ``job_message`` then says why.
        """
        return with_newest_checkpoint(self.run, self._document(silence_s))

    def _document(self, silence_s: float) -> dict[str, Any]:
        """Return the same without a look at the checkpoints."""
        job, unknown, is_forgotten = None, "", False
        try:
            job = self.read()  # before the directory, so that what the job wrote before it ended is seen
        except ClusterError as error:
            unknown = str(error)
            is_forgotten = isinstance(error, UnknownJobError) and self.cluster == self.submission.cluster
        document = read_without_checkpoints(self.run, silence_s)
        newest = document.get("cluster", self.submission.cluster)
        if newest != self.submission.cluster:  # the run was submitted elsewhere since
            status = unknown if job is None else f"{self.cluster}: job {job.id} is {job.status}"
            unknown = f"{status}; the run was submitted to {newest} since: {give_cluster(newest)}"
            return document | {"job_status": None, "job_message": unknown}
        document |= about_submission(self.submission)
        if job is None:
            document |= {"job_status": None, "job_message": unknown}
            return _with_forgotten_job(document) if is_forgotten else document
        document = with_next_try(document, job)
        if not _ended_without_driver(document, job):
            return document | _about(job)
        why = why_ended(job, document, self.scheduler)
        log = f"`launcher logs {shlex.quote(self.run.url)} {cluster_option(self.cluster)}` shows its log"
        ended = {"status": _outcome(document, job), "error": f"{why}; {log}; submit the run again"}
        return document | _about(job) | ended

    def stopped(self, deadline: float) -> dict[str, Any]:
        """Stop the job of a run that no live driver has, and wait for the job's end; mark as stopped the submission, or
        the run if it was to start again.

        If the job has ended by itself, or its own cluster does not know it, nothing is stopped. The submission or the
        run is marked all the same, as failed if the job has failed, for commands that ask no cluster.

        Args:
            deadline: When to give up, by ``time.monotonic``.

        Returns:
            The ``--json`` document of the run.

        Raises:
            ClusterError: The job does not end in time; or the cluster does not know it and is not its own cluster.
        """
        is_own = self.cluster == self.submission.cluster
        job = self.scheduler.read(self.id) if is_own else self.read()
        if job is None:
            if self._is_unanswered():
                self.run.submissions.mark_stopped(self.submission_id)
            self._end_requeued()
            return read_status(self.run, LONG_SILENCE_S)
        if job.status in ("succeeded", "failed"):
            document = self.document(LONG_SILENCE_S)
            if self._is_unanswered():
                self.run.submissions.mark_failed(self.submission_id, _last_output(job, self.scheduler))
            outcome = outcome_of(job)
            self._end_requeued(outcome, document.get("error") if outcome == "failed" else None)
            return document
        if job.status not in ENDED:
            self.scheduler.stop(self.id)
        while (job := self.read()).status not in ENDED:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{self.cluster}: job {self.id} is {job.status}, and has not ended since it was asked to stop; "
                    "look at `launcher status`, or wait with --timeout"
                )
            time.sleep(self._interval_s)
        if self.is_due():  # no driver has taken the run meanwhile
            self.run.submissions.mark_stopped(self.submission_id)
        self._end_requeued()
        return read_status(self.run, LONG_SILENCE_S)

    @property
    def _interval_s(self) -> float:
        """How often the cluster is asked whether the job has ended."""
        return _STOP_INTERVAL_S if self.scheduler.starts_at_once else _QUEUE_STOP_INTERVAL_S

    def _end_requeued(self, outcome: str = "stopped", error: str | None = None) -> None:
        """Record the end of the run if it is requeued, unless it waits for another job than this one."""
        if self.run.submissions.standing(self.submission_id) == "taken":
            end_requeued(self.run, outcome, error)

    def _is_unanswered(self) -> bool:
        """Return whether the submission is still marked as waiting."""
        states = {report.id: report.state for report in self.run.submissions.reports()}
        return states.get(self.submission_id) == "waiting"


def submitted_job(run: RunDirectory, scheduler: Scheduler, cluster: str) -> SubmittedJob:
    """Return the job of a run on a cluster, without asking the cluster.

    Raises:
        DescriptionError: The run was never submitted.
    """
    there = (each for each in run.submissions.readable() if each[1].cluster == cluster)
    found = next(there, None) or run.submissions.read_newest()  # a cluster may have several addresses
    if found is None:
        raise DescriptionError(f"{run.url}: was not submitted, so that it is no job of a cluster; leave out --cluster")
    report, submission = found
    return SubmittedJob(
        run=run,
        submission_id=report.id,
        submission=submission,
        scheduler=scheduler,
        cluster=cluster,
    )


def read_statuses_with_jobs(
    store: Store, scheduler: Scheduler, cluster: str, warn: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return the ``--json`` documents of the runs in a store; those that wait for their job with its state.

    Jobs follow that wait on the cluster for a run that is not in the store.

    Args:
        store: The store.
        scheduler: The cluster. If it does not answer, that is a warning, since the runs are in the store.
        cluster: The address of the cluster.
        warn: Receives a warning.
    """
    jobs: list[Job] = []
    knows = None  # no answer says nothing of a job
    try:
        jobs = scheduler.jobs()  # before the runs, so that what a job wrote before it ended is seen
        knows = cluster
    except ClusterError as error:
        warn(str(error))
    by_id = {job.id: job for job in jobs}
    runs = read_statuses(list_runs(store))
    documents = [_with_job(document, by_id.get(document.get("job", "")), knows) for document in runs]
    known = {document["run"] for document in documents}
    pending = [job for job in jobs if job.status == "pending" and job.metadata.get("run", "") not in ("", *known)]
    waiting = [job for job in pending if _is_submitted(job)]
    return [*documents, *(_document_of_job(job, cluster) for job in waiting)]


def why_ended(job: Job, document: Mapping[str, Any], scheduler: Scheduler) -> str:
    """Return how and why a job ended, in one line: the end of its log, or the cluster's message if there is none.

    Args:
        job: A job that has ended.
        document: The status of its run.
        scheduler: The cluster, which has the log.
    """
    when = f"at step {document['step']}" if _has_begun(document) else "before the run began"
    ended = "was stopped" if job.status == "stopped" else "ended"
    code = "" if job.exit_code is None else f", with exit code {job.exit_code}"
    return f"job {job.id} {ended} {when}{code}: {_last_output(job, scheduler)}"


def _last_output(job: Job, scheduler: Scheduler) -> str:
    """Return the error lines, else the last lines, of a job's log, or the cluster's message if there is no log."""
    why = [job.message] if job.message else []
    with contextlib.suppress(ClusterError):  # the log may be lost with its host
        lines = [line.strip() for line in without_report(scheduler.log(job.id)).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        why = (errors or lines)[-_LOG_LINES:] or why
    return " | ".join(why) or "the cluster does not say why"


def _with_job(document: dict[str, Any], job: Job | None, knows: str | None) -> dict[str, Any]:
    """Add the state of its job to the document of a run that has not begun, or that its scheduler starts again.

    Args:
        document: The document.
        job: The job; None: it is not known.
        knows: The cluster that has told all jobs that it knows; None: none has.
    """
    if job is None:
        return _with_forgotten_job(document) if document.get("cluster") == knows else document
    document = with_next_try(document, job)
    if _has_begun(document) and document["status"] != "requeued":
        return document
    if not _ended_without_driver(document, job):
        return document | _about(job)
    ended = {"status": _outcome(document, job), "error": document["error"] or job.message or None}
    return document | _about(job) | ended


def _with_forgotten_job(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document of a run whose cluster answers, and does not know its job any more."""
    if document["status"] != "requeued":
        return document
    why = f"{document['cluster']}: does not know job {document['job']} any more, which was to start the run again"
    return document | {"status": "stopped", "error": f"{why}; submit the run again"}


def _ended_without_driver(document: Mapping[str, Any], job: Job) -> bool:
    """Return whether a job ended before a driver took its run, or took it again."""
    has_no_driver = document["status"] in ("submitted", "failed") and not _has_begun(document)
    return (has_no_driver or document["status"] == "requeued") and job.status in ENDED


def _has_begun(document: Mapping[str, Any]) -> bool:
    return bool(document.get("begun", document["status"] != "submitted"))


def _is_submitted(job: Job) -> bool:
    """Return whether the submission of a job is written; until then its run may be refused. True if unknown."""
    try:
        return RunDirectory(job.metadata["run"]).submissions.is_there(job.metadata["submission"])
    except (StorageError, KeyError):  # a store without access; a job of an older launcher
        return True


def _outcome(document: Mapping[str, Any], job: Job) -> str:
    return outcome_of(job) if document["status"] == "requeued" or job.status == "stopped" else "failed"


def _about(job: Job) -> dict[str, Any]:
    return {"job_status": job.status, "job_message": job.message}


def _document_of_job(job: Job, cluster: str) -> dict[str, Any]:
    """Return the document of a run of which only the job is known."""
    return {
        **NOT_BEGUN,
        "run": job.metadata["run"],
        "status": "submitted",
        "error": None,
        "begun": False,
        "updated": job.began_at,
        "job": job.id,
        "cluster": cluster,
        "user": job.metadata.get("user"),
        "host": job.metadata.get("host"),
        "submitted_at": job.began_at,
        **_about(job),
    }
