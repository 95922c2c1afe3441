"""What a training process does, step by step, and what its time has gone into."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.process.messages import DOING, Beat, Doing, Spent


@dataclass(frozen=True, slots=True)
class _Mark:
    """Since when something is done, and what was spent until then; whole, so that any thread can read it."""

    doing: Doing
    step: int
    at: float
    spent: Spent


class Activity:
    """What a training process does, step by step, and what it has spent its time on.

    One thread at a time tells it; any other may ask.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mark = _Mark(DOING[0], 0, clock(), dict.fromkeys(DOING, 0.0))
        self._first_step: int | None = None
        self._before_exchange: Doing = DOING[0]

    def mark(self, doing: Doing, step: int) -> None:
        """Tells what is done from now on, and the steps completed; costs next to nothing."""
        if self._first_step is None and doing == "data":  # which every step begins with
            self._first_step = step
        now = self._clock()
        self._mark = _Mark(doing, step, now, _spent_until(now, self._mark))

    def begin_exchange(self) -> None:
        """From now on the process waits for what others have to give."""
        self._before_exchange = self._mark.doing
        self.mark("exchange", self._mark.step)

    def end_exchange(self) -> None:
        """It goes on with what it did before."""
        self.mark(self._before_exchange, self._mark.step)

    def exchanged(self, seconds: float) -> None:
        """So much of what counts as ``backward`` was an exchange: a GPU tells of it when it is long over.

        What the GPU waited while the process waited for something else has no share in the process's time.
        """
        mark = self._mark
        seconds = min(seconds, mark.spent["backward"])
        spent = dict(mark.spent)
        spent["backward"] -= seconds
        spent["exchange"] += seconds
        self._mark = replace(mark, spent=spent)

    def spent(self) -> Spent:
        """Seconds by what was done, since the process began."""
        return _spent_until(self._clock(), self._mark)

    def beat(self) -> Beat:
        """This moment, for a watcher."""
        mark, now = self._mark, self._clock()
        is_first_step = self._first_step is None or mark.step == self._first_step
        return Beat(mark.doing, mark.step, is_first_step, now - mark.at, _spent_until(now, mark))


def _spent_until(now: float, mark: _Mark) -> Spent:
    return {**mark.spent, mark.doing: mark.spent[mark.doing] + now - mark.at}
