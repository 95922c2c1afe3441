"""Reads the status of a run, and of its checkpoints, from its directory alone."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.errors import CheckpointError, ClusterError
from cluster.run.checkpoints import CONCURRENT_REQUESTS, Survey
from cluster.run.lease import DRIVER_KEYS, STATUS_INTERVAL_S, is_alive
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, SubmissionReport, UnreadableSubmissionError
from launcher.driver.background_writer import HANGS_S

SILENCE_S = 3 * HANGS_S + 10.0
"""A driver on another host counts as gone once its last status is this old: 55 s, within a minute of its death.

A driver writes its status every ``STATUS_INTERVAL_S`` if its store is fast. If the store is slow, the next write waits
for the background writer's current operation. A status carries the time at which its write began, so its age is at most
that write, one operation, and the next write. Any of the three that takes longer than ``HANGS_S`` counts as failed, for
the driver too. The remaining 10 s allow for clocks that differ.
"""
LONG_SILENCE_S = 120.0
"""The same limit for code that acts on the answer or waits for it: a slow store or a wrong clock must not mislead it.
In a table, a wrong status is corrected by the next read."""
_WATCH_S = 2 * STATUS_INTERVAL_S + 2.0
"""How long a live driver may take to write its status again."""
_CLOCK_ERROR_S = 3600.0
"""The largest difference between the clocks of two machines: stores refuse requests long before."""
_LOOK_INTERVAL_S = 0.5
NOT_BEGUN: dict[str, Any] = {
    "run": "", "status": "running", "step": 0, "saved_step": None, "epoch": 0, "samples": 0, "metrics": {},
    "best": None, "workers": 0, "attempts": 0, "failure": None, "state_sha256": None, "seconds": 0.0,
}  # fmt: skip
"""The status document of a run that has not begun."""


def read_status(run: RunDirectory, silence_s: float = SILENCE_S) -> dict[str, Any]:
    """Return the ``--json`` document of a run.

    Of a run that goes on or is complete it costs one listing and one small object.

    Args:
        run: The run.
        silence_s: How long a driver on another host may write nothing before it counts as gone, in seconds.
    """
    return with_newest_checkpoint(run, read_without_checkpoints(run, silence_s))


def with_newest_checkpoint(run: RunDirectory, document: dict[str, Any]) -> dict[str, Any]:
    """Return the document of a run; if the run has stopped or failed, with the step from which ``resume`` goes on.

    The last status of a driver may be older than its last checkpoint, which may be bad or gone, too.
    """
    if document["status"] not in ("stopped", "requeued", "failed"):
        return document
    return document | {"saved_step": max(run.checkpoints.survey().manifests, default=None)}


def read_without_checkpoints(run: RunDirectory, silence_s: float = SILENCE_S) -> dict[str, Any]:
    """Return the same without a look at the checkpoints, for tables; ``saved_step`` is what the last driver wrote.

    Only the document of a run that counts as failed because its driver is lost has ``claimed``, the time at which that
    driver had taken its lease.
    """
    status = run.read_status()
    # For a run that goes on or is complete, the submission adds nothing; skipping it makes listings cheap.
    if not _goes_on_or_is_complete(status, silence_s):
        newest = run.submissions.newest()
        if newest is not None and newest.state in ("taken", "done"):
            status = run.read_status()  # a driver may have taken it since the status was read
        elif newest is not None:
            unanswered = _unanswered_submission(run, status)
            if unanswered is not None:
                return NOT_BEGUN | without_driver(status or {}) | _submitted_document(run, *unanswered, silence_s)
    if status is None:
        return NOT_BEGUN | {"run": run.url, "status": "failed", "error": "it ended before its first step"}
    document = NOT_BEGUN | without_driver(status) | {"run": run.url}
    if status["status"] == "running" and _is_gone(status, silence_s):
        silent_s = time.time() - status["updated"]
        document |= {
            "status": "failed",
            "error": f"the driver on {status['host']} has said nothing for {silent_s:.0f} s; resume goes on",
            "claimed": status["claimed"],
        }
    if document["status"] == "requeued" or "claimed" in document:
        document |= job_of(run)
    return document


def about_submission(submission: Submission) -> dict[str, Any]:
    """Return the keys that tell who submitted a run, when, to which cluster and as which job."""
    about = {"job": submission.job, "cluster": submission.cluster, "user": submission.user, "host": submission.host}
    return {**about, "submitted_at": submission.time}


def job_of(run: RunDirectory) -> dict[str, Any]:
    """Return the keys about the job that has the run, which its scheduler starts again; empty if it is not known."""
    taken = [report.id for report in run.submissions.reports() if report.state == "taken"]
    with contextlib.suppress(UnreadableSubmissionError):
        return about_submission(run.submissions.read(taken[-1])) if taken else {}
    return {}


def _unanswered_submission(
    run: RunDirectory, status: Mapping[str, Any] | None
) -> tuple[SubmissionReport, Submission] | None:
    """Return the newest submission of a run if none has driven the run since it was written.

    Args:
        run: The run.
        status: The status of the run. None: it never had a driver.
    """
    newest = run.submissions.read_newest()
    if newest is None or (status is not None and status.get("claimed") != newest[1].claimed):
        return None
    return newest


def _submitted_document(
    run: RunDirectory, report: SubmissionReport, submission: Submission, silence_s: float
) -> dict[str, Any]:
    """Return the status of a submission that no driver has taken; only here is ``begun`` False."""
    status, error, waits_for = "submitted", None, None
    if report.state == "stopped":
        status = "stopped"
    elif report.state == "failed":
        failure = run.submissions.read_failure(report.id)
        status = "failed"
        error = f"job {submission.job} ended before the run began: {failure}; submit the run again"
    elif (sign := run.submissions.read_sign(report.id)) is not None:
        silent_s, waits_for = time.time() - sign.time, sign.doing
        if silent_s > silence_s:
            status, waits_for = "failed", None
            said = f"has said nothing for {silent_s:.0f} s, before the run began ({sign.doing})"
            error = f"job {submission.job} {said}; submit the run again"
    about = {"run": run.url, "status": status, "error": error, "begun": False, "updated": submission.time}
    return about | {"waits_for": waits_for} | about_submission(submission)


def without_driver(status: dict[str, Any]) -> dict[str, Any]:
    """Return a status without the keys about the driver that wrote it."""
    return {name: value for name, value in status.items() if name not in DRIVER_KEYS}


def read_statuses(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Return the ``--json`` documents of some runs; an unreadable submission becomes the error of its own run."""

    def document(run: RunDirectory) -> dict[str, Any]:
        try:
            return read_without_checkpoints(run)
        except UnreadableSubmissionError as error:
            about = {"run": run.url, "status": "failed", "error": str(error)}
            return NOT_BEGUN | without_driver(run.read_status() or {}) | about

    with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="status") as pool:
        return list(pool.map(document, runs))


def checkpoint_documents(run: RunDirectory, survey: Survey, *, verify: bool = False) -> list[dict[str, Any]]:
    """Return a document about each checkpoint of a run, in order of steps.

    Args:
        run: The run.
        survey: The checkpoints in its directory.
        verify: Read and hash every checkpoint. If False, ``good`` is None unless a defect is known.
    """
    documents = [_bad(step, defect) for step, defect in survey.defects.items()]
    for step, manifest in survey.manifests.items():
        document = {
            "step": step,
            "good": True if verify else None,
            "bytes": manifest.size,
            "created": manifest.created,
            "state_sha256": manifest.state_sha256,
            "metrics": dict(manifest.metrics),
        }
        try:
            if verify:
                run.checkpoints.verify(manifest)
        except CheckpointError as defect:
            if not run.checkpoints.exists(step):  # a live run has deleted it meanwhile
                continue
            document = _bad(step, defect)
        documents.append(document)
    return sorted(documents, key=lambda document: document["step"])


def remove_orphans(run: RunDirectory) -> Survey:
    """Delete what killed saves have left among the checkpoints of a run; bad checkpoints stay.

    Returns:
        The survey from before the deletion.

    Raises:
        ClusterError: The run is running: what looks like an orphan may belong to a save in progress.
    """
    before = refuse_if_running(run)
    survey = run.checkpoints.survey()
    if refuse_if_running(run) != before:
        raise ClusterError(f"{run.url}: was run while its checkpoints were looked at; nothing was removed, try again")
    run.checkpoints.remove_orphans(survey)
    return survey


def is_driven(run: RunDirectory, status: dict[str, Any]) -> bool:
    """Return whether the driver that wrote this status is alive.

    For a driver on another machine or in another container, watch for its next write, for up to two of its intervals.
    Two statuses are compared with each other and not with this machine's clock, which may differ from the driver's.
    """
    alive = is_alive(status)
    if alive is not None or _is_gone(status, _CLOCK_ERROR_S):
        return bool(alive)
    deadline = time.monotonic() + _WATCH_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_INTERVAL_S)
        newest = run.read_status()
        if newest != status:
            return newest is not None and newest["status"] == "running"
    return False


class Lookout:
    """Reads the status of a run repeatedly, and decides when a driver on another host counts as gone.

    A driver that keeps writing is alive, even if the clock of its host differs from this one's.

    Args:
        read: Returns the status, given how many seconds a driver may be silent; such as ``read_status`` of the run.
        clock: Monotonic seconds.
    """

    def __init__(self, read: Callable[[float], dict[str, Any]], clock: Callable[[], float]) -> None:
        self._read, self._clock = read, clock
        self._last_updated: float | None = None
        self._changed_at = self._looked_at = clock()

    def look(self) -> dict[str, Any]:
        """Return the ``--json`` document of the run."""
        document, now = self._read(_CLOCK_ERROR_S), self._clock()
        was_away = now - self._looked_at > HANGS_S  # the store did not answer, so writes of the driver were missed
        if document["status"] != "running" or document.get("updated") != self._last_updated or was_away:
            self._last_updated, self._changed_at = document.get("updated"), now
        self._looked_at = now
        unchanged_s = now - self._changed_at
        if unchanged_s <= _WATCH_S:
            return document
        return self._read(LONG_SILENCE_S if unchanged_s <= LONG_SILENCE_S else -math.inf)


def refuse_if_running(run: RunDirectory) -> dict[str, Any]:
    """Raise if a driver is alive, on this host or another; else return a digest of the status, to detect a change.

    Raises:
        ClusterError: The run is running.
    """
    status, written = read_without_checkpoints(run, LONG_SILENCE_S), run.read_status()
    is_running = written is not None and written["status"] == "running"
    if status["status"] == "running" or (is_running and is_driven(run, dict(written or {}))):
        raise ClusterError(f"{run.url}: is running, at step {status['step']}; stop it first, nothing was changed")
    return {name: status[name] for name in ("status", "step", "attempts")}


def _bad(step: int, defect: CheckpointError) -> dict[str, Any]:
    return {"step": step, "good": False, "defect": str(defect)}


def _goes_on_or_is_complete(status: dict[str, Any] | None, silence_s: float) -> bool:
    if status is None:
        return False
    return status["status"] == "completed" or (status["status"] == "running" and not _is_gone(status, silence_s))


def _is_gone(status: dict[str, Any], silence_s: float) -> bool:
    alive = is_alive(status)
    return time.time() - status["updated"] > silence_s if alive is None else not alive
