"""What a run directory says of its run, for someone who has nothing else."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.claims import STATUS_INTERVAL_S
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
    if status is None:
        return _NOT_BEGUN | {"run": run.url, "status": "failed", "error": "it ended before its first step"}
    document = _NOT_BEGUN | without_driver(status) | {"run": run.url}
    if status["status"] == "running" and _is_gone(status):
        silent_s = time.time() - status["updated"]
        document |= {
            "status": "failed",
            "error": f"the driver on {status['host']} has said nothing for {silent_s:.0f} s; resume goes on",
        }
    return document


def without_driver(status: dict[str, Any]) -> dict[str, Any]:
    """A status without who wrote it."""
    return {name: value for name, value in status.items() if name not in ("host", "pid", "claimed")}


def stop_run(run: RunDirectory, timeout_s: float) -> dict[str, Any]:
    """Asks a run to save and stop, and waits until it has; one that is not running is left as it is.

    Returns:
        The ``--json`` document at the end.

    Raises:
        ClusterError: It is still running after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    status = read_status(run)
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


def verify_checkpoints(run: RunDirectory) -> list[dict[str, Any]]:
    """Reads every checkpoint of a run in full, and tells what is wrong with those that are not good."""
    documents = []
    for step in run.checkpoints.steps():
        try:
            manifest, files = run.checkpoints.read(step)
        except CheckpointError as error:
            documents.append({"step": step, "good": False, "defect": str(error)})
            continue
        documents.append(
            {
                "step": step,
                "good": True,
                "bytes": sum(map(len, files.values())),
                "created": manifest.created,
                "state_sha256": manifest.state_sha256,
                "metrics": dict(manifest.metrics),
            }
        )
    return documents


def log_pieces(run: RunDirectory, worker: int | None, *, follow: bool) -> Iterator[tuple[str, str]]:
    """(log, text) for every log of a run and, with ``follow``, for what is added to one, until the run has ended."""
    shown: dict[str, int] = {}
    while True:
        is_last = not follow or read_status(run)["status"] != "running"
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

    From another machine that shows in what it writes: it may take two of its intervals to see. What it wrote at two
    moments is compared, for its clock need not agree with ours.
    """
    if status["host"] == socket.gethostname() or _is_gone(status):
        return not _is_gone(status)
    deadline = time.monotonic() + _WATCH_S
    while time.monotonic() < deadline:
        time.sleep(_STOP_INTERVAL_S)
        newest = run.read_status()
        if newest != status:
            return newest is not None and newest["status"] == "running"
    return False


def _is_gone(status: dict[str, Any]) -> bool:
    if status["host"] == socket.gethostname():
        return not _is_launcher(status["pid"])
    return time.time() - status["updated"] > _SILENCE_S


def _is_launcher(pid: int) -> bool:
    """Whether a process of this machine is one of ours, and alive; another may have its number by now."""
    try:
        return b"launcher" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
