"""Where a run's wall time goes, in parts that add up to it.

What rank 0 tells of an attempt counts as far as a checkpoint has kept it; what came after the newest checkpoint of
an attempt that failed is lost, and done again. Times come in as numbers: nothing here looks at a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = ("startup", "recovery", "data", "compute", "validation", "storage", "lost", "closing")
"""Until the first attempt trains; from a failure until the next one does; waiting for data; forward, backward and
exchange; validation; waiting for a save; work that no checkpoint kept; after the last step."""
_PRODUCTIVE = ("compute", "validation")
_PART_OF = {
    "data": "data", "forward": "compute", "backward": "compute", "validation": "validation", "storage": "storage",
}  # fmt: skip


@dataclass(slots=True)
class Ledger:
    """Books a run's wall time.

    Attributes:
        begun_at: When the first part began.
        booked: Seconds by part, of everything that is over; earlier invocations of the run may have booked some.
    """

    begun_at: float
    booked: dict[str, float] = field(default_factory=dict)
    _waits_for: str = "startup"
    _training_since: float | None = None
    _told: dict[str, float] = field(default_factory=dict)
    _kept: dict[str, float] = field(default_factory=dict)

    def training_began(self, now: float) -> None:
        """The workers stand at a step."""
        self._book(self._waits_for, now - self.begun_at)
        self._training_since = self.begun_at = now
        self._told, self._kept = {}, {}

    def told(self, spent: Mapping[str, float]) -> None:
        """What rank 0 has spent on what, since it began."""
        self._told = _in_parts(spent)

    def saved(self, spent: Mapping[str, float]) -> None:
        """A checkpoint has kept what was spent until then."""
        self._kept = _in_parts(spent)

    def failed(self, now: float) -> None:
        """The workers are lost; the next are waited for."""
        if self._training_since is not None:
            self._end(self._kept, "lost", now)
        else:
            self._book(self._waits_for, now - self.begun_at)
            self.begun_at = now
        self._waits_for = "recovery"

    def ended(self, now: float, *, kept: bool) -> None:
        """The run is over; ``kept``: everything that was told is in a checkpoint."""
        if self._training_since is not None:
            self._end(self._told if kept else self._kept, "closing" if kept else "lost", now)
        else:
            self._book(self._waits_for, now - self.begun_at)
            self.begun_at = now

    def parts(self, now: float) -> dict[str, float]:
        """Seconds by part, of everything until now; what is not kept yet counts as what it was told to be."""
        seconds = dict(self.booked)
        if self._training_since is None:
            open_parts = {self._waits_for: now - self.begun_at}
        else:
            rest = now - self._training_since - sum(self._told.values())
            open_parts = {**self._told, "compute": self._told.get("compute", 0.0) + max(0.0, rest)}
        for part, length in open_parts.items():
            seconds[part] = seconds.get(part, 0.0) + length
        return {part: round(seconds.get(part, 0.0), 3) for part in PARTS}

    def _end(self, kept: Mapping[str, float], rest: str, now: float) -> None:
        assert self._training_since is not None
        for part, length in kept.items():
            self._book(part, length)
        self._book(rest, max(0.0, now - self._training_since - sum(kept.values())))
        self._training_since, self.begun_at = None, now

    def _book(self, part: str, length: float) -> None:
        self.booked[part] = self.booked.get(part, 0.0) + length


def goodput(parts: Mapping[str, float]) -> float | None:
    """The share of the wall time that went into steps and validations that count; None before any time has passed."""
    total = sum(parts.values())
    return round(sum(parts.get(part, 0.0) for part in _PRODUCTIVE) / total, 4) if total else None


def _in_parts(spent: Mapping[str, float]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for doing, part in _PART_OF.items():
        parts[part] = parts.get(part, 0.0) + spent[doing]
    return parts
