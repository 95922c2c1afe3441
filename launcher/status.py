"""What a run directory says of its run, for someone who has nothing else."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.checkpoints import CONCURRENT_REQUESTS, Survey
from cluster.claims import DRIVER_KEYS, STATUS_INTERVAL_S, is_alive
from cluster.errors import CheckpointError, ClusterError
from cluster.run_directory import RunDirectory

_FOLLOW_INTERVAL_S = 2.0
_STOP_INTERVAL_S = 0.5
_SILENCE_S = 120.0
"""A driver writes every few seconds; one that has not for this long is gone."""
_WATCH_S = 2 * STATUS_INTERVAL_S + 2.0
_NOT_BEGUN: dict[str, Any] = {
    "run": "", "status": "running", "step": 0, "epoch": 0, "samples": 0, "metrics": {}, "best": None, "workers": 0,
    "attempts": 0, "failure": None, "state_sha256": None, "seconds": 0.0,
}  # fmt: skip
"""What there is to say of a run that has not begun."""


def read_status(run: RunDirectory) -> dict[str, Any]:
    """The ``--json`` document of a run, whoever wrote it last; a listing, and one small object."""
    status = run.read_status()
    is_gone = status is not None and status["status"] == "running" and _is_gone(status)
    # Of a run that goes on, or is complete, the submission has nothing to add, and a listing of many costs less.
    if status is None or is_gone or status["status"] not in ("running", "completed"):
        submission = run.read_submission()
        if submission is not None and not is_begun(submission, status):
            return _NOT_BEGUN | without_driver(status or {}) | submitted_document(run, submission)
    if status is None:
        return _NOT_BEGUN | {"run": run.url, "status": "failed", "error": "it ended before its first step"}
    document = _NOT_BEGUN | without_driver(status) | {"run": run.url}
    if is_gone:
        silent_s = time.time() - status["updated"]
        document |= {
            "status": "failed",
            "error": f"the driver on {status['host']} has said nothing for {silent_s:.0f} s; resume goes on",
        }
    return document


def is_begun(submission: Mapping[str, Any], status: Mapping[str, Any] | None) -> bool:
    """Whether some driver has taken a run since it was submitted; clocks of two machines are not compared.

    Args:
        submission: The last one.
        status: How the run stands; none: it never had a driver.
    """
    return (status or {}).get("claimed") != submission.get("driver_before")


def submitted_document(run: RunDirectory, submission: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of a submission that no driver has taken up yet."""
    about = {name: submission.get(name) for name in ("job", "cluster", "user", "host")}
    return {"run": run.url, "status": "submitted", "error": None, "updated": submission.get("time"), **about}


def without_driver(status: dict[str, Any]) -> dict[str, Any]:
    """A status without who wrote it."""
    return {name: value for name, value in status.items() if name not in DRIVER_KEYS}


def stop_run(run: RunDirectory, timeout_s: float) -> dict[str, Any]:
    """Asks a run to save and stop, and waits until it has; one that is not running is left as it is.

    Returns:
        The ``--json`` document at the end.

    Raises:
        ClusterError: It is still running after ``timeout_s`` seconds, or has not begun: nobody would read the request.
    """
    deadline = time.monotonic() + timeout_s
    status = read_status(run)
    if status["status"] == "submitted":
        raise ClusterError(
            f"{run.url}: has not begun yet; stop its job, {status['job']}, on {status['cluster']}, or ask again once "
            "it runs"
        )
    if status["status"] == "running":
        run.request_stop()
    while status["status"] == "running":
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{run.url}: still running {timeout_s:.0f} s after it was asked to stop, at step {status['step']}; "
                "it stops when its step and its save are done: look at `launcher status`, or wait with --timeout"
            )
        time.sleep(_STOP_INTERVAL_S)
        status = read_status(run)
    return status


def read_statuses(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """The ``--json`` documents of some runs."""
    with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="status") as pool:
        return list(pool.map(read_status, runs))


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


def log_pieces(run: RunDirectory, worker: int | None, *, follow: bool) -> Iterator[tuple[str, str]]:
    """(log, text) for every log of a run and, with ``follow``, for what is added to one, until the run has ended."""
    shown: dict[str, int] = {}
    while True:
        is_last = not follow or read_status(run)["status"] not in ("running", "submitted")
        for name in run.log_names(rank=worker):
            text = run.read_log(name).decode(errors="replace")
            new = text[shown.get(name, 0) :]
            shown[name] = len(text)
            if new:
                yield name, new
        if is_last:
            return
        time.sleep(_FOLLOW_INTERVAL_S)


def is_driven(run: RunDirectory, status: dict[str, Any]) -> bool:
    """Whether the driver that wrote this status is alive.

    From another machine, or container, that shows in what it writes: it may take two of its intervals to see. What it
    wrote at two moments is compared, for its clock need not agree with ours.
    """
    alive = is_alive(status)
    if alive is not None or _is_gone(status):
        return bool(alive)
    deadline = time.monotonic() + _WATCH_S
    while time.monotonic() < deadline:
        time.sleep(_STOP_INTERVAL_S)
        newest = run.read_status()
        if newest != status:
            return newest is not None and newest["status"] == "running"
    return False


def refuse_if_running(run: RunDirectory) -> dict[str, Any]:
    """Raises if somebody drives the run, here or anywhere; else tells how it stands, to see whether that changes.

    Raises:
        ClusterError: The run is going on.
    """
    status = read_status(run)
    if status["status"] == "running":
        raise ClusterError(f"{run.url}: is running, at step {status['step']}; stop it first, nothing was changed")
    return {name: status[name] for name in ("status", "step", "attempts")}


def _bad(step: int, defect: CheckpointError) -> dict[str, Any]:
    return {"step": step, "good": False, "defect": str(defect)}


def _is_gone(status: dict[str, Any]) -> bool:
    alive = is_alive(status)
    return time.time() - status["updated"] > _SILENCE_S if alive is None else not alive
