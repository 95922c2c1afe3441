"""The job of a run that was submitted, as its cluster tells of it, beside what the run directory says.

The run directory has the first word: once a driver has taken the run, it says how the run stands. A cluster is asked
only if a person names one, for what the directory cannot know: whether the job waits, why it ended before a driver
took the run, and what it printed.
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
from launcher.watching.status import LONG_SILENCE_S, NOT_BEGUN, SILENCE_S, about_submission, read_status, read_statuses

_STOP_INTERVAL_S = 0.5
_LOG_LINES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedJob:
    """The job that a run was submitted as last, on the cluster that a person names.

    Attributes:
        run: Whose job it is.
        submission_id: Of its newest submission to the cluster; of its newest one, if it knows of none.
        submission: That.
        scheduler: The cluster that is asked; it need not be the one that the run was submitted to.
        cluster: What to call that.
    """

    run: RunDirectory
    submission_id: str
    submission: Submission
    scheduler: Scheduler
    cluster: str

    @property
    def id(self) -> str:
        """What the cluster calls it."""
        return self.submission.job

    def read(self) -> Job:
        """How the job is.

        Raises:
            ClusterError: The cluster does not say, or knows of no such job.
        """
        job = self.scheduler.read(self.id)
        if job is None:
            raise ClusterError(
                f"{self.cluster}: knows no job {self.id}; {self.run.url} was submitted to "
                f"{self.submission.cluster}: give --cluster that, or submit the run again"
            )
        return job

    def log(self) -> str:
        """What the job has printed so far.

        Raises:
            ClusterError: The cluster does not give it, or knows of no such job.
        """
        return without_report(self.scheduler.log(self.id))

    def is_due(self) -> bool:
        """Whether the job has yet to take the run."""
        return self.run.submissions.standing(self.submission_id) == "due"

    def document(self, silence_s: float = SILENCE_S) -> dict[str, Any]:
        """The ``--json`` document of the run, see ``read_status``, with what the cluster says of the job.

        ``job_status`` is none if the cluster does not say; then ``job_message`` tells why.
        """
        job, unknown = None, ""
        try:
            job = self.read()  # before the directory: what the job has written there before it ended is seen
        except ClusterError as error:
            unknown = str(error)
        document = read_status(self.run, silence_s)
        newest = document.get("cluster", self.submission.cluster)
        if newest != self.submission.cluster:  # the job that is asked for tells nothing of that one
            status = unknown if job is None else f"{self.cluster}: job {job.id} is {job.status}"
            unknown = f"{status}; the run was submitted to {newest} since: give --cluster that"
            return document | {"job_status": None, "job_message": unknown}
        document |= about_submission(self.submission)
        if job is None:
            return document | {"job_status": None, "job_message": unknown}
        if not _ended_before(document, job):
            return document | _about(job)
        why = why_ended(job, document, self.scheduler)
        log = f"`launcher logs {shlex.quote(self.run.url)} --cluster {shlex.quote(self.cluster)}` shows its log"
        return document | _about(job) | {"status": _outcome(job), "error": f"{why}; {log}; submit the run again"}

    def stopped(self, deadline: float) -> dict[str, Any]:
        """Stops the job of a run that has not begun, and waits for its end; then the run is stopped.

        A job that has failed is left as it is. The submission is answered then, for those who ask no cluster; so is one
        whose job its own cluster does not know.

        Args:
            deadline: Until when to wait, by ``time.monotonic``.

        Returns:
            The ``--json`` document of the run.

        Raises:
            ClusterError: The cluster does not stop it in time; or it knows of no such job, and is not its own.
        """
        is_own = self.cluster == self.submission.cluster
        job = self.scheduler.read(self.id) if is_own else self.read()
        if job is None:
            if self._is_unanswered():
                self.run.submissions.mark_stopped(self.submission_id)
            return read_status(self.run, LONG_SILENCE_S)
        if job.status in ("succeeded", "failed"):
            document = self.document(LONG_SILENCE_S)
            if self._is_unanswered():
                self.run.submissions.mark_failed(self.submission_id, _last_words(job, self.scheduler))
            return document
        if job.status not in ENDED:
            self.scheduler.stop(self.id)
        while (job := self.read()).status not in ENDED:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{self.cluster}: job {self.id} is {job.status}, and has not ended since it was asked to stop; "
                    "look at `launcher status`, or wait with --timeout"
                )
            time.sleep(_STOP_INTERVAL_S)
        if self.is_due():  # no driver took it meanwhile
            self.run.submissions.mark_stopped(self.submission_id)
        return read_status(self.run, LONG_SILENCE_S)

    def _is_unanswered(self) -> bool:
        """Whether the run directory does not tell how the job ended."""
        states = {report.id: report.state for report in self.run.submissions.reports()}
        return states.get(self.submission_id) == "waiting"


def submitted_job(run: RunDirectory, scheduler: Scheduler, cluster: str) -> SubmittedJob:
    """The job of a run, on a cluster; that is not asked yet.

    Raises:
        DescriptionError: The run was never submitted.
    """
    there = (each for each in run.submissions.readable() if each[1].cluster == cluster)
    found = next(there, None) or run.submissions.read_newest()  # the cluster may be known by several addresses
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
    """The ``--json`` documents of the runs in a store, with what a cluster says of the jobs of those not begun.

    Jobs that wait there for a run that is not in the store follow: nobody has begun what a job waits for.

    Args:
        store: Of the runs.
        scheduler: The cluster. If it does not answer, that is a warning, for the runs are in their store.
        cluster: What to call it.
        warn: Says a warning.
    """
    jobs: list[Job] = []
    try:
        jobs = scheduler.jobs()  # before the runs: what a job has written before it ended is there
    except ClusterError as error:
        warn(str(error))
    by_id = {job.id: job for job in jobs}
    documents = read_statuses(list_runs(store))
    told = [_told(document, by_id.get(document.get("job", ""))) for document in documents]
    known = {document["run"] for document in told}
    pending = [job for job in jobs if job.status == "pending" and job.metadata.get("run", "") not in ("", *known)]
    waiting = [job for job in pending if _is_submitted(job)]
    return [*told, *(_queued(job, cluster) for job in waiting)]


def why_ended(job: Job, document: Mapping[str, Any], scheduler: Scheduler) -> str:
    """How and why a job ended, in a line: from the end of its log, or what the cluster says if there is none.

    Args:
        job: Which has ended.
        document: How its run stands.
        scheduler: Has the log.
    """
    when = f"at step {document['step']}" if _has_begun(document) else "before the run began"
    ended = "was stopped" if job.status == "stopped" else "ended"
    code = "" if job.exit_code is None else f", with exit code {job.exit_code}"
    return f"job {job.id} {ended} {when}{code}: {_last_words(job, scheduler)}"


def _last_words(job: Job, scheduler: Scheduler) -> str:
    """Why a job ended: the end of its log, or what the cluster says if there is none."""
    why = [job.message] if job.message else []
    with contextlib.suppress(ClusterError):  # it may be lost with its host
        lines = [line.strip() for line in without_report(scheduler.log(job.id)).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        why = (errors or lines)[-_LOG_LINES:] or why
    return " | ".join(why) or "the cluster does not say why"


def _told(document: dict[str, Any], job: Job | None) -> dict[str, Any]:
    if job is None or _has_begun(document):
        return document
    if not _ended_before(document, job):
        return document | _about(job)
    return document | _about(job) | {"status": _outcome(job), "error": document["error"] or job.message or None}


def _ended_before(document: Mapping[str, Any], job: Job) -> bool:
    """Whether a job ended before a driver took its run."""
    return document["status"] in ("submitted", "failed") and not _has_begun(document) and job.status in ENDED


def _has_begun(document: Mapping[str, Any]) -> bool:
    return bool(document.get("begun", document["status"] != "submitted"))


def _is_submitted(job: Job) -> bool:
    """Whether the submission of a job is written, as far as its store says: until then the run may yet be refused."""
    try:
        return RunDirectory(job.metadata["run"]).submissions.is_there(job.metadata["submission"])
    except (StorageError, KeyError):  # a store that is not for everybody; a job of an older launcher
        return True


def _outcome(job: Job) -> str:
    return "stopped" if job.status == "stopped" else "failed"


def _about(job: Job) -> dict[str, Any]:
    return {"job_status": job.status, "job_message": job.message}


def _queued(job: Job, cluster: str) -> dict[str, Any]:
    """The document of a run of which only its job is known."""
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
