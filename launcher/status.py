"""What a run directory says of its run, for someone who has nothing else."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ClusterError
from cluster.run_directory import RunDirectory

_FOLLOW_INTERVAL_S = 2.0
_STOP_INTERVAL_S = 0.5
_SILENCE_S = 120.0
"""A driver writes every few seconds; one that has not for this long is gone."""


def read_status(run: RunDirectory) -> dict[str, Any]:
    """The ``--json`` document of a run, whoever wrote it last; reads one or two small objects."""
    status = run.read_status()
    if status is None:
        return {
            "run": run.url, "status": "failed", "step": 0, "epoch": 0, "samples": 0, "metrics": {}, "best": None,
            "workers": 0, "attempts": 0, "failure": None, "state_sha256": None, "seconds": 0.0,
            "error": "it ended before its first step",
        }  # fmt: skip
    document = {name: value for name, value in status.items() if name not in ("host", "pid")} | {"run": run.url}
    if status["status"] == "running" and _is_gone(status):
        silent_s = time.time() - status["updated"]
        document |= {
            "status": "failed",
            "error": f"the driver on {status['host']} has said nothing for {silent_s:.0f} s; resume goes on",
        }
    return document


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


def is_driven_here(status: dict[str, Any]) -> bool:
    """Whether the driver that wrote ``status.json`` is a process of this machine, and alive."""
    if status["host"] != socket.gethostname():
        return False
    try:
        command = Path(f"/proc/{status['pid']}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"launcher" in command  # another process may have its number by now


def _is_gone(status: dict[str, Any]) -> bool:
    if status["host"] == socket.gethostname():
        return not is_driven_here(status)
    return time.time() - status["updated"] > _SILENCE_S
