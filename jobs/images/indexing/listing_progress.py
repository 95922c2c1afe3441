"""Tells people who wait for a listing how far it is."""

import time
from collections.abc import Callable
from datetime import timedelta

_INTERVAL_S = 10.0


class ListingProgress:
    """Tells of a listing: the samples, their rate, and the time left where a total is known.

    It tells when more is listed and ten seconds have passed since its last line; in between it is silent.

    Args:
        url: What is listed.
        tell: Called with a line.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, url: str, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._tell, self._clock = url, tell, clock
        self._began_at = self._told_at = clock()
        self._num_samples, self._done, self._total, self._unit = 0, 0.0, 0.0, ""

    def expect(self, more: float, unit: str) -> None:
        """Notes that there is more to do than was known, such as another folder; the unit is the same each time."""
        self._total += more
        self._unit = unit

    def listed(self, num_samples: int, done: float = 0.0) -> None:
        """Notes that more samples are listed, and that more of what was expected is done."""
        self._num_samples += num_samples
        self._done += done
        if self._clock() - self._told_at >= _INTERVAL_S:
            self._told_at = self._clock()
            self._tell(", ".join([f"listing {self._url}: {self._num_samples:,} samples", *self._pace()]))

    def end(self) -> None:
        """Tells that the listing is done, if it was told that it was not."""
        if self._told_at > self._began_at:
            took = timedelta(seconds=round(self._clock() - self._began_at))
            self._tell(f"listed {self._url}: {self._num_samples:,} samples, {took}")

    def _pace(self) -> list[str]:
        seconds = self._told_at - self._began_at
        pace = [f"{self._num_samples / seconds:,.0f}/s"]
        if self._done < self._total:
            pace.append(f"{self._done:,.0f} of {self._total:,.0f} {self._unit}")
        if 0 < self._done < self._total:
            left_s = seconds * (self._total - self._done) / self._done
            pace.append(f"ETA {timedelta(seconds=round(left_s))}")
        return pace
