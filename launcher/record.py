"""What a run leaves behind while it goes on: rows, checkpoints, events and status, and what people see of them.

The driver decides what happens; here it is written down. There is one of it, and one run directory, tracker and
display that it writes to.
"""

import os
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.checkpoints import Manifest
from cluster.errors import LauncherError, StorageError
from cluster.run_directory import RunDirectory
from cluster.tracking import Tracker
from jobs.spec import JobSpec
from launcher.goodput import goodput
from launcher.plan import Plan
from launcher.progress import Progress

_RATE_WINDOW_S = 20.0


@dataclass(slots=True)
class RunState:
    """What the driver knows of the run, and ``status.json`` tells."""

    status: str = "running"
    step: int = 0
    epoch: int = 0
    """Epochs completed."""
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    state_sha256: str | None = None
    attempts: int = 0
    workers: int = 0
    """Workers that train now, or did last."""
    waits_for: str | None = None
    """What has to be waited for before training can go on."""
    worker_hours: float = 0.0
    seconds: float = 0.0
    time: dict[str, float] = field(default_factory=dict)
    """Seconds by what they went into, as ``launcher.goodput`` tells them apart."""
    unsaved: dict[str, float] = field(default_factory=dict)
    """Of these, what is lost if the driver dies now."""
    images_per_second: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    """The failures of this invocation, by whose doing they were."""
    failure: dict[str, Any] | None = None
    """The last failure of a worker, also while the run goes on again."""
    error: str | None = None


class Record:
    """The books of a run."""

    def __init__(
        self, *, spec: JobSpec, plan: Plan, run: RunDirectory, state: RunState, display: Progress, tracker: Tracker
    ) -> None:
        """Only assigns. ``state`` carries over what earlier invocations of the run counted."""
        self.state = state
        self.display = display
        self.saved_step = 0
        """The step of the newest checkpoint."""
        self.save_s = 0.0
        """What the last save took."""
        self._spec = spec
        self._plan = plan
        self._run = run
        self._tracker = tracker
        self._metrics = run.metrics()
        self._events = run.events()
        self._rates: deque[tuple[float, int]] = deque()
        self._bad_steps: set[int] = set()

    def document(self) -> dict[str, Any]:
        """The ``--json`` document."""
        state = asdict(self.state)
        del state["unsaved"]
        return {
            "run": self._run.url,
            **state,
            "seconds": round(self.state.seconds, 3),
            "worker_hours": round(self.state.worker_hours, 4),
            "goodput": goodput(self.state.time),
            "total_steps": self._plan.total_steps,
            "tracker": self._tracker.url,
        }

    def event(self, kind: str, **content: Any) -> None:
        """Events are rare, and the last one before a machine dies is the one that matters: each is stored at once."""
        self._events.append({"time": round(time.time(), 3), "kind": kind, **content})
        self._events.flush()

    def begins_at(self, step: int) -> None:
        """The workers stand at a step; rows beyond it will be made anew."""
        self._metrics.flush()
        rows = self._metrics.read()
        if rows and rows[-1]["step"] > step:
            self._metrics.compact(row for row in rows if row["step"] <= step)
        self.event("training", step=step)
        self.state.step = self.saved_step = step
        self._rates.clear()
        self.display.phase(f"training from step {step}" if step else "training")

    def row(self, row: dict[str, Any], sent_at: float) -> None:
        """A step was made; ``sent_at``: when, by the clock of the workers."""
        state = self.state
        self._metrics.append(row)
        self._tracker.log(row | self._throughput(sent_at, row["samples"]))
        state.step, state.samples = row["step"], row["samples"]
        state.epoch = row["step"] // self._plan.steps_per_epoch
        metrics = {name: value for name, value in row.items() if "/" in name}
        state.metrics |= metrics
        self.display.update(
            epoch=row["epoch"],
            epochs=self._spec.train.epochs,
            step=state.step,
            total_steps=self._plan.end_step,
            metrics=metrics,
            images_per_second=state.images_per_second,
            workers=state.workers,
        )

    def matrix(self, name: str, matrix: dict[str, Any]) -> None:
        """A validation came to a matrix. The newest is kept; one that is measured again is the same."""
        self._run.write_matrix(name.replace("/", "-"), matrix)

    def fell_back(self, step: int, defect: str) -> None:
        """A checkpoint is bad, and an older one is used; it stays for somebody to look at."""
        self._bad_steps.add(step)
        self.event("fell_back", step=step, defect=defect)

    def checkpoint(self, manifest: Manifest, best: tuple[int | None, float | None], seconds: float) -> None:
        """Workers have written the files of a checkpoint. Rows first, then the manifest: what is committed is whole.

        Args:
            manifest: Of the files.
            best: Step and value of the best checkpoint by then, if one is watched for.
            seconds: What the save took.
        """
        self._metrics.flush()
        self._run.checkpoints.commit(manifest)
        self._bad_steps.discard(manifest.step)
        self.state.state_sha256 = manifest.state_sha256
        self.saved_step, self.save_s = manifest.step, seconds
        best_step, value = best
        if self._spec.checkpoint.best is not None and best_step is not None:
            self.state.best = {"metric": self._spec.checkpoint.best.metric, "value": value, "step": best_step}
        self.event("checkpoint", step=manifest.step, state_sha256=manifest.state_sha256)
        removed = self._run.checkpoints.retain(self._spec.checkpoint.keep, best_step, self._bad_steps)
        if removed:
            self.event("checkpoints_removed", steps=removed)

    def is_stop_requested(self) -> bool:
        """Whether somebody has asked for a stop, in the run directory."""
        return self._run.is_stop_requested()

    def flush(self) -> None:
        """Stores what is not yet stored, and how the run stands."""
        self._metrics.flush()
        here = {"updated": round(time.time(), 3), "host": socket.gethostname(), "pid": os.getpid()}
        self._run.write_status(self.document() | {"unsaved": self.state.unsaved} | here)

    def close(self, status: str, error: LauncherError | None) -> None:
        """Closes the books. A store that fails here, after a failure, must not hide that failure."""
        self.state.status = status
        self.state.error = None if error is None else str(error)
        failure = {"error": str(error), "traceback": getattr(error, "traceback", "")} if error else {}
        try:
            self.event(status, step=self.state.step, **failure)
            self.flush()
            self._run.clear_stop()
            self._metrics.compact()
            self._events.compact()
        except StorageError as storage_error:
            if error is None:
                raise
            self.display.warn(f"the run directory could not be closed: {storage_error}")

    def _throughput(self, sent_at: float, samples: int) -> dict[str, float]:
        """Images per second over the last moments, by the workers' clock."""
        self._rates.append((sent_at, samples))
        while self._rates[-1][0] - self._rates[0][0] > _RATE_WINDOW_S:
            self._rates.popleft()
        (first_at, first), (last_at, last) = self._rates[0], self._rates[-1]
        if last_at <= first_at:
            return {}
        self.state.images_per_second = round((last - first) / (last_at - first_at), 1)
        return {"throughput/images_per_second": self.state.images_per_second}
