"""Checkpoints on their way: the shares heard so far, and who holds up a checkpoint that is overdue.

Nothing here looks at a clock: times come in as numbers.
"""

from dataclasses import dataclass

from cluster.process.messages import ShareWritten
from cluster.run.manifest import Manifest, join

_INTERVALS = 3
"""A checkpoint is overdue if the newest is so many intervals old"""
_LEAST_S = 30.0
"""and at least so many seconds: what workers tell is late by a moment, in which short steps make many intervals."""


@dataclass(frozen=True, slots=True)
class Overdue:
    """No checkpoint has come for too long.

    Attributes:
        ranks: The workers that hold it up; none: no worker does, or it is not known which.
        reason: Why there is none, in a line.
    """

    ranks: tuple[int, ...]
    reason: str


class PendingCheckpoints:
    """Joins the shares that workers write, and notices when no checkpoint comes."""

    def __init__(self, interval: int) -> None:
        """``interval``: steps between checkpoints that are made on schedule."""
        self._interval = interval
        self._saved_step: int | None = None
        self._since = 0.0
        """When the newest checkpoint came, or training went on from it."""
        self._is_told = False
        self.attempt_started(0)

    def attempt_started(self, num_workers: int) -> None:
        """Other processes train; shares of earlier ones become no checkpoint any more."""
        self._num_workers = num_workers
        self._shares: dict[int, dict[int, ShareWritten]] = {}
        """What workers have written of checkpoints that are not whole yet, by step and rank."""
        self._whole_step = 0
        self._left_out: Overdue | None = None

    def training_began(self, now: float) -> None:
        """The workers stand at the newest checkpoint, or at the beginning."""
        self._since = now

    def left_out(self, rank: int, reason: str) -> None:
        """The workers leave checkpoints out because of one of them."""
        self._left_out = Overdue((rank,), reason)

    def share(self, rank: int, written: ShareWritten) -> tuple[Manifest, dict[int, ShareWritten]] | None:
        """A worker has written its share; with the last one, the manifest of the checkpoint, and all shares by rank."""
        step = written.share.step
        if step <= self._whole_step:  # the share of a worker that had no part to write
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
        """Who holds up the next checkpoint if it is overdue; told once until a checkpoint comes.

        Args:
            now: Seconds that only grow.
            step: The steps completed.
            saved_step: The step of the newest checkpoint.
        """
        if saved_step != self._saved_step:
            self._saved_step, self._since, self._is_told, self._left_out = saved_step, now, False, None
        if self._is_told or step - saved_step < _INTERVALS * self._interval or now - self._since < _LEAST_S:
            return None
        self._is_told = True
        if self._whole_step > saved_step:
            return Overdue((), f"the store has not taken the manifest of step {self._whole_step}")
        if not self._shares:
            return self._left_out or Overdue((), "no worker has written its share of one yet")
        oldest = min(self._shares)
        late = tuple(rank for rank in range(self._num_workers) if rank not in self._shares[oldest])
        return Overdue(late, f"the share of step {oldest} is not written")
