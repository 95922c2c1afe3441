"""The bad samples of a run that were skipped, each counted once, whichever epochs, validations and attempts met it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from cluster.process.data_messages import SampleSkipped

EVENT = "sample_skipped"
"""The kind of the events that record them, from which the next driver of the run learns of them."""
_MOST_LISTED = 100


class SkippedSamples:
    """Counts skipped samples.

    Args:
        events: Those of earlier drivers of the run.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self._known: set[tuple[str, int]] = set()
        self._first: list[dict[str, Any]] = []
        for event in events:
            if event["kind"] == EVENT:
                self.add(SampleSkipped(event["split"], event["epoch"], event["number"], event["reason"]))

    def __len__(self) -> int:
        return len(self._known)

    def add(self, skipped: SampleSkipped) -> bool:
        """Count a sample; return whether it was not known."""
        sample = (skipped.split, skipped.number)
        if sample in self._known:
            return False
        self._known.add(sample)
        if len(self._first) < _MOST_LISTED:
            self._first.append(asdict(skipped))
        return True

    def document(self) -> dict[str, Any]:
        """Return their number and the first of them, for the status of the run."""
        return {"count": len(self), "first": list(self._first)}
