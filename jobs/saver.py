"""Saving checkpoints behind the loop's back.

The loop pays for a copy of the state; one thread makes files of it, hashes and uploads them. The files are
no checkpoint yet: the driver writes the manifest, once the metrics up to that step are safe.
"""

import platform
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from cluster.checkpoints import Checkpoints, Manifest
from cluster.link import Link
from jobs.loop import Progress
from jobs.parts import Parts
from jobs.state import digest, encode, to_host


class Saver:
    """Saves a worker's state; used by rank 0 alone. One save is in flight at a time."""

    def __init__(self, parts: Parts, progress: Progress, checkpoints: Checkpoints, link: Link) -> None:
        self._parts = parts
        self._progress = progress
        self._checkpoints = checkpoints
        self._link = link
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None

    def save(self, metrics: Mapping[str, float]) -> None:
        """Copies the state of this moment and starts saving it; waits for the save before.

        Raises:
            StorageError: The save before failed.
        """
        self.wait()
        state = to_host({**self._parts.state(), "progress": asdict(self._progress)})
        self._in_flight = self._thread.submit(self._write, state, dict(metrics), self._link.activity.spent())

    def wait(self) -> None:
        """Returns when nothing is in flight.

        Raises:
            StorageError: The save in flight failed.
        """
        if self._in_flight is not None:
            self._in_flight.result()

    def _write(self, state: dict[str, Any], metrics: dict[str, float], spent: dict[str, float]) -> None:
        progress, began = state["progress"], time.monotonic()
        manifest = Manifest(
            step=progress["step"],
            files=self._checkpoints.write_files(progress["step"], encode(state)),
            state_sha256=digest(state),
            metrics=metrics,
            versions={"torch": str(torch.__version__), "python": platform.python_version()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        best = {"best_metric": progress["best_metric"], "best_step": progress["best_step"]}
        self._link.send("checkpoint", manifest=manifest, spent=spent, seconds=time.monotonic() - began, **best)
