"""The tracker of a run: none, in memory, or Weights & Biases."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from cluster.tracking.wandb_recorder import Row, TrackerSettings
from cluster.tracking.wandb_tracker import WandbTracker


class Tracker(Protocol):
    """Records one attempt of one run. No method raises, and only ``finish`` waits."""

    @property
    def url(self) -> str | None:
        """The run's page, or the local folder for ``wandb sync``; None until it is known."""

    @property
    def sync_command(self) -> str | None:
        """The command that uploads what this attempt and earlier ones have recorded offline here; None: nothing."""

    def log(self, row: Row) -> None:
        """Record one row and return at once. Steps only grow; a step that is recorded already is skipped."""

    def finish(self, summary: Mapping[str, Any], images: Mapping[str, bytes], *, succeeded: bool = True) -> None:
        """Record the outcome and close, within ``finish_timeout_s``; a second call does nothing.

        Args:
            summary: Values for the whole run.
            images: PNG files by name.
            succeeded: False marks the run as failed.
        """


def open_tracker(settings: TrackerSettings, warn: Callable[[str], None], past: Iterable[Row] = ()) -> Tracker:
    """Start recording a run and return at once; W&B is contacted in the background.

    Args:
        settings: Where and how to record.
        warn: Called at most once, from any thread, with one line that says what happened and what to do.
        past: The rows of earlier attempts, oldest first, read in the background and recorded only where W&B lacks them:
            online, after the server's last step; offline, after the last step recorded in ``directory``. This closes
            the gaps that lost machines leave.
    """
    if settings.mode == "disabled":
        return NoTracker()
    try:
        return WandbTracker(settings, warn, past)
    except OSError as error:
        warn(f"W&B: not recording: cannot start a process: {error}; metrics are in the run directory")
        return NoTracker()


class NoTracker:
    """Records nothing."""

    url = sync_command = None

    def log(self, row: Row) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Any], images: Mapping[str, bytes], *, succeeded: bool = True) -> None:
        """Do nothing."""


class MemoryTracker:
    """Keeps everything in memory: the reference for what a tracker records."""

    url = sync_command = None

    def __init__(self, past: Iterable[Row] = ()) -> None:
        self.rows: list[dict[str, float | int]] = [dict(row) for row in past]
        self.summary: dict[str, Any] = {}
        self.images: dict[str, bytes] = {}
        self.succeeded: bool | None = None
        """None until the run is finished."""

    def log(self, row: Row) -> None:
        """Keep a row, unless its step is kept already or the run is finished."""
        if self.succeeded is None and (not self.rows or row["step"] > self.rows[-1]["step"]):
            self.rows.append(dict(row))

    def finish(self, summary: Mapping[str, Any], images: Mapping[str, bytes], *, succeeded: bool = True) -> None:
        """Keep the outcome."""
        if self.succeeded is None:
            self.summary, self.images, self.succeeded = dict(summary), dict(images), succeeded
