"""Goodput: account for a run's wall time, in parts that add up to it.

The time that rank 0 reports counts once a checkpoint covers it; time after the newest checkpoint of a failed attempt is
lost, because the steps are computed again. Times are passed in: nothing here reads a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = (
    "startup", "waiting", "restore", "recovery", "data", "compute", "exchange", "validation", "storage", "lost",
    "closing",
)  # fmt: skip
"""In this order: until the first attempt trains; waiting for workers; reading the checkpoint; from the end of an
attempt until the next one trains; waiting for data; computing steps; waiting for the other workers' gradients;
validation; waiting for a save; work that no checkpoint covers; after the last step."""
_PRODUCTIVE = ("compute", "exchange", "validation")
"""The parts that count as goodput."""
_PART_OF = {
    "data": "data", "forward": "compute", "backward": "compute", "exchange": "exchange", "validation": "validation",
    "storage": "storage",
}  # fmt: skip
"""Parts by a worker's progress mark."""
_TRAINING = "training"


@dataclass(slots=True)
class Ledger:
    """Books a run's wall time, phase by phase: an attempt trains, or the next one is waited for and prepared.

    Attributes:
        begun_at: When the current phase began.
        booked: Seconds by part of all earlier phases, including those of earlier drivers.
    """

    begun_at: float
    booked: dict[str, float] = field(default_factory=dict)
    _phase: str = "startup"
    """A part; or ``_TRAINING``, which is divided into parts."""
    _preparing: str = "startup"
    """The phase from the start of an attempt until it trains: ``startup``, later ``recovery``."""
    _reported: dict[str, float] = field(default_factory=dict)
    """Seconds by part that rank 0 has reported of the current attempt."""
    _covered: dict[str, float] = field(default_factory=dict)
    """Seconds of these that a checkpoint covers."""

    def waiting(self, now: float) -> None:
        """Begin to wait for workers."""
        self._begin("waiting", now)

    def workers_there(self, now: float) -> None:
        """Begin to prepare an attempt; all workers are there."""
        self._begin(self._preparing, now)

    def training_began(self, now: float, spent: Mapping[str, float]) -> None:
        """Begin training; ``spent``: seconds that rank 0 has spent so far, by progress mark."""
        self._covered = {"restore": spent["restore"]}
        self._begin(_TRAINING, now)

    def reported(self, spent: Mapping[str, float]) -> None:
        """Take what rank 0 reports: the seconds that it has spent since its process began, by progress mark."""
        if self._phase == _TRAINING:  # a report after the end of the attempt is of lost time
            self._reported = _in_parts(spent)

    def saved(self, spent: Mapping[str, float]) -> None:
        """Take note of a checkpoint, which covers what rank 0 had spent by then."""
        if self._phase == _TRAINING:
            self._covered = _in_parts(spent)
            self._reported = {
                part: max(length, self._reported.get(part, 0.0)) for part, length in self._covered.items()
            }

    def failed(self, now: float) -> None:
        """Book uncovered time as lost and begin recovery; may be called several times for one failure."""
        self._preparing = "recovery"
        self._begin("recovery", now)

    def parked(self, now: float) -> None:
        """Book a group of workers that saved and left, so that nothing is lost; wait for the next group."""
        self._covered = self._reported
        self._begin("waiting", now, unkept="recovery")

    def ended(self, now: float, *, kept: bool) -> None:
        """Book the end of the run; ``kept``: a checkpoint covers everything that was reported."""
        if kept:
            self._covered = self._reported
        self._begin("closing", now, unkept="closing" if kept else "lost")

    def parts(self, now: float) -> dict[str, float]:
        """Return the seconds by part until now; uncovered time counts in the parts that were reported."""
        seconds = dict(self.booked)
        rest = "compute" if self._phase == _TRAINING else self._phase
        _add(seconds, _divided(now - self.begun_at, self._reported, rest))
        return {part: round(seconds.get(part, 0.0), 3) for part in PARTS}

    def unsaved(self) -> dict[str, float]:
        """Return the seconds of these that no checkpoint covers yet, by part."""
        return {part: round(length - self._covered.get(part, 0.0), 3) for part, length in self._reported.items()}

    def _begin(self, phase: str, now: float, *, unkept: str = "lost") -> None:
        """Book the phase that is over and begin the next.

        Args:
            phase: The next phase.
            now: The time.
            unkept: The part for time of an attempt that no checkpoint covers.
        """
        is_attempt = self._phase == _TRAINING
        _add(self.booked, _divided(now - self.begun_at, self._covered, unkept if is_attempt else self._phase))
        if is_attempt:
            self._preparing = "recovery"
        self._phase, self.begun_at = phase, now
        self._reported, self._covered = {}, {}


def taken_over(parts: Mapping[str, float], unsaved: Mapping[str, float]) -> dict[str, float]:
    """Return what a killed driver had booked, with its unsaved time booked as lost."""
    seconds = dict(parts)
    _add(seconds, {part: -length for part, length in unsaved.items()})
    _add(seconds, {"lost": sum(unsaved.values())})
    return seconds


def goodput(parts: Mapping[str, float]) -> float | None:
    """Return the share of the wall time spent in steps and validations that count; None while the total is 0."""
    total = sum(parts.values())
    return round(sum(parts.get(part, 0.0) for part in _PRODUCTIVE) / total, 4) if total else None


def _divided(elapsed: float, known: Mapping[str, float], rest: str) -> dict[str, float]:
    """Divide the length of a phase into known parts and the rest.

    Reports take a moment to arrive, so the known parts may exceed the phase a little; then they are scaled down.
    """
    total = sum(known.values())
    scale = min(1.0, elapsed / total) if total else 0.0
    parts = {part: length * scale for part, length in known.items()}
    _add(parts, {rest: elapsed - total * scale})
    return parts


def _add(seconds: dict[str, float], parts: Mapping[str, float]) -> None:
    """Add parts to ``seconds`` in place."""
    for part, length in parts.items():
        seconds[part] = seconds.get(part, 0.0) + length


def _in_parts(spent: Mapping[str, float]) -> dict[str, float]:
    """Return seconds by part, given seconds by progress mark."""
    parts: dict[str, float] = {}
    for doing, length in spent.items():
        if doing in _PART_OF:  # time before the first step belongs to another phase
            _add(parts, {_PART_OF[doing]: length})
    return parts
