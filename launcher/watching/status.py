"""What a run directory says of its run, for someone who has nothing else."""

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
"""A driver elsewhere is said to be gone once its last sign of life is older: 55 s, within a minute of its death.

A driver gives a sign every ``STATUS_INTERVAL_S`` if its store is fast. If it is slow, the next sign follows the step of
its work for the store that it is at. A sign bears the time at which its write began, so that its age is at most that
write, a step, and the next write. What takes longer than ``HANGS_S`` counts, for the driver too, as failed by the
store. The rest, 10 s, is for clocks that differ.
"""
LONG_SILENCE_S = 120.0
"""After this long it counts as gone for those who act on it, or wait for it: its store, or its clock, may be at fault,
and a wrong word in a table is mended by the next look."""
_WATCH_S = 2 * STATUS_INTERVAL_S + 2.0
_CLOCK_ERROR_S = 3600.0
"""By how much the clocks of two machines may differ: stores refuse requests long before."""
_LOOK_INTERVAL_S = 0.5
NOT_BEGUN: dict[str, Any] = {
    "run": "", "status": "running", "step": 0, "epoch": 0, "samples": 0, "metrics": {}, "best": None, "workers": 0,
    "attempts": 0, "failure": None, "state_sha256": None, "seconds": 0.0,
}  # fmt: skip
"""What there is to say of a run that has not begun."""


def read_status(run: RunDirectory, silence_s: float = SILENCE_S) -> dict[str, Any]:
    """The ``--json`` document of a run, whoever wrote it last; a listing, and one small object.

    Args:
        run: Which.
        silence_s: How long a driver elsewhere may write nothing before it counts as gone.
    """
    status = run.read_status()
    is_gone = status is not None and status["status"] == "running" and _is_gone(status, silence_s)
    # Of a run that goes on, or is complete, the submission has nothing to add, and a listing of many costs less.
    if status is None or is_gone or status["status"] not in ("running", "completed"):
        unanswered = _unanswered_submission(run, status)
        if unanswered is not None:
            return NOT_BEGUN | without_driver(status or {}) | _submitted_document(run, *unanswered, silence_s)
    if status is None:
        return NOT_BEGUN | {"run": run.url, "status": "failed", "error": "it ended before its first step"}
    document = NOT_BEGUN | without_driver(status) | {"run": run.url}
    if is_gone:
        silent_s = time.time() - status["updated"]
        document |= {
            "status": "failed",
            "error": f"the driver on {status['host']} has said nothing for {silent_s:.0f} s; resume goes on",
        }
    return document


def about_submission(submission: Submission) -> dict[str, Any]:
    """Who submitted a run, when, to which cluster and as which job."""
    about = {"job": submission.job, "cluster": submission.cluster, "user": submission.user, "host": submission.host}
    return {**about, "submitted_at": submission.time}


def _unanswered_submission(
    run: RunDirectory, status: Mapping[str, Any] | None
) -> tuple[SubmissionReport, Submission] | None:
    """The newest submission of a run, if no driver has taken it, nor gone on with the run without it since.

    Args:
        run: Which.
        status: How the run stands; none: it never had a driver.
    """
    report = run.submissions.newest()
    if report is None or report.state in ("taken", "done"):
        return None
    newest = run.submissions.read_newest()
    if newest is None or (status is not None and status.get("claimed") != newest[1].claimed):
        return None
    return newest


def _submitted_document(
    run: RunDirectory, report: SubmissionReport, submission: Submission, silence_s: float
) -> dict[str, Any]:
    """What there is to say of a submission that no driver has taken; ``begun`` is false in no other document."""
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
    """A status without who wrote it."""
    return {name: value for name, value in status.items() if name not in DRIVER_KEYS}


def read_statuses(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """The ``--json`` documents of some runs; of one whose newest submission cannot be read, the error is in its own."""

    def document(run: RunDirectory) -> dict[str, Any]:
        try:
            return read_status(run)
        except UnreadableSubmissionError as error:
            about = {"run": run.url, "status": "failed", "error": str(error)}
            return NOT_BEGUN | without_driver(run.read_status() or {}) | about

    with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="status") as pool:
        return list(pool.map(document, runs))


def checkpoint_documents(run: RunDirectory, survey: Survey, *, verify: bool = False) -> list[dict[str, Any]]:
    """What is known of each checkpoint of a run, by step.

    Args:
        run: Whose they are.
        survey: What is there.
        verify: Read and hash all of them. Without it, ``good`` is none where nothing is known to be wrong.
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
    """Deletes what killed saves have left among the checkpoints of a run; bad checkpoints stay.

    Returns:
        What was there before.

    Raises:
        ClusterError: The run is going on: what looks like an orphan may be of a save under way.
    """
    before = refuse_if_running(run)
    survey = run.checkpoints.survey()
    if refuse_if_running(run) != before:
        raise ClusterError(f"{run.url}: was run while its checkpoints were looked at; nothing was removed, try again")
    run.checkpoints.remove_orphans(survey)
    return survey


def is_driven(run: RunDirectory, status: dict[str, Any]) -> bool:
    """Whether the driver that wrote this status is alive.

    From another machine, or container, that shows in what it writes: it may take two of its intervals to see. What it
    wrote at two moments is compared, for its clock need not agree with ours.
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
    """Looks at a run again and again, and tells when a driver elsewhere counts as gone.

    The clock of its host need not agree with ours: what it writes while it is watched shows that it lives.

    Args:
        read: Such as ``read_status`` of the run: how it stands, if a driver may have been silent for some seconds.
        clock: Seconds that only grow.
    """

    def __init__(self, read: Callable[[float], dict[str, Any]], clock: Callable[[], float]) -> None:
        self._read, self._clock = read, clock
        self._seen: float | None = None
        self._changed_at = self._looked_at = clock()

    def look(self) -> dict[str, Any]:
        """The ``--json`` document of the run."""
        document, now = self._read(_CLOCK_ERROR_S), self._clock()
        was_away = now - self._looked_at > HANGS_S  # the store, so that what the driver wrote was not seen
        if document["status"] != "running" or document.get("updated") != self._seen or was_away:
            self._seen, self._changed_at = document.get("updated"), now
        self._looked_at = now
        unchanged_s = now - self._changed_at
        if unchanged_s <= _WATCH_S:
            return document
        return self._read(LONG_SILENCE_S if unchanged_s <= LONG_SILENCE_S else -math.inf)


def refuse_if_running(run: RunDirectory) -> dict[str, Any]:
    """Raises if somebody drives the run, here or anywhere; else tells how it stands, to see whether that changes.

    Raises:
        ClusterError: The run is going on.
    """
    status, written = read_status(run, LONG_SILENCE_S), run.read_status()
    is_running = written is not None and written["status"] == "running"
    if status["status"] == "running" or (is_running and is_driven(run, dict(written or {}))):
        raise ClusterError(f"{run.url}: is running, at step {status['step']}; stop it first, nothing was changed")
    return {name: status[name] for name in ("status", "step", "attempts")}


def _bad(step: int, defect: CheckpointError) -> dict[str, Any]:
    return {"step": step, "good": False, "defect": str(defect)}


def _is_gone(status: dict[str, Any], silence_s: float) -> bool:
    alive = is_alive(status)
    return time.time() - status["updated"] > silence_s if alive is None else not alive
