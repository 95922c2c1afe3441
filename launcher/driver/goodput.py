"""Where a run's wall time goes, in parts that add up to it.

What rank 0 tells of an attempt counts as far as a checkpoint has kept it; what came after the newest checkpoint of
an attempt that failed is lost, and done again. Times come in as numbers: nothing here looks at a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = (
    "startup", "waiting", "restore", "recovery", "data", "compute", "exchange", "validation", "storage", "lost",
    "closing",
)  # fmt: skip
"""Until the first attempt trains; with none or too few workers there; reading what an attempt begins with; from the
end of an attempt until the next one trains; waiting for data; computing steps; waiting for what the other workers add
to them; validation; waiting for a save; work that no checkpoint kept; after the last step."""
_PRODUCTIVE = ("compute", "exchange", "validation")
_PART_OF = {
    "data": "data", "forward": "compute", "backward": "compute", "exchange": "exchange", "validation": "validation",
    "storage": "storage",
}  # fmt: skip
_TRAINING = "training"


@dataclass(slots=True)
class Ledger:
    """Books a run's wall time, phase by phase: an attempt trains, or the next one is waited for and prepared.

    Attributes:
        begun_at: When the present phase began.
        booked: Seconds by part, of all phases before it; earlier invocations of the run may have booked some.
    """

    begun_at: float
    booked: dict[str, float] = field(default_factory=dict)
    _phase: str = "startup"
    """A part, as a whole; or training, which has many."""
    _preparing: str = "startup"
    """The phase from when all workers are there until they train."""
    _told: dict[str, float] = field(default_factory=dict)
    _kept: dict[str, float] = field(default_factory=dict)

    def waiting(self, now: float) -> None:
        """Workers are missing."""
        self._begin("waiting", now)

    def workers_there(self, now: float) -> None:
        """None is missing; an attempt is prepared."""
        self._begin(self._preparing, now)

    def training_began(self, now: float, spent: Mapping[str, float]) -> None:
        """The workers stand at a step; ``spent``: what rank 0 has spent on what to come there."""
        self._kept = {"restore": spent["restore"]}
        self._begin(_TRAINING, now)

    def told(self, spent: Mapping[str, float]) -> None:
        """What rank 0 has spent on what, since its process began."""
        if self._phase == _TRAINING:  # what is told later is lost all the same
            self._told = _in_parts(spent)

    def saved(self, spent: Mapping[str, float]) -> None:
        """A checkpoint has kept what was spent until then."""
        if self._phase == _TRAINING:
            self._kept = _in_parts(spent)
            self._told = {part: max(length, self._told.get(part, 0.0)) for part, length in self._kept.items()}

    def failed(self, now: float) -> None:
        """The workers are lost, and with them what no checkpoint kept; it can be noticed in several ways."""
        self._preparing = "recovery"
        self._begin("recovery", now)

    def parked(self, now: float) -> None:
        """The workers have saved and left, and others will go on: nothing is lost."""
        self._kept = self._told
        self._begin("waiting", now, unkept="recovery")

    def ended(self, now: float, *, kept: bool) -> None:
        """The run is over; ``kept``: everything that was told is in a checkpoint."""
        if kept:
            self._kept = self._told
        self._begin("closing", now, unkept="closing" if kept else "lost")

    def parts(self, now: float) -> dict[str, float]:
        """Seconds by part, of everything until now; what is not kept yet counts as what it was told to be."""
        seconds = dict(self.booked)
        _add(seconds, _divided(now - self.begun_at, self._told, "compute" if self._phase == _TRAINING else self._phase))
        return {part: round(seconds.get(part, 0.0), 3) for part in PARTS}

    def unsaved(self) -> dict[str, float]:
        """Of these, the seconds that no checkpoint has kept yet."""
        return {part: round(length - self._kept.get(part, 0.0), 3) for part, length in self._told.items()}

    def _begin(self, phase: str, now: float, *, unkept: str = "lost") -> None:
        """Books the phase that is over; ``unkept``: what becomes of the time of an attempt that nothing has kept."""
        is_attempt = self._phase == _TRAINING
        _add(self.booked, _divided(now - self.begun_at, self._kept, unkept if is_attempt else self._phase))
        if is_attempt:
            self._preparing = "recovery"
        self._phase, self.begun_at = phase, now
        self._told, self._kept = {}, {}


def taken_over(parts: Mapping[str, float], unsaved: Mapping[str, float]) -> dict[str, float]:
    """What a driver that was killed has booked, without what it had not saved: that is lost."""
    seconds = dict(parts)
    _add(seconds, {part: -length for part, length in unsaved.items()})
    _add(seconds, {"lost": sum(unsaved.values())})
    return seconds


def goodput(parts: Mapping[str, float]) -> float | None:
    """The share of the wall time that went into steps and validations that count; None before any time has passed."""
    total = sum(parts.values())
    return round(sum(parts.get(part, 0.0) for part in _PRODUCTIVE) / total, 4) if total else None


def _divided(elapsed: float, known: Mapping[str, float], rest: str) -> dict[str, float]:
    """Divides the length of a phase into what is known of it, and the rest.

    Messages take a moment to arrive, so what is known can be a little longer than the phase, and is shortened then.
    """
    total = sum(known.values())
    scale = min(1.0, elapsed / total) if total else 0.0
    parts = {part: length * scale for part, length in known.items()}
    _add(parts, {rest: elapsed - total * scale})
    return parts


def _add(seconds: dict[str, float], parts: Mapping[str, float]) -> None:
    for part, length in parts.items():
        seconds[part] = seconds.get(part, 0.0) + length


def _in_parts(spent: Mapping[str, float]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for doing, length in spent.items():
        if doing in _PART_OF:  # what came before the first step is in another phase
            _add(parts, {_PART_OF[doing]: length})
    return parts
