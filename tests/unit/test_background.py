"""Work in a thread that a failing store makes wait, and that ends when patience does."""

import threading
import time

import pytest

from cluster.errors import StorageError
from launcher import background
from launcher.background import Background


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_LONGEST_PAUSE_S", 0.01)


class Work:
    """Fails until told otherwise."""

    def __init__(self) -> None:
        self.is_away = False
        self.calls = self.done = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.is_away:
            raise StorageError("s3://b: cannot write; wait")
        self.done += 1


def test_it_is_done_when_asked_and_every_few_seconds() -> None:
    work = Work()
    with Background(work, interval_s=60.0, patience_s=60.0) as asked:
        asked.finish()
        assert work.done == 1
    with Background(work, interval_s=0.01, patience_s=60.0):
        deadline = time.monotonic() + 60
        while work.done < 4:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_it_is_tried_again_until_the_store_is_back() -> None:
    work = Work()
    work.is_away = True
    with Background(work, interval_s=60.0, patience_s=60.0) as tried:
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
    with Background(work, interval_s=60.0, patience_s=0.1) as tried:
        for _ in range(2):  # the same again for whoever asks later
            with pytest.raises(StorageError, match=r"away for 0.1 s \(checkpoint.patience_s\): s3://b: cannot write"):
                tried.finish()


def test_a_store_that_is_back_when_patience_ends_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the pause between two tries would be."""
    monkeypatch.setattr(background, "_FIRST_PAUSE_S", 900.0)
    monkeypatch.setattr(background, "_LONGEST_PAUSE_S", 900.0)
    work = Work()

    def fail_once() -> None:
        work.is_away = not work.calls
        work()

    with Background(fail_once, interval_s=60.0, patience_s=0.2) as tried:
        tried.finish()
    assert work.done


def test_a_call_that_does_not_come_back_is_a_failing_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_HANGS_S", 0.02)
    monkeypatch.setattr(background, "_LEFT_S", 0.05)
    for_ever = threading.Event()
    hung = Background(lambda: for_ever.wait() and None, interval_s=60.0, patience_s=0.1)
    with hung, pytest.raises(StorageError, match="away for 0.1 s .*: a call has not come back for 0 s"):
        hung.finish()
    for_ever.set()


def test_who_abandons_a_run_waits_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_LEFT_S", 0.05)
    work = Work()
    work.is_away = True
    with Background(work, interval_s=60.0, patience_s=60.0) as tried, pytest.raises(StorageError, match="given up"):
        tried.finish(lambda: True)


def test_a_fault_of_our_own_is_not_tried_again() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with Background(work, interval_s=60.0, patience_s=60.0) as broken, pytest.raises(ZeroDivisionError):
        broken.finish()
