"""Stragglers: find workers that are slower than the others, and at what.

All workers take the same time for a step, because the fast ones wait for the slow one in the exchange. So workers are
compared by the time of their own work before the exchange: reading data, computing, and for rank 0, saving. A slow
network makes all workers wait alike and is no straggler; goodput shows it as exchange.

Nothing here reads a clock: the workers report seconds.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, mode

_FACTOR = 1.5
"""A worker is slow if its own work takes this many times as long as that of the others"""
_LEAST_SHARE = 0.1
"""and the delay is at least this share of its step, exchange included: else a faster worker would gain nothing."""
_WINDOWS = 3
"""Consecutive windows in which a worker must be slow, or no longer be: a busy machine has bad moments."""
_LEAST_STEPS = 10
"""Steps in a window, so that one long step does not decide it."""
_WORK = {"data": ("data",), "compute": ("forward", "backward"), "storage": ("storage",)}
"""Kinds of a worker's own work, and the progress marks that each consists of."""


@dataclass(frozen=True, slots=True)
class News:
    """A worker has become slow, has become slow at something else, or keeps up again.

    Attributes:
        rank: The worker.
        what: The kind of work with most of the delay: ``data``, ``compute`` or ``storage``; None: it keeps up again.
        factor: The time of its own work in a step, as a multiple of the others'.
    """

    rank: int
    what: str | None
    factor: float

    @property
    def text(self) -> str:
        """The news in words, to follow the worker's name."""
        if self.what is None:
            return "keeps up with the others again"
        return f"takes {self.factor:g} times as long as the others for its part of a step, mostly over {self.what}"


class Stragglers:
    """Compares the workers of a group, window by window; a window ends when all have reported enough steps."""

    def __init__(self, shards: Sequence[int]) -> None:
        """``shards``: the number of shards of each rank; a worker with more has more work, and is not slow for that."""
        self._shards = tuple(shards)
        self._slow_at: list[str | None] = [None] * len(shards)
        """The last news of each rank."""
        self.restart()

    def restart(self) -> None:
        """Restart the windows, because the workers count from zero again; the news so far still hold."""
        self._begins: dict[int, _Report] = {}
        self._ends: dict[int, _Report] = {}
        self._recent: list[deque[_Finding]] = [deque(maxlen=_WINDOWS) for _ in self._shards]

    def add_report(self, rank: int, step: int, spent: Mapping[str, float]) -> list[News]:
        """Take a worker's report, and return what is new of any worker.

        Args:
            rank: The worker, which has completed its first step.
            step: The step that it has completed.
            spent: Seconds since its process began, by progress mark.
        """
        self._ends[rank] = _Report(step, spent)
        self._begins.setdefault(rank, self._ends[rank])
        ranks = range(len(self._shards))
        if len(ranks) == 1 or len(self._ends) < len(ranks):
            return []
        if any(self._ends[rank].step - self._begins[rank].step < _LEAST_STEPS for rank in ranks):
            return []
        steps = [_mean_step(self._begins[rank], self._ends[rank], self._shards[rank]) for rank in ranks]
        self._begins = dict(self._ends)
        return [news for rank in ranks if (news := self._judge(rank, steps)) is not None]

    def _judge(self, rank: int, steps: Sequence["_Step"]) -> News | None:
        """Add a window to those of a worker; return the news, if there is some."""
        recent, before = self._recent[rank], self._slow_at[rank]
        recent.append(_compare(steps[rank], [*steps[:rank], *steps[rank + 1 :]]))
        if len(recent) < _WINDOWS:
            return None
        kinds = [finding.what for finding in recent]
        if None in kinds:
            what = before if any(kinds) else None
        elif before is None:
            what = mode(kinds)
        else:
            what = kinds[0] if len(set(kinds)) == 1 else before
        self._slow_at[rank] = what
        return None if what == before else News(rank, what, round(median(finding.factor for finding in recent), 1))


@dataclass(frozen=True, slots=True)
class _Report:
    """A worker's report."""

    step: int
    spent: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Step:
    """The mean step of a worker in a window.

    Attributes:
        work: Seconds of its own work, by kind.
        with_exchange: Seconds of its own work and the exchange.
        shards: The number of its shards.
    """

    work: Mapping[str, float]
    with_exchange: float
    shards: int

    @property
    def own(self) -> float:
        """Seconds of its own work."""
        return sum(self.work.values())


@dataclass(frozen=True, slots=True)
class _Finding:
    """What a worker was slow at in a window, or None; and its time as a multiple of the others'."""

    what: str | None
    factor: float


def _mean_step(begin: _Report, end: _Report, shards: int) -> _Step:
    per_step = {doing: (end.spent[doing] - begin.spent[doing]) / (end.step - begin.step) for doing in end.spent}
    work = {what: sum(per_step[doing] for doing in marks) for what, marks in _WORK.items()}
    return _Step(work, sum(work.values()) + per_step["exchange"], shards)


def _compare(step: _Step, others: Sequence[_Step]) -> _Finding:
    """Return whether a worker was slow in a window, and at what."""
    expected = _expected(step, others, lambda other: other.own)
    factor = step.own / expected
    if factor < _FACTOR or step.own - expected < _LEAST_SHARE * step.with_exchange:
        return _Finding(None, factor)

    def delay(what: str) -> float:
        return step.work[what] - _expected(step, others, lambda other: other.work[what])

    return _Finding(max(_WORK, key=delay), factor)


def _expected(step: _Step, others: Sequence[_Step], seconds_of: Callable[[_Step], float]) -> float:
    """Return the seconds to expect of a worker given the others', per step or per shard, whichever is more.

    A worker with more shards may take longer. One with fewer shards delays nobody while it takes no longer per step.
    """
    by_step = median(seconds_of(other) for other in others)
    by_shard = median(seconds_of(other) / other.shards for other in others)
    return max(by_step, by_shard * step.shards)
