"""Run log: rows, checkpoints, events and status of a run, for the run directory, the tracker and the display.

The driver decides; this module records. A run has one run log, one run directory, one tracker and one display. The
run directory is written in the background, so that the driver never waits for the store.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

from cluster.errors import LauncherError
from cluster.process.data_messages import SampleSkipped
from cluster.process.messages import MatrixMeasured
from cluster.run.lease import STATUS_INTERVAL_S, SupersededError
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from cluster.tracking.tracker import Tracker
from jobs.spec import JobSpec
from launcher.display.progress import Progress
from launcher.driver.background_writer import BackgroundWriter
from launcher.driver.goodput import goodput
from launcher.driver.pending_writes import PendingWrites, Save
from launcher.driver.run_state import RunState
from launcher.driver.skipped_samples import EVENT, SkippedSamples
from launcher.planning.plan import Plan

_RATE_WINDOW_S = 20.0
"""The time over which throughput is averaged."""
_SAVES_THAT_COUNT = 3
"""How many saves tell how long the next one takes: one in an outage of the store counts for two more saves."""


class RunLog:
    """Records a run whose lease this process holds. Writing starts at ``__enter__`` and ends at ``__exit__``.

    Thread: the driver's thread, for all methods but ``write``.
    """

    def __init__(
        self,
        *,
        spec: JobSpec,
        plan: Plan,
        run: RunDirectory,
        state: RunState,
        display: Progress,
        tracker: Tracker,
        events: Sequence[Mapping[str, Any]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Only assigns.

        Args:
            spec: The job.
            plan: What follows from it.
            run: Its run directory.
            state: The state at the newest checkpoint, with what earlier drivers of the run counted.
            display: Shows progress.
            tracker: Takes the rows.
            events: Those of earlier drivers of the run.
            clock: A monotonic clock in seconds.
        """
        self.state = state
        self.display = display
        self.last_save_s = 0.0
        """How long the last save of this driver took; 0: it has made none."""
        self._spec = spec
        self._plan = plan
        self._run = run
        self._tracker = tracker
        self._skipped = SkippedSamples(events)
        self._clock = clock
        self._rates: deque[tuple[float, int]] = deque()
        self._away_since: float | None = None
        self._pending = PendingWrites(run, spec.checkpoint.keep, self._status(), clock)
        self._background = BackgroundWriter(self.write, STATUS_INTERVAL_S, spec.checkpoint.patience_s, clock)

    def __enter__(self) -> Self:
        self._background.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._background.__exit__()

    def document(self) -> dict[str, Any]:
        """Return the ``--json`` document."""
        state = asdict(self.state)
        del state["unsaved"]
        return {
            "run": self._run.url,
            **state,
            "seconds": round(self.state.seconds, 3),
            "worker_hours": round(self.state.worker_hours, 4),
            "goodput": goodput(self.state.time),
            "total_steps": self._plan.total_steps,
            "skipped_samples": self._skipped.document(),
            "tracker": self._tracker.url,
        }

    def event(self, kind: str, **content: Any) -> None:
        """Record an event, and have it written at once: the last event before a machine dies matters most."""
        self._pending.add_event(kind, content)
        self._background.ask()

    def begins_at(self, step: int) -> None:
        """Record that training starts at ``step``; drop later rows, because they will be computed again."""
        self._pending.begun_at = step
        self._pending.metrics.cut(step + 1)
        self.event("training", step=step)
        self.reached(step)
        self.state.saved_step = step or None
        self._rates.clear()
        self.display.phase(f"training from step {step}" if step else "training")

    def reached(self, step: int) -> None:
        """Record that the workers have completed ``step`` steps; the newest row may be of an earlier one."""
        state = self.state
        state.step, state.epoch = step, step // self._plan.steps_per_epoch
        state.samples = step * self._spec.train.global_batch

    def row(self, row: Mapping[str, Any], sent_at: float) -> None:
        """Record the row of a step.

        Args:
            row: The row.
            sent_at: When the worker sent it, in seconds by the worker's clock.
        """
        state = self.state
        self._pending.metrics.append(row)
        self._tracker.log({**row, **self._throughput(sent_at, row["samples"])})
        self.reached(row["step"])
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

    def matrix(self, matrix: MatrixMeasured) -> None:
        """Record a matrix of a validation; only the newest of each name is kept."""
        document = {"step": matrix.step, "classes": matrix.classes, "values": matrix.values}
        self._pending.add_matrix(matrix.name.replace("/", "-"), document)

    def sample_skipped(self, skipped: SampleSkipped) -> None:
        """Record a bad sample, once; warn of the first."""
        if not self._skipped.add(skipped):
            return
        self.event(EVENT, **asdict(skipped))
        if len(self._skipped) == 1:
            self.display.warn(
                f"data.{skipped.split}: sample {skipped.number} is bad and skipped: {skipped.reason}; launcher status "
                "counts such samples, and events.jsonl in the run directory lists them"
            )

    def fell_back(self, step: int, defect: str) -> None:
        """Record that a checkpoint is bad and an older one is used; the bad one is kept for inspection."""
        self._pending.add_bad_step(step)
        self.event("fell_back", step=step, defect=defect)

    def checkpoint(
        self,
        manifest: Manifest,
        best: tuple[int | None, float | None],
        seconds: float,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """Commit a checkpoint whose files the workers have written; it exists once its manifest is in the store.

        Args:
            manifest: The manifest.
            best: Step and value of the best checkpoint so far; None where no metric is watched.
            seconds: How long the save took.
            committed: Called by ``tend`` once the checkpoint exists.
        """
        self._pending.add_save(Save(manifest, best, seconds, committed))
        self._background.ask()

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint; 0: there is none, and training would start from its beginning."""
        return self.state.saved_step or 0

    @property
    def save_s(self) -> float:
        """How long the next save may take, in seconds: as long as the longest of the last three; 0: none is known."""
        return max(self.state.last_saves_s, default=0.0)

    @property
    def has_reached_end(self) -> bool:
        """Whether the workers have completed the last step that they are to train."""
        return self.state.step >= self._plan.end_step

    @property
    def save_interval(self) -> int:
        """Steps between scheduled checkpoints."""
        return self._spec.checkpoint.every_steps or self._plan.steps_per_epoch

    @property
    def is_settled(self) -> bool:
        """Whether the store answers and every save is committed, so that workers that start now find the newest."""
        return not self._pending.has_saves and self._background.failing is None

    @property
    def is_stop_requested(self) -> bool:
        """Whether somebody has requested a stop in the run directory."""
        return self._pending.is_stop_requested

    def tend(self) -> None:
        """Take note of what has been written, and of a store that goes away or comes back. Never waits.

        Raises:
            SupersededError: Another driver has taken the run over.
            StorageError: The store has been away for longer than ``checkpoint.patience_s``.
        """
        committed = self._pending.committed
        while committed:
            self._note(committed[0])
            committed.popleft()
        failing = self._background.failing
        if failing is not None and self._away_since is None:
            self._away_since, error = failing
            patience_s = self._spec.checkpoint.patience_s
            self.display.warn(f"{error}; training goes on without the store, for {patience_s:g} s at most")
        elif failing is None and self._away_since is not None:
            away_s, self._away_since = round(self._clock() - self._away_since, 1), None
            self.event("store_away", step=self.state.step, seconds=away_s)
            self.display.message(f"the store is back after {away_s:g} s")
        self._background.check()

    def flush(self) -> None:
        """Have everything pending written soon, and the status of now."""
        self._pending.status = self._status()
        self._background.ask()

    def close(self, status: str, error: LauncherError | None, is_abandoned: Callable[[], bool]) -> None:
        """Write everything, and how the run ended. A store that fails now does not hide an earlier failure.

        Args:
            status: ``completed``, ``stopped``, ``requeued`` or ``failed``.
            error: Why the run failed or was interrupted; None: it did not, and was not.
            is_abandoned: Whether the user wants to wait no longer.

        Raises:
            LauncherError: Something could not be written, so the run is not complete; or another driver has taken it
                over.
        """
        how = {"error": str(error), "traceback": getattr(error, "traceback", "")} if error else {}
        if status == "requeued":
            how = {"reason": self.state.requeued}
        else:
            self.state.requeued = None
        try:
            # A run that is stopped leaves old checkpoints to its next driver.
            if not self.is_settled or (status == "completed" and self._pending.has_old_checkpoints):
                self._background.finish(is_abandoned)
            self.tend()
            self.state.status = status
            self.state.error = None if error is None else str(error)
            self.event(status, step=self.state.step, **how)
            self._pending.is_closing = True
            self.flush()
            self._background.finish(is_abandoned)
        except LauncherError as late:
            self.state.status, self.state.error = "failed", str(error or late)
            if error is None or isinstance(late, SupersededError):
                raise
            if late is not error:
                self.display.warn(f"the run directory could not be closed: {late}")

    def write(self) -> Iterator[str | None]:
        """Write everything that is pending; see ``PendingWrites.write``.

        Thread: the background thread.
        """
        return self._pending.write()

    def _status(self) -> dict[str, Any]:
        return self.document() | {"unsaved": self.state.unsaved}

    def _note(self, save: Save) -> None:
        """Take note of a checkpoint that exists now."""
        manifest, (best_step, value) = save.manifest, save.best
        self.state.state_sha256 = manifest.state_sha256
        self.state.saved_step, self.last_save_s = manifest.step, save.seconds
        self.state.last_saves_s = [*self.state.last_saves_s, save.seconds][-_SAVES_THAT_COUNT:]
        if self._spec.checkpoint.best is not None and best_step is not None:
            self.state.best = {"metric": self._spec.checkpoint.best.metric, "value": value, "step": best_step}
        save.committed()

    def _throughput(self, sent_at: float, samples: int) -> dict[str, float]:
        """Return the images per second over the last ``_RATE_WINDOW_S``, by the workers' clock; {} at the first row."""
        self._rates.append((sent_at, samples))
        while self._rates[-1][0] - self._rates[0][0] > _RATE_WINDOW_S:
            self._rates.popleft()
        (first_at, first), (last_at, last) = self._rates[0], self._rates[-1]
        if last_at <= first_at:
            return {}
        self.state.images_per_second = round((last - first) / (last_at - first_at), 1)
        return {"throughput/images_per_second": self.state.images_per_second}
