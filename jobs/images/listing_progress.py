"""Tells people who wait for a listing how far it is."""

import time
from collections.abc import Callable

_INTERVAL_S = 10.0


class ListingProgress:
    """Tells of a listing every ten seconds.

    Args:
        url: What is listed.
        tell: Called with a line.
        clock: A monotonic clock, in seconds.
    """

    def __init__(self, url: str, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._tell, self._clock = url, tell, clock
        self._began_at = self._told_at = clock()

    def reached(self, num_samples: int) -> None:
        """Notes that so many samples are listed."""
        now = self._clock()
        if now - self._told_at >= _INTERVAL_S:
            self._told_at = now
            rate = num_samples / (now - self._began_at)
            self._tell(f"listing {self._url}: {num_samples:,} samples, {rate:,.0f}/s")
