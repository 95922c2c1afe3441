"""Pending writes: what the driver wants written to the run directory, until the background thread has written it.

While the store is away everything stays here, in memory: the rows and events of that time, the newest status, the
newest matrix of each name, and the manifests of checkpoints whose files were written before.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.run.lease import STATUS_INTERVAL_S
from cluster.run.manifest import Manifest
from cluster.run.run_directory import RunDirectory

_RETENTION_S = 2.0
"""How long retention removes old checkpoints before it yields to pending writes. Without a minimum they would pile up
in a run that always has something to write."""


def event_row(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of an event that happens now."""
    return {"time": round(time.time(), 3), "kind": kind, **content}


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint whose files are written, and whose manifest is not.

    Attributes:
        manifest: The manifest.
        best: Step and value of the best checkpoint so far; None where no metric is watched.
        seconds: How long the save took.
        committed: Called by the driver once the checkpoint exists.
    """

    manifest: Manifest
    best: tuple[int | None, float | None]
    seconds: float
    committed: Callable[[], None]


class PendingWrites:
    """The writes of a run that are pending.

    Thread: the driver's thread calls everything but ``write``; the background thread calls ``write``.

    Args:
        run: The run, whose lease this process holds.
        keep: The number of newest checkpoints that retention keeps.
        status: The status to write first.
        clock: A monotonic clock in seconds.
    """

    def __init__(self, run: RunDirectory, keep: int, status: Mapping[str, Any], clock: Callable[[], float]) -> None:
        self.metrics = run.metrics()
        self.status = status
        """The newest status."""
        self.begun_at: int | None = None
        """The step from which the workers trained last."""
        self.committed: deque[Save] = deque()
        """Checkpoints that exist, and that the driver has not yet taken note of."""
        self.is_closing = False
        """The run ends: the next write is the last one, and clears up."""
        self._run = run
        self._keep = keep
        self._clock = clock
        self._events = run.events()
        self._bad_steps: set[int] = set()
        self._matrices: dict[str, dict[str, Any]] = {}
        self._saves: deque[Save] = deque()
        self._newest_save: Save | None = None  # None once all checkpoints that are old beside it are removed
        self._status_at = 0.0  # when the status was written last
        self._is_stop_requested = False

    def add_event(self, kind: str, content: Mapping[str, Any]) -> None:
        """Add an event that happens now.

        Thread: both.
        """
        self._events.append(event_row(kind, content))

    def add_matrix(self, name: str, document: dict[str, Any]) -> None:
        """Add a matrix, in place of an older one of that name."""
        self._matrices[name] = document

    def add_bad_step(self, step: int) -> None:
        """Exempt a bad checkpoint from retention, so that somebody can look at it."""
        self._bad_steps.add(step)

    def add_save(self, save: Save) -> None:
        """Add a checkpoint whose files are written; writing its manifest commits it."""
        self._saves.append(save)

    @property
    def has_saves(self) -> bool:
        """Whether a checkpoint is not committed yet, or the driver has not taken note of it."""
        # In this order: ``_commit`` adds to ``committed`` before it takes from ``_saves``.
        return bool(self._saves) or bool(self.committed)

    @property
    def has_old_checkpoints(self) -> bool:
        """Whether retention has not finished since the newest checkpoint."""
        return self._newest_save is not None

    @property
    def is_stop_requested(self) -> bool:
        """Whether somebody has requested a stop in the run directory; read with each write of the status."""
        return self._is_stop_requested

    def write(self) -> Iterator[str | None]:
        """Write everything that is pending, then remove old checkpoints.

        Thread: the background thread. After a failure it is called again; what was not written is still pending.

        Yields:
            The name of each finished step, or None, as ``BackgroundWriter`` wants them.

        Raises:
            SupersededError: Another driver has taken the run over.
            StorageError: The store failed.
        """
        # Read these first: whatever they stand for (rows, events, the status) was added before them.
        is_closing, saves = self.is_closing, list(self._saves)
        for step in self._write_before_status(is_closing, saves):
            yield step
            self._run.stay_alive()  # on a slow store these writes take longer than a driver may be silent
        self._write_status()
        yield "status"
        if is_closing:
            self._run.check_lease()  # else a run that was taken over would end as completed
        elif self._newest_save is not None:
            yield from self._retain(self._newest_save)

    def _write_before_status(self, is_closing: bool, saves: Sequence[Save]) -> Iterator[str]:
        """Write everything that the status may refer to."""
        self._run.check_lease()
        yield "claim"
        if self.begun_at is not None:  # lower than the newest checkpoint if that one is bad
            self._run.checkpoints.fence(self.begun_at)
        yield "fence"
        self.metrics.flush()
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
            self._read_stop_request()
            self._run.clear_stop()
            self.metrics.publish()
            yield "copy of metrics"
            self._events.publish()
            yield "copy of events"

    def _commit(self, save: Save) -> None:
        """Write the manifest of a checkpoint; the rows up to its step are written by now."""
        manifest = save.manifest
        self._run.check_lease()
        self._run.checkpoints.commit(manifest)
        self._bad_steps.discard(manifest.step)
        self.add_event("checkpoint", {"step": manifest.step, "state_sha256": manifest.state_sha256})
        self._newest_save = save
        self.committed.append(save)
        self._saves.popleft()
        self._events.flush()

    def _retain(self, save: Save) -> Iterator[str | None]:
        """Remove old checkpoints; after ``_RETENTION_S``, leave the rest for the next time if writes are pending.

        It may take long, so the status is written meanwhile: a driver whose status is old looks dead.
        """
        began_at = self._clock()
        check, removed = self._run.check_lease, list[int]()
        bad = frozenset(self._bad_steps)
        try:
            for step in self._run.checkpoints.retain(save.manifest.step, self._keep, save.best[0], bad, check):
                if step is not None:
                    removed.append(step)
                yield None
                if self._has_urgent_writes and self._clock() - began_at >= _RETENTION_S:
                    return
                if self._clock() - self._status_at >= STATUS_INTERVAL_S:
                    self._write_status()
                    yield "status"
        finally:
            if removed:
                self.add_event("checkpoints_removed", {"steps": sorted(removed)})
        self._newest_save = None
        self._events.flush()

    @property
    def _has_urgent_writes(self) -> bool:
        """Whether something is pending that does not wait until all old checkpoints are removed."""
        return bool(self._saves) or self.is_closing or not self._events.is_flushed

    def _write_status(self) -> None:
        self._run.write_status(self.status)
        self._status_at = self._clock()
        self._read_stop_request()

    def _read_stop_request(self) -> None:
        self._is_stop_requested = self._is_stop_requested or self._run.is_stop_requested()
