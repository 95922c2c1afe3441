"""The activity of a training process: its current phase and step, and the seconds it has spent in each phase."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.process.messages import DOING, Beat, Doing, Spent


@dataclass(frozen=True, slots=True)
class _Mark:
    """The current phase, when it began, and the seconds spent before. Replaced as a whole: any thread can read it."""

    doing: Doing
    step: int
    at: float
    spent: Spent


class Activity:
    """Current phase and step of a training process, and its seconds by phase.

    Thread: one at a time calls ``mark``, ``begin_exchange``, ``end_exchange`` and ``exchanged``; any calls the others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mark = _Mark(DOING[0], 0, clock(), dict.fromkeys(DOING, 0.0))
        self._first_step: int | None = None
        self._before_exchange: Doing = DOING[0]

    def mark(self, doing: Doing, step: int) -> None:
        """Enter a phase, after ``step`` completed optimizer steps; costs next to nothing."""
        if self._first_step is None and doing == "data":  # the first phase of every step
            self._first_step = step
        now = self._clock()
        self._mark = _Mark(doing, step, now, _spent_until(now, self._mark))

    def begin_exchange(self) -> None:
        """Enter the phase ``exchange``, in which the process waits for other workers."""
        self._before_exchange = self._mark.doing
        self.mark("exchange", self._mark.step)

    def end_exchange(self) -> None:
        """Return to the phase before ``begin_exchange``."""
        self.mark(self._before_exchange, self._mark.step)

    def exchanged(self, seconds: float) -> None:
        """Move seconds from ``backward`` to ``exchange``, at most all of ``backward``.

        A GPU reports the duration of an exchange only after the process has left ``backward``. It may have waited while
        the process was in another phase; that wait took no time from ``backward``, hence the limit.
        """
        mark = self._mark
        seconds = min(seconds, mark.spent["backward"])
        spent = dict(mark.spent)
        spent["backward"] -= seconds
        spent["exchange"] += seconds
        self._mark = replace(mark, spent=spent)

    def spent(self) -> Spent:
        """Return the seconds spent in each phase since the process began."""
        return _spent_until(self._clock(), self._mark)

    def beat(self) -> Beat:
        """Return the heartbeat of this moment."""
        mark, now = self._mark, self._clock()
        is_first_step = self._first_step is None or mark.step == self._first_step
        return Beat(mark.doing, mark.step, is_first_step, now - mark.at, _spent_until(now, mark))


def _spent_until(now: float, mark: _Mark) -> Spent:
    return {**mark.spent, mark.doing: mark.spent[mark.doing] + now - mark.at}
