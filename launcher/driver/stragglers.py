"""Who is slower than the others, and at what.

All workers take a step in the same time: the fast ones wait in the exchange for the slow one. So what tells them
apart is what each does by itself, before the others can go on: reading data, computing, and for rank 0, saving. A
wire that is slow makes everybody wait alike and is nobody's; the run's account shows it, as exchange.

Nothing here looks at a clock: seconds come with what the workers tell.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, mode

_FACTOR = 1.5
"""A worker that takes so many times as long as the others is slow"""
_LEAST_SHARE = 0.1
"""if that makes so much of its step, exchange included: else nobody would gain if it were faster."""
_WINDOWS = 3
"""One after the other in which it must be, or must no longer be: a machine with other things to do has bad moments."""
_LEAST_STEPS = 10
"""Of a window: one long step does not make one."""
_WORK = {"data": ("data",), "compute": ("forward", "backward"), "storage": ("storage",)}
"""What a worker does by itself, and the marks that it is made of."""


@dataclass(frozen=True, slots=True)
class News:
    """A worker has become slow, has become so at something else, or has caught up.

    Attributes:
        rank: The worker.
        what: What most of its delay goes into, one of ``data``, ``compute`` and ``storage``; None: it keeps up again.
        factor: How many times as long as the others it takes for its part of a step.
    """

    rank: int
    what: str | None
    factor: float

    @property
    def text(self) -> str:
        """What the worker does, for people."""
        if self.what is None:
            return "keeps up with the others again"
        return f"takes {self.factor:g} times as long as the others for its part of a step, mostly over {self.what}"


class Stragglers:
    """Compares the workers of a group, window by window; one is over when all have told of enough steps."""

    def __init__(self, shards: Sequence[int]) -> None:
        """``shards``: of each rank. Who has more of them has more to do, and is not slow for that."""
        self._shards = tuple(shards)
        self._slow_at: list[str | None] = [None] * len(shards)
        """What was said last of each rank."""
        self.restarted()

    def restarted(self) -> None:
        """The same workers count from zero again; what was said of them need not be said again."""
        self._begins: dict[int, _Told] = {}
        self._ends: dict[int, _Told] = {}
        self._recent: list[deque[_Finding]] = [deque(maxlen=_WINDOWS) for _ in self._shards]

    def heard(self, rank: int, step: int, spent: Mapping[str, float]) -> list[News]:
        """A worker, its first step behind it, tells how far it is, and what it has spent on what since it began."""
        self._ends[rank] = _Told(step, spent)
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
        """Adds a window to what is known of a worker."""
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
class _Told:
    step: int
    spent: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Step:
    """The mean step of a worker in a window: seconds of its own work, by what it is; and of all with the exchange."""

    work: Mapping[str, float]
    with_exchange: float
    shards: int

    @property
    def own(self) -> float:
        return sum(self.work.values())


@dataclass(frozen=True, slots=True)
class _Finding:
    what: str | None
    factor: float


def _mean_step(begin: _Told, end: _Told, shards: int) -> _Step:
    per_step = {doing: (end.spent[doing] - begin.spent[doing]) / (end.step - begin.step) for doing in end.spent}
    work = {what: sum(per_step[doing] for doing in marks) for what, marks in _WORK.items()}
    return _Step(work, sum(work.values()) + per_step["exchange"], shards)


def _compare(step: _Step, others: Sequence[_Step]) -> _Finding:
    """Whether a worker was slow in a window, and at what."""
    expected = _expected(step, others, lambda other: other.own)
    factor = step.own / expected
    if factor < _FACTOR or step.own - expected < _LEAST_SHARE * step.with_exchange:
        return _Finding(None, factor)

    def delay(what: str) -> float:
        return step.work[what] - _expected(step, others, lambda other: other.work[what])

    return _Finding(max(_WORK, key=delay), factor)


def _expected(step: _Step, others: Sequence[_Step], seconds_of: Callable[[_Step], float]) -> float:
    """What the others let expect of a worker, by step or by shard, whichever is more.

    More shards take longer, by right. With fewer, even one that is slow may be done as soon as the others are.
    """
    by_step = median(seconds_of(other) for other in others)
    by_shard = median(seconds_of(other) / other.shards for other in others)
    return max(by_step, by_shard * step.shards)
