"""What a run leaves behind while it goes on: rows, checkpoints, events and status, and what people see of them.

The driver decides what happens; here it is written down. There is one of it, and one run directory, tracker and
display that it writes to. The run directory is written behind the driver's back: it never waits for the store.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from cluster.errors import LauncherError
from cluster.process.messages import MatrixMeasured
from cluster.run.lease import STATUS_INTERVAL_S, SupersededError
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory
from cluster.tracking.tracker import Tracker
from jobs.spec import JobSpec
from launcher.display.progress import Progress
from launcher.driver.background_writer import BackgroundWriter
from launcher.driver.goodput import goodput
from launcher.driver.run_state import RunState
from launcher.planning.plan import Plan

_RATE_WINDOW_S = 20.0
_RETENTION_S = 2.0
"""How long old checkpoints are removed at the least; else they would pile up where there is always more to write."""


def event_row(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Something that happens now, for the log of events."""
    return {"time": round(time.time(), 3), "kind": kind, **content}


@dataclass(frozen=True, slots=True)
class _Save:
    """A checkpoint whose files are written, and that does not exist yet."""

    manifest: Manifest
    best: tuple[int | None, float | None]
    seconds: float
    committed: Callable[[], None]


class RunLog:
    """The books of a run, which this process has claimed; they are kept between entering and leaving.

    While the store is away they are kept in memory: the rows and events of that time, the newest status, the newest
    matrix of each name, and the saves whose files were written before.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Only assigns. ``state``: at the newest checkpoint, with what earlier invocations of the run counted.

        ``clock``: seconds that only grow.
        """
        self.state = state
        self.display = display
        self.saved_step = state.step
        """The step of the newest checkpoint."""
        self.save_s = 0.0
        """What the last save took."""
        self._spec = spec
        self._plan = plan
        self._run = run
        self._tracker = tracker
        self._clock = clock
        self._metrics = run.metrics()
        self._events = run.events()
        self._rates: deque[tuple[float, int]] = deque()
        self._bad_steps: set[int] = set()
        self._begun_at: int | None = None  # where the workers went on last
        self._matrices: dict[str, dict[str, Any]] = {}
        self._saves: deque[_Save] = deque()
        self._committed: deque[_Save] = deque()
        self._newest_save: _Save | None = None  # after which not all that is old has been removed yet
        self._status = self.document() | {"unsaved": self.state.unsaved}
        self._status_at = 0.0  # when it was written last
        self._is_closing = False
        self._is_stop_requested = False
        self._away_since: float | None = None
        self._background = BackgroundWriter(self.write, STATUS_INTERVAL_S, spec.checkpoint.patience_s, clock)

    def __enter__(self) -> Self:
        self._background.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._background.__exit__()

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
        self._tell(kind, content)
        self._background.ask()

    def begins_at(self, step: int) -> None:
        """The workers stand at a step; rows beyond it will be made anew."""
        self._begun_at = step
        self._metrics.cut(step + 1)
        self.event("training", step=step)
        self.reached(step)
        self.saved_step = step
        self._rates.clear()
        self.display.phase(f"training from step {step}" if step else "training")

    def reached(self, step: int) -> None:
        """The workers have completed so many steps; the newest row may be of an earlier one."""
        state = self.state
        state.step, state.epoch = step, step // self._plan.steps_per_epoch
        state.samples = step * self._spec.train.global_batch

    def row(self, row: Mapping[str, Any], sent_at: float) -> None:
        """A step was made; ``sent_at``: when, by the clock of the workers."""
        state = self.state
        self._metrics.append(row)
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
        """A validation came to a matrix. The newest is kept; one that is measured again is the same."""
        document = {"step": matrix.step, "classes": matrix.classes, "values": matrix.values}
        self._matrices[matrix.name.replace("/", "-")] = document

    def fell_back(self, step: int, defect: str) -> None:
        """A checkpoint is bad, and an older one is used; it stays for somebody to look at."""
        self._bad_steps.add(step)
        self.event("fell_back", step=step, defect=defect)

    def checkpoint(
        self,
        manifest: Manifest,
        best: tuple[int | None, float | None],
        seconds: float,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """Workers have written the files of a checkpoint; it exists as soon as its manifest is in the store.

        Args:
            manifest: Of the files.
            best: Step and value of the best checkpoint by then, if one is watched for.
            seconds: What the save took.
            committed: Called by ``tend`` once the checkpoint exists.
        """
        self._saves.append(_Save(manifest, best, seconds, committed))
        self._background.ask()

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints that are made on schedule."""
        return self._spec.checkpoint.every_steps or self._plan.steps_per_epoch

    @property
    def is_settled(self) -> bool:
        """Whether the store answers, and every save is a checkpoint: workers that start now find the newest."""
        return not self._saves and not self._committed and self._background.failing is None

    @property
    def is_stop_requested(self) -> bool:
        """Whether somebody has asked for a stop, in the run directory."""
        return self._is_stop_requested

    def tend(self) -> None:
        """Takes note of what has been written, and of a store that goes away or is back. Never waits.

        Raises:
            SupersededError: Another driver has taken the run over.
            StorageError: The store has been away for longer than patience lasts.
        """
        while self._committed:
            self._note(self._committed[0])
            self._committed.popleft()
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
        """Has stored what is not yet stored, and how the run stands."""
        self._status = self.document() | {"unsaved": self.state.unsaved}
        self._background.ask()

    def close(self, status: str, error: LauncherError | None, is_abandoned: Callable[[], bool]) -> None:
        """Closes the books. A store that fails here, after a failure, must not hide that failure.

        Raises:
            LauncherError: What happened was not written: the run is not complete, or it is another driver's.
        """
        failure = {"error": str(error), "traceback": getattr(error, "traceback", "")} if error else {}
        try:
            if not self.is_settled or (status == "completed" and self._newest_save is not None):
                self._background.finish(is_abandoned)  # one that is stopped leaves what is old to the next driver
            self.tend()
            self.state.status = status
            self.state.error = None if error is None else str(error)
            self.event(status, step=self.state.step, **failure)
            self._is_closing = True
            self.flush()
            self._background.finish(is_abandoned)
        except LauncherError as late:
            self.state.status, self.state.error = "failed", str(error or late)
            if error is None or isinstance(late, SupersededError):
                raise
            if late is not error:
                self.display.warn(f"the run directory could not be closed: {late}")

    def write(self) -> Iterator[str | None]:
        """Writes what there is to write, then removes old checkpoints.

        Called in the background, and again after a failure.

        Yields:
            After each step, what ``BackgroundWriter`` wants to know.

        Raises:
            LauncherError: What was not written stays to be written.
        """
        is_closing, saves = self._is_closing, list(self._saves)  # first: what they stand for is there by now
        for step in self._write_news(is_closing, saves):
            yield step
            self._run.stay_alive()  # on a slow store all of them together take long
        self._write_status()
        yield "status"
        if is_closing:
            self._run.check_lease()  # else it would end well, and not know that the run is another's
        elif self._newest_save is not None:
            yield from self._retain(self._newest_save)

    def _write_news(self, is_closing: bool, saves: Sequence[_Save]) -> Iterator[str]:
        """Writes what the status stands for."""
        self._run.check_lease()
        yield "claim"
        if self._begun_at is not None:  # older than what the run was claimed with, if that is bad
            self._run.checkpoints.fence(self._begun_at)
        yield "fence"
        self._metrics.flush()
        yield "metrics"
        for save in saves:
            self._commit(save)
            yield "checkpoint"
        yield "checkpoint"
        self._events.flush()
        yield "events"
        for name in list(self._matrices):
            matrix = self._matrices[name]
            self._run.write_matrix(name, matrix)
            if self._matrices[name] is matrix:
                del self._matrices[name]
            yield "matrix"
        yield "matrix"
        if is_closing:
            self._run.clear_stop()
            self._metrics.publish()
            yield "copy of metrics"
            self._events.publish()
            yield "copy of events"

    def _commit(self, save: _Save) -> None:
        """Rows first, which are written by now, then the manifest: what is committed is whole."""
        manifest = save.manifest
        self._run.check_lease()
        self._run.checkpoints.commit(manifest)
        self._bad_steps.discard(manifest.step)
        self._tell("checkpoint", {"step": manifest.step, "state_sha256": manifest.state_sha256})
        self._newest_save = save
        self._committed.append(save)
        self._saves.popleft()
        self._events.flush()

    def _retain(self, save: _Save) -> Iterator[str | None]:
        """Removes old checkpoints; after a while, if there is something to write, the rest is left for the next time.

        It may take long. A driver whose status is old looks dead, so that is written meanwhile.
        """
        began_at = self._clock()
        keep, bad = self._spec.checkpoint.keep, frozenset(self._bad_steps)
        check, removed = self._run.check_lease, list[int]()
        try:
            for step in self._run.checkpoints.retain(save.manifest.step, keep, save.best[0], bad, check):
                if step is not None:
                    removed.append(step)
                yield None
                if self._has_news and self._clock() - began_at >= _RETENTION_S:
                    return
                if self._clock() - self._status_at >= STATUS_INTERVAL_S:
                    self._write_status()
                    yield "status"
        finally:
            if removed:
                self._tell("checkpoints_removed", {"steps": sorted(removed)})
        self._newest_save = None
        self._events.flush()

    @property
    def _has_news(self) -> bool:
        """Whether there is something to write that is not to wait until all old checkpoints are removed."""
        return bool(self._saves) or self._is_closing or not self._events.is_flushed

    def _write_status(self) -> None:
        self._run.write_status(self._status)
        self._status_at = self._clock()
        self._is_stop_requested = self._run.is_stop_requested()

    def _tell(self, kind: str, content: dict[str, Any]) -> None:
        self._events.append(event_row(kind, content))

    def _note(self, save: _Save) -> None:
        """A checkpoint exists."""
        manifest, (best_step, value) = save.manifest, save.best
        self.state.state_sha256 = manifest.state_sha256
        self.saved_step, self.save_s = manifest.step, save.seconds
        if self._spec.checkpoint.best is not None and best_step is not None:
            self.state.best = {"metric": self._spec.checkpoint.best.metric, "value": value, "step": best_step}
        save.committed()

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
