"""The parts of a run's wall time add up to it, whatever happens to the run."""

import random

import pytest

from cluster.process.activity import Activity
from cluster.process.messages import DOING
from launcher.driver.goodput import PARTS, Ledger, goodput, taken_over


def spent(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(DOING, 0.0) | seconds


def nonzero(ledger: Ledger, now: float) -> dict[str, float]:
    parts = ledger.parts(now)
    assert tuple(parts) == PARTS
    return {part: seconds for part, seconds in parts.items() if seconds}


class TestLedger:
    def test_a_run_without_faults(self) -> None:
        ledger = Ledger(begun_at=100.0)
        assert nonzero(ledger, 103.0) == {"startup": 3.0}

        ledger.waiting(103.0)
        ledger.workers_there(105.0)
        ledger.training_began(110.0, spent(start=2.0, restore=1.5))
        assert nonzero(ledger, 110.0) == {"startup": 6.5, "waiting": 2, "restore": 1.5}

        told = spent(start=2, restore=1.5, data=1, forward=2, backward=3, exchange=0.5, validation=4, storage=5)
        ledger.reported(told)
        began = {"startup": 6.5, "waiting": 2, "restore": 1.5, "data": 1, "validation": 4, "storage": 5}
        assert nonzero(ledger, 126.0) == began | {"compute": 5.5, "exchange": 0.5}

        ledger.ended(127.0, kept=True)
        parts = nonzero(ledger, 127.0)
        assert parts == began | {"compute": 5, "exchange": 0.5, "closing": 1.5}
        assert sum(parts.values()) == 27
        assert goodput(parts) == pytest.approx(9.5 / 27, abs=1e-4)

    def test_what_no_checkpoint_kept_is_lost(self) -> None:
        ledger = Ledger(begun_at=0.0)
        ledger.training_began(10.0, spent())
        ledger.saved(spent(forward=4.0, data=1.0))
        ledger.reported(spent(forward=7.0, data=2.0))
        assert ledger.unsaved() == {"data": 1, "compute": 3, "exchange": 0, "validation": 0, "storage": 0}
        ledger.failed(20.0)
        ledger.reported(spent(forward=9.0))  # by a process that does not know yet
        assert nonzero(ledger, 20.5) == {"startup": 10, "recovery": 0.5, "data": 1, "compute": 4, "lost": 5}
        ledger.failed(21.0)
        assert nonzero(ledger, 22.0) == {"startup": 10, "recovery": 2, "data": 1, "compute": 4, "lost": 5}

        ledger.training_began(23.0, spent(restore=1.0))
        ledger.reported(spent(forward=2.0, restore=1.0))
        ledger.ended(25.0, kept=True)
        assert nonzero(ledger, 25.0) == {
            "startup": 10, "recovery": 2, "restore": 1, "data": 1, "compute": 6, "lost": 5,
        }  # fmt: skip

    def test_a_run_that_loses_its_workers_waits_for_others(self) -> None:
        ledger = Ledger(begun_at=0.0)
        ledger.training_began(2.0, spent())
        ledger.reported(spent(forward=3.0))
        ledger.failed(5.0)
        ledger.waiting(6.0)
        ledger.workers_there(16.0)
        ledger.training_began(18.0, spent())
        assert nonzero(ledger, 18.0) == {"startup": 2, "lost": 3, "recovery": 3, "waiting": 10}

    def test_a_run_that_is_resized_loses_nothing(self) -> None:
        ledger = Ledger(begun_at=0.0)
        ledger.training_began(2.0, spent())
        ledger.saved(spent(forward=1.0))
        ledger.reported(spent(forward=3.0, storage=1.0))
        ledger.parked(6.5)
        ledger.workers_there(10.0)
        ledger.training_began(12.0, spent(restore=0.5))
        assert nonzero(ledger, 12.0) == {
            "startup": 2, "compute": 3, "storage": 1, "waiting": 3.5, "recovery": 2, "restore": 0.5,
        }  # fmt: skip

    def test_a_run_that_fails_keeps_what_was_saved(self) -> None:
        ledger = Ledger(begun_at=0.0, booked={"compute": 100.0, "startup": 5.0})
        ledger.training_began(1.0, spent())
        ledger.saved(spent(backward=2.0))
        ledger.ended(9.0, kept=False)
        assert nonzero(ledger, 9.0) == {"startup": 6, "compute": 102, "lost": 6}

    def test_a_run_that_never_trains_is_all_start(self) -> None:
        ledger = Ledger(begun_at=0.0)
        ledger.ended(7.0, kept=False)
        assert nonzero(ledger, 7.0) == {"startup": 7}
        assert goodput(ledger.parts(7.0)) == 0
        assert goodput({}) is None

    def test_a_checkpoint_can_tell_more_than_the_rows_before_it(self) -> None:
        ledger = Ledger(begun_at=0.0)
        ledger.training_began(0.0, spent())
        ledger.reported(spent(data=1.0))
        ledger.saved(spent(data=2.0, storage=1.0))
        assert nonzero(ledger, 3.0) == {"data": 2, "storage": 1}
        assert set(ledger.unsaved().values()) == {0}

    def test_messages_that_arrive_late_do_not_make_more_time(self) -> None:
        ledger = Ledger(begun_at=0.0)
        ledger.training_began(2.0, spent(restore=5.0))
        ledger.reported(spent(forward=3.0, data=1.0))
        assert nonzero(ledger, 4.0) == {"restore": 2, "compute": 1.5, "data": 0.5}
        ledger.ended(4.0, kept=True)
        assert nonzero(ledger, 4.0) == {"restore": 2, "compute": 1.5, "data": 0.5}

    @pytest.mark.parametrize("seed", range(30))
    def test_parts_add_up(self, seed: int) -> None:
        """Whatever happens in whatever order, with whatever earlier invocations have booked."""
        draw = random.Random(seed)
        booked = dict.fromkeys(draw.sample(PARTS, k=4), 10.0)
        ledger, now = Ledger(begun_at=0.0, booked=dict(booked)), 0.0
        for _ in range(60):
            now += draw.expovariate(0.2)
            told = spent(**{doing: draw.expovariate(0.5) for doing in DOING})
            match draw.randrange(3):
                case 0:
                    ledger.training_began(now, told)
                case 1:
                    draw.choice([ledger.reported, ledger.saved])(told)
                case 2:
                    draw.choice([ledger.waiting, ledger.workers_there, ledger.failed, ledger.parked])(now)
            parts = ledger.parts(now)
            assert sum(parts.values()) == pytest.approx(40 + now, abs=0.01)
            assert all(parts[part] >= booked.get(part, 0.0) for part in PARTS)
        ledger.ended(now, kept=draw.random() < 0.5)
        assert sum(ledger.parts(now).values()) == pytest.approx(40 + now, abs=0.01)


def test_what_a_killed_driver_had_not_saved_is_lost() -> None:
    parts = {"startup": 5.0, "compute": 60.0, "data": 3.0, "lost": 1.0}
    assert taken_over(parts, {"compute": 4.0, "data": 1.0}) == {"startup": 5, "compute": 56, "data": 2, "lost": 6}
    assert taken_over({}, {}) == {"lost": 0}


class TestActivity:
    def test_time_goes_to_what_is_done(self) -> None:
        now = 0.0
        activity = Activity(lambda: now)
        for seconds, doing, step in ((1, "restore", 0), (2, "data", 7), (4, "forward", 7), (8, "backward", 7)):
            now += seconds
            activity.mark(doing, step)
        now += 16
        activity.begin_exchange()
        now += 32
        assert activity.spent() == spent(start=1, restore=2, data=4, forward=8, backward=16, exchange=32)
        activity.end_exchange()
        now += 64
        beat = activity.beat()
        assert (beat.doing, beat.step, beat.for_s) == ("backward", 7, 64)
        assert beat.spent == activity.spent() == spent(
            start=1, restore=2, data=4, forward=8, backward=80, exchange=32
        )  # fmt: skip

    def test_the_first_step_of_a_process_is_over_when_the_next_begins(self) -> None:
        activity = Activity()
        marks = [("restore", 0), ("data", 7), ("backward", 7), ("data", 8), ("storage", 8)]
        firsts = []
        for doing, step in marks:
            activity.mark(doing, step)
            firsts.append(activity.beat().is_first_step)
        assert firsts == [True, True, True, False, False]

    def test_what_a_gpu_waited_is_told_later_and_is_never_more_than_the_process_took(self) -> None:
        now = 0.0
        activity = Activity(lambda: now)
        activity.mark("backward", 0)
        now = 3.0
        activity.mark("data", 1)
        activity.exchanged(2.0)
        assert activity.spent() == spent(backward=1, exchange=2)
        activity.exchanged(2.0)
        assert activity.spent() == spent(exchange=3)
