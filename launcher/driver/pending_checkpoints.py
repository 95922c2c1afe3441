"""Pending checkpoints: join the shares that workers have written, and find the worker that delays an overdue one.

Times are passed in: nothing here reads a clock.
"""

from dataclasses import dataclass

from cluster.process.messages import ShareWritten
from cluster.run.manifest import Manifest, join

_INTERVALS = 3
"""A checkpoint is overdue if the newest one is this many intervals old"""
_LEAST_S = 30.0
"""and at least this many seconds: reports arrive a moment late, in which short steps make many intervals."""


@dataclass(frozen=True, slots=True)
class Overdue:
    """A checkpoint is overdue.

    Attributes:
        ranks: The workers that delay it; empty: no worker does, or it is not known which.
        reason: Why there is none, in one line.
    """

    ranks: tuple[int, ...]
    reason: str


class PendingCheckpoints:
    """Joins the shares of a checkpoint that workers write, and notices overdue checkpoints."""

    def __init__(self, interval: int) -> None:
        """``interval``: steps between scheduled checkpoints."""
        self._interval = interval
        self._saved_step: int | None = None
        self._since = 0.0
        """When the newest checkpoint was committed, or training resumed from it."""
        self._is_reported = False
        self.attempt_started(0)

    def attempt_started(self, num_workers: int) -> None:
        """Drop the shares of earlier processes: they become no checkpoint any more."""
        self._num_workers = num_workers
        self._shares: dict[int, dict[int, ShareWritten]] = {}
        """Shares of checkpoints that are not whole yet, by step and rank."""
        self._whole_step = 0
        self._left_out: Overdue | None = None

    def training_began(self, now: float) -> None:
        """Restart the time of the next checkpoint: training begins from the newest one, or from step 0."""
        self._since = now

    def left_out(self, rank: int, reason: str) -> None:
        """Record that all workers skip a checkpoint because ``rank`` is not ready."""
        self._left_out = Overdue((rank,), reason)

    def share(self, rank: int, written: ShareWritten) -> tuple[Manifest, dict[int, ShareWritten]] | None:
        """Take a share that a worker has written; with the last one, return the manifest and all shares by rank."""
        step = written.share.step
        if step <= self._whole_step:  # a share without parts, which the checkpoint did not need
            return None
        shares = self._shares.setdefault(step, {})
        shares[rank] = written
        manifest = join([other.share for other in shares.values()])
        if manifest is None:
            return None
        self._whole_step = step
        self._shares = {later: others for later, others in self._shares.items() if later > step}
        return manifest, shares

    def overdue(self, now: float, *, step: int, saved_step: int) -> Overdue | None:
        """Return who delays the next checkpoint if it is overdue; only once per checkpoint.

        Args:
            now: The time, in seconds of a monotonic clock.
            step: The steps completed.
            saved_step: The step of the newest checkpoint.
        """
        if saved_step != self._saved_step:
            self._saved_step, self._since, self._is_reported, self._left_out = saved_step, now, False, None
        if self._is_reported or step - saved_step < _INTERVALS * self._interval or now - self._since < _LEAST_S:
            return None
        self._is_reported = True
        if self._whole_step > saved_step:
            return Overdue((), f"the store has not taken the manifest of step {self._whole_step}")
        if not self._shares:
            return self._left_out or Overdue((), "no worker has written its share of one yet")
        oldest = min(self._shares)
        late = tuple(rank for rank in range(self._num_workers) if rank not in self._shares[oldest])
        return Overdue(late, f"the share of step {oldest} is not written")
