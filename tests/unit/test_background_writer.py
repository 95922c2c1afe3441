"""Work in a thread that a failing store makes wait, and that ends when patience does."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.errors import StorageError
from launcher.driver import background_writer
from launcher.driver.background_writer import BackgroundWriter


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "_LONGEST_PAUSE_S", 0.01)


class Work:
    """Fails until told otherwise."""

    def __init__(self) -> None:
        self.is_away = False
        self.calls = self.done = 0

    def __call__(self) -> Iterator[str]:
        self.calls += 1
        if self.is_away:
            raise StorageError("s3://b: cannot write; wait")
        yield "all"
        self.done += 1


class Clock:
    """Stands still until somebody moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_done_when_asked_and_every_few_seconds() -> None:
    work = Work()
    with BackgroundWriter(work, interval_s=60.0, patience_s=60.0) as asked:
        asked.finish()
        assert work.done == 1
    with BackgroundWriter(work, interval_s=0.01, patience_s=60.0):
        deadline = time.monotonic() + 60
        while work.done < 4:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_it_is_tried_again_until_the_store_is_back() -> None:
    work = Work()
    work.is_away = True
    with BackgroundWriter(work, interval_s=60.0, patience_s=60.0) as tried:
        tried.ask()
        while tried.failing is None or work.calls < 3:
            time.sleep(0.001)
        tried.check()
        assert tried.failing[1] == "s3://b: cannot write; wait"
        work.is_away = False
        tried.finish()
        assert tried.failing is None
        assert work.done == 1


def test_it_ends_when_patience_does() -> None:
    work = Work()
    work.is_away = True
    with BackgroundWriter(work, interval_s=60.0, patience_s=0.1) as tried:
        for _ in range(2):  # the same again for whoever asks later
            with pytest.raises(StorageError, match=r"away for 0.1 s \(checkpoint.patience_s\): s3://b: cannot write"):
                tried.finish()


def test_a_store_that_is_back_when_patience_ends_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the pause between two tries would be."""
    monkeypatch.setattr(background_writer, "_FIRST_PAUSE_S", 900.0)
    monkeypatch.setattr(background_writer, "_LONGEST_PAUSE_S", 900.0)
    work = Work()

    def fail_once() -> Iterator[str]:
        work.is_away = not work.calls
        yield from work()

    with BackgroundWriter(fail_once, interval_s=60.0, patience_s=0.2) as tried:
        tried.finish()
    assert work.done


def test_a_call_that_does_not_come_back_is_a_failing_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "HANGS_S", 0.02)
    monkeypatch.setattr(background_writer, "_LEFT_S", 0.05)
    for_ever = threading.Event()

    def hang() -> Iterator[str]:
        yield "claim"
        for_ever.wait()

    hung = BackgroundWriter(hang, interval_s=60.0, patience_s=0.1)
    with hung, pytest.raises(StorageError, match=r"away for 0.1 s .*: a call has not come back for \d+ s"):
        hung.finish()
    for_ever.set()


def test_work_that_takes_long_is_no_store_that_is_away() -> None:
    clock, seen = Clock(), []

    def work() -> Iterator[str]:
        for step in "abc":
            clock.now += 14.0
            seen.append(long.failing)
            yield step

    long = BackgroundWriter(work, interval_s=60.0, patience_s=20.0, clock=clock)
    with long:
        long.finish()
        assert clock.now > 20.0
    assert seen == [None] * len(seen)


def test_a_call_has_hung_since_the_store_has_answered_last() -> None:
    clock, seen = Clock(), []

    def work() -> Iterator[str]:
        for seconds in (14.0, 16.0, 1.0):
            clock.now += seconds
            seen.append(hung.failing)
            yield f"for {seconds:g} s"

    hung = BackgroundWriter(work, interval_s=60.0, patience_s=60.0, clock=clock)
    with hung:
        hung.finish()
    assert seen[:3] == [None, (14.0, "a call has not come back for 16 s"), None]


def test_a_store_that_answers_and_does_not_write_is_away() -> None:
    """As a full disk, which lists: patience begins with the last thing that was done before."""
    clock, tries = Clock(), itertools.count(1)

    def work() -> Iterator[str]:
        clock.now += 1.0
        yield "claim"
        clock.now += 1.0
        raise StorageError(f"s3://b: cannot write at try {next(tries)}; make room")

    full = BackgroundWriter(work, interval_s=60.0, patience_s=10.0, clock=clock)
    with full, pytest.raises(StorageError, match="away for 10 s .*: s3://b: cannot write at try 6; make room"):
        full.finish()
    assert clock.now == 12.0


def test_a_failure_ends_once_what_has_failed_is_done() -> None:
    """And not when all is done, which may take long; what is done each time is no sign."""
    clock, seen, tries = Clock(), [], itertools.count(1)

    def work() -> Iterator[str]:
        number = next(tries)
        clock.now += 1.0
        yield "claim"
        clock.now += 1.0
        if number == 1:
            raise StorageError("first")
        seen.append(tried.failing)
        yield "rows"
        seen.append(tried.failing)
        clock.now += 1.0
        if number == 2:
            raise StorageError("second")

    tried = BackgroundWriter(work, interval_s=60.0, patience_s=60.0, clock=clock)
    with tried:
        tried.finish()
        assert tried.failing is None
    assert seen[:4] == [(1.0, "first"), None, (4.0, "second"), (4.0, "second")]


def test_work_that_gets_on_between_failures_goes_on_for_longer_than_patience() -> None:
    clock, left = Clock(), [*range(5)]

    def work() -> Iterator[str | None]:
        yield "claim"
        while left:
            clock.now += 8.0
            left.pop()
            yield None
            clock.now += 8.0
            raise StorageError("s3://b: cannot delete; wait")

    with BackgroundWriter(work, interval_s=60.0, patience_s=10.0, clock=clock) as tried:
        tried.finish()
    assert left == []
    assert clock.now == 80.0


def test_who_abandons_a_run_waits_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "_LEFT_S", 0.05)
    work = Work()
    work.is_away = True
    with (
        BackgroundWriter(work, interval_s=60.0, patience_s=60.0) as tried,
        pytest.raises(StorageError, match="given up"),
    ):
        tried.finish(lambda: True)


def test_a_fault_of_our_own_is_not_tried_again() -> None:
    def work() -> list[str]:
        raise ZeroDivisionError

    with BackgroundWriter(work, interval_s=60.0, patience_s=60.0) as broken, pytest.raises(ZeroDivisionError):
        broken.finish()
