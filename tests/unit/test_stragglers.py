"""Who is called slow, at what and when: tables of windows."""

import random
from collections.abc import Sequence

import pytest

from cluster.process.messages import DOING
from launcher.driver.stragglers import Stragglers

Window = Sequence[tuple[float, ...]]
"""The mean step of each worker, by rank: milliseconds of data, of computing and, where there is one, of a save."""
Said = dict[int, list[tuple[int, str | None, float]]]
"""By window, counted from 1: who, at what, how many times as slow."""

EVEN: Window = [(2, 10), (2, 10)]
DATA: Window = [(2, 10), (22, 10)]
COMPUTE: Window = [(2, 10), (2, 20)]
SAVING: Window = [(2, 10, 18), (2, 10)]

TWO_WORKERS: dict[str, tuple[list[Window], Said]] = {
    "even": ([EVEN] * 5, {}),
    "data": ([DATA] * 8, {3: [(1, "data", 2.7)]}),
    "compute": ([COMPUTE] * 8, {3: [(1, "compute", 1.8)]}),
    "a store too slow for its cadence": ([SAVING] * 8, {3: [(0, "storage", 2.5)]}),
    "a long save now and then": ([EVEN, SAVING, EVEN, EVEN] * 3, {}),
    "not for long enough": ([DATA, DATA, EVEN] * 4, {}),
    "not by enough": ([[(2, 10), (4, 13)]] * 8, {}),
    "recovers": ([*[DATA] * 4, *[EVEN] * 8], {3: [(1, "data", 2.7)], 7: [(1, None, 1.0)]}),
    "recovers and falls back": (
        [*[DATA] * 3, *[EVEN] * 3, *[DATA] * 3], {3: [(1, "data", 2.7)], 6: [(1, None, 1.0)], 9: [(1, "data", 2.7)]},
    ),
    "recovers not for long enough": ([*[DATA] * 3, *[EVEN, EVEN, DATA] * 3], {3: [(1, "data", 2.7)]}),
    "then at something else": ([*[DATA] * 4, *[COMPUTE] * 4], {3: [(1, "data", 2.7)], 7: [(1, "compute", 1.8)]}),
    "at one and the other in turn": ([*[DATA] * 3, *[COMPUTE, DATA] * 3], {3: [(1, "data", 2.7)]}),
    "at both, mostly at one": ([COMPUTE, DATA, DATA], {3: [(1, "data", 2.7)]}),
    "then the other": ([*[DATA] * 3, *[[(22, 10), (2, 10)]] * 3], {
        3: [(1, "data", 2.7)], 6: [(0, "data", 2.7), (1, None, 0.4)]}),
}  # fmt: skip
OTHER_GROUPS: dict[str, tuple[tuple[int, ...], Window, Said]] = {
    "alone": ((4,), [(2, 10)], {}),
    "4 shards on 3 workers": ((1, 1, 2), [(2, 10), (2, 10), (4, 20)], {}),
    "the one with two shards is slow": ((1, 1, 2), [(2, 10), (2, 10), (4, 40)], {3: [(2, "compute", 1.8)]}),
    "one with one shard is slow": ((1, 1, 2), [(2, 30), (2, 10), (4, 20)], {3: [(0, "compute", 1.8)]}),
    "slow, and not waited for": ((1, 1, 2), [(2, 20), (2, 10), (4, 20)], {}),
    "one has three times the shards": ((1, 3), [(2, 10), (6, 30)], {}),
    "and is slow": ((1, 3), [(2, 10), (6, 60)], {3: [(1, "compute", 1.8)]}),
    "most have three times the shards": ((1, 3, 3), [(2, 10), (6, 30), (6, 30)], {}),
    "the one with few of them is slow, and waited for": (
        (1, 3, 3), [(2, 60), (6, 30), (6, 30)], {3: [(0, "compute", 1.7)]},
    ),
    "and is not waited for": ((1, 3, 3), [(6, 30), (6, 30), (6, 30)], {}),
    "shards of one to three": ((1, 2, 3, 3), [(2, 10), (4, 20), (6, 30), (6, 30)], {}),
    "two of eight, as of a node": (
        (1,) * 8, [(2, 10)] * 6 + [(14, 10)] * 2, {3: [(6, "data", 2.0), (7, "data", 2.0)]},
    ),
    "half of them": ((1,) * 4, [(2, 10), (2, 10), (2, 28), (2, 28)], {3: [(2, "compute", 2.5), (3, "compute", 2.5)]}),
    "all of them": ((1,) * 4, [(20, 100)] * 4, {}),
}  # fmt: skip


def hear(
    windows: Sequence[Window],
    *,
    shards: Sequence[int] = (2, 2),
    steps: int = 20,
    wire: float = 1.0,
    pace: Stragglers | None = None,
) -> Said:
    """What is said of windows in each of which everybody takes as long as the slowest and the wire; all at step 5."""
    pace = pace or Stragglers(shards)
    spent = [dict.fromkeys(DOING, 1.0) for _ in shards]
    for rank, seconds in enumerate(spent):
        assert pace.add_report(rank, 5, dict(seconds)) == []
    said: Said = {}
    for number, window in enumerate(windows, start=1):
        period = max(map(sum, window)) + wire
        for rank, (data, compute, *save) in enumerate(window):
            waits = period - data - compute - sum(save)
            step = {"data": data, "forward": compute / 4, "backward": compute * 3 / 4, "exchange": waits}
            for doing, milliseconds in (step | {"storage": sum(save), "validation": 100.0 * rank}).items():
                spent[rank][doing] += steps * milliseconds / 1000
            for news in pace.add_report(rank, 5 + number * steps, dict(spent[rank])):
                said.setdefault(number, []).append((news.rank, news.what, news.factor))
    return said


@pytest.mark.parametrize("name", TWO_WORKERS)
def test_two_workers(name: str) -> None:
    windows, said = TWO_WORKERS[name]
    assert hear(windows) == said


@pytest.mark.parametrize("name", OTHER_GROUPS)
def test_other_groups(name: str) -> None:
    shards, window, said = OTHER_GROUPS[name]
    assert hear([window] * 6, shards=shards) == said


@pytest.mark.parametrize(("wire", "named"), [(1.0, True), (150.0, True), (400.0, False)])
def test_who_makes_no_difference_to_a_step_is_not_named(wire: float, named: bool) -> None:
    assert bool(hear([DATA] * 6, wire=wire)) == named


def test_few_steps_make_no_window() -> None:
    """Three of them come together to one window of twelve steps."""
    assert hear([DATA] * 8, steps=4) == {}
    assert hear([DATA] * 9, steps=4) == {9: [(1, "data", 2.7)]}


def test_after_a_restart_it_is_not_said_again() -> None:
    pace = Stragglers((2, 2))
    assert hear([DATA] * 4, pace=pace) == {3: [(1, "data", 2.7)]}
    pace.restart()
    assert hear([DATA] * 4, pace=pace) == {}
    pace.restart()
    assert hear([EVEN] * 4, pace=pace) == {3: [(1, None, 1.0)]}


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_named_where_all_are_disturbed(seed: int) -> None:
    """Every worker up to 45% slower than it could be, and three times as slow for up to two windows in a row."""
    draw = random.Random(seed)
    windows = [
        [
            (draw.uniform(2, 2.9), draw.uniform(10, 14.5) * (3 if number % 3 and draw.random() < 0.2 else 1))
            for _ in range(4)
        ]
        for number in range(100)
    ]
    assert hear(windows, shards=(1, 1, 1, 1)) == {}


def test_what_is_said_to_people() -> None:
    texts = []
    pace = Stragglers((1, 1))
    for spent_s in range(10):
        for rank, data_s in enumerate((spent_s, 3.21 * spent_s if spent_s < 4 else 9.63 + spent_s)):
            spent = dict.fromkeys(DOING, 0.0) | {"data": data_s}
            texts += [news.text for news in pace.add_report(rank, 10 * spent_s, spent)]
    assert texts == [
        "takes 3.2 times as long as the others for its part of a step, mostly over data",
        "keeps up with the others again",
    ]
