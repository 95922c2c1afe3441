"""Room that can be trusted: what Ray reports just after agents ended may still grow, and may change all the time."""

_LAG_S = 0.5
"""How long Ray may take to report released resources; 0.13 s were measured on an overloaded machine."""
_UNSTEADY_S = 5.0
"""How long to observe room that keeps changing, before the least of it is used."""


class SteadyRoom:
    """Decides from repeated looks at the room for workers when one of them can be trusted."""

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None
        """The room at the last look, and since when it has been the same."""
        self._least: tuple[int, float] | None = None
        """The least room since ``observe`` last returned a number, and the time of the first look since then."""

    def observe(self, room: int, most: int, now: float) -> int | None:
        """Take a look, and return the room that can be trusted by now.

        Room that other jobs take and free all the time never stays the same; then the least of the last few seconds is
        returned.

        Args:
            room: The number of workers for which there is room now.
            most: The number of workers wanted; as much room is trusted at once.
            now: The time, in seconds of a monotonic clock.

        Returns:
            None: it is too early to tell.
        """
        if self._seen is None or self._seen[0] != room:
            self._seen = room, now
        least, since = self._least or (room, now)
        least = min(least, room)
        self._least = None
        if room == most or now - self._seen[1] >= _LAG_S:
            return room
        if now - since >= _UNSTEADY_S:
            return least
        self._least = least, since
        return None
