"""The parts of a run's wall time add up to it, whatever happens to the run."""

import pytest

from launcher.goodput import PARTS, Ledger, goodput


def spent(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(("start", "data", "forward", "backward", "validation", "storage"), 0.0) | seconds


def nonzero(ledger: Ledger, now: float) -> dict[str, float]:
    parts = ledger.parts(now)
    assert tuple(parts) == PARTS
    return {part: seconds for part, seconds in parts.items() if seconds}


def test_a_run_without_faults() -> None:
    ledger = Ledger(begun_at=100.0)
    assert nonzero(ledger, 103.0) == {"startup": 3.0}

    ledger.training_began(110.0)
    ledger.told(spent(start=9.0, data=1.0, forward=2.0, backward=3.0, validation=4.0, storage=5.0))
    assert nonzero(ledger, 126.0) == {"startup": 10, "data": 1, "compute": 6, "validation": 4, "storage": 5}

    ledger.ended(127.0, kept=True)
    parts = nonzero(ledger, 127.0)
    assert parts == {"startup": 10, "data": 1, "compute": 5, "validation": 4, "storage": 5, "closing": 2}
    assert sum(parts.values()) == 27
    assert goodput(parts) == pytest.approx(9 / 27, abs=1e-4)


def test_what_no_checkpoint_kept_is_lost() -> None:
    ledger = Ledger(begun_at=0.0)
    ledger.training_began(10.0)
    ledger.saved(spent(forward=4.0, data=1.0))
    ledger.told(spent(forward=7.0, data=2.0))
    ledger.failed(20.0)
    ledger.failed(21.0)  # it can be noticed in several ways
    assert nonzero(ledger, 22.0) == {"startup": 10, "recovery": 2, "data": 1, "compute": 4, "lost": 5}

    ledger.training_began(23.0)
    ledger.told(spent(forward=2.0))
    ledger.ended(25.0, kept=True)
    assert nonzero(ledger, 25.0) == {"startup": 10, "recovery": 3, "data": 1, "compute": 6, "lost": 5}


def test_a_run_that_fails_keeps_what_was_saved() -> None:
    ledger = Ledger(begun_at=0.0, booked={"compute": 100.0, "startup": 5.0})
    ledger.training_began(1.0)
    ledger.saved(spent(backward=2.0))
    ledger.ended(9.0, kept=False)
    assert nonzero(ledger, 9.0) == {"startup": 6, "compute": 102, "lost": 6}


def test_a_run_that_never_trains_is_all_start() -> None:
    ledger = Ledger(begun_at=0.0)
    ledger.ended(7.0, kept=False)
    assert nonzero(ledger, 7.0) == {"startup": 7}
    assert goodput(ledger.parts(7.0)) == 0
    assert goodput({}) is None
