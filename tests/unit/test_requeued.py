"""A driver in a batch job: when it stops, and whether the scheduler starts it again."""

import itertools
import signal
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ClusterError, DescriptionError, Interrupted, StorageError, TrainingError
from cluster.host import batch_job as environment
from cluster.host.batch_job import BatchJob, EndsEarly, batch_job
from cluster.process.messages import Hung, ToDriver, Unkillable
from cluster.run.run_directory import RunDirectory
from jobs.spec import MaxFailuresSpec, TrainSpec, WorkersSpec
from launcher.cli import output
from launcher.driver.run_state import RunState
from launcher.driver.stop_conditions import Pace, StopConditions
from launcher.driver.stop_signals import StopSignals
from tests.specs import bare_job
from tests.unit import test_driver
from tests.unit.test_driver import (
    HELLO,
    LAG,
    SPENT,
    STARTED_AT,
    UNPLACED,
    Script,
    agents_lost,
    both,
    died,
    done,
    drive,
    events,
    exited,
    failed,
    failure,
    finished,
    hello,
    hung,
    left,
    node,
    not_begun,
    one,
    run,
    saved,
    started,
)

__all__ = ["run"]

USR1, TERM, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT
GOES_ON = BatchJob(requeues=True)


def job(ends_in_s: float, *, requeues: bool = True) -> BatchJob:
    return BatchJob(ends_at=STARTED_AT + ends_in_s, requeues=requeues)


class TestEnvironment:
    def test_a_process_outside_of_a_batch_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("ENDS_AT", "NOTICE_S", "REQUEUES", "LOST_NODES"):
            monkeypatch.delenv(f"LAUNCHER_JOB_{name}", raising=False)
        assert batch_job() == BatchJob(ends_at=None, notice_s=600.0, requeues=False, lost_nodes_path=None)
        for name in ("ENDS_AT", "NOTICE_S", "REQUEUES", "LOST_NODES"):
            monkeypatch.setenv(f"LAUNCHER_JOB_{name}", "")
        assert batch_job() == BatchJob(ends_at=None, notice_s=600.0, requeues=False, lost_nodes_path=None)

    def test_what_its_script_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", "1700000100")
        monkeypatch.setenv("LAUNCHER_JOB_NOTICE_S", "150")
        monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", "1")
        monkeypatch.setenv("LAUNCHER_JOB_LOST_NODES", "/scratch/lost nodes")
        assert batch_job() == BatchJob(
            ends_at=1_700_000_100.0, notice_s=150.0, requeues=True, lost_nodes_path=Path("/scratch/lost nodes")
        )

    @pytest.mark.parametrize(
        ("name", "value", "what"),
        [
            (
                "ENDS_AT",
                "2026-01-01T00:00:00",
                "must be a Unix time in whole seconds, got '2026-01-01T00:00:00'; leave",
            ),
            ("ENDS_AT", "-1", "must be a Unix time in whole seconds, got '-1'; leave it unset"),
            ("NOTICE_S", "1.5", "must be a whole number of seconds, got '1.5'; leave it unset if it is not known"),
            ("REQUEUES", "yes", "must be 1, got 'yes'; leave it unset if the job is not requeued"),
        ],
    )
    def test_what_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, what: str) -> None:
        monkeypatch.setenv(f"LAUNCHER_JOB_{name}", value)
        with pytest.raises(DescriptionError, match=rf"^LAUNCHER_JOB_{name}: {what}"):
            batch_job()

    @pytest.mark.parametrize(("number", "requeues", "expected"), [
        (USR1, "1", EndsEarly), (TERM, "1", KeyboardInterrupt), (USR1, "", KeyboardInterrupt),
    ])  # fmt: skip
    def test_what_a_signal_raises_before_training(
        self, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, requeues: str, expected: type[BaseException]
    ) -> None:
        monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", requeues)
        assert type(environment.interruption(number)) is expected
        signals = StopSignals()
        signals.interrupting = (USR1, TERM)
        with pytest.raises(KeyboardInterrupt) as caught:
            signals.count(number)
        assert type(caught.value) is expected


class Case:
    """Stop conditions whose clock a test sets."""

    def __init__(
        self, job: BatchJob, *, max_seconds: float | None = None, save_s: float = 0.0, budget: float | None = None
    ):
        self.signals = StopSignals()
        self.events: list[dict[str, Any]] = []
        self.run_log: Any = SimpleNamespace(
            is_stop_requested=False, save_s=save_s, saved_step=7, has_reached_end=False, state=RunState(step=7),
            event=lambda kind, **content: self.events.append({"kind": kind, **content}),
        )  # fmt: skip
        spec = bare_job(train=TrainSpec(max_seconds=max_seconds), workers=WorkersSpec(max_worker_hours=budget))
        self.stop = StopConditions(
            spec, self.run_log, self.signals, job, clock=lambda: 1000.0, unix_clock=lambda: STARTED_AT
        )

    def trains(self) -> "Case":
        self.stop.first_start_is_over()
        return self

    def at(self, seconds: float, *, waits: bool = False) -> str | None:
        """Why the run stops so many seconds after its start."""
        stop = self.stop.reason(1000.0 + seconds, waits_for_room=waits)
        return None if stop is None else stop.text

    def outcome(self, at: float) -> str:
        stop = self.stop.reason(1000.0 + at, waits_for_room=False)
        assert stop is not None
        self.stop.accept(stop)
        return self.stop.outcome(None, completed=False)


AT_LIMIT = "stopping at the time limit of its job"


class TestDeadline:
    """A step takes at most 30 s as long as it is not known, and the end 30 s."""

    def test_what_is_left_is_enough_for_a_save_of_this_run(self) -> None:
        assert Case(job(1000)).trains().at(940) is None
        assert Case(job(1000)).trains().at(940.1) == AT_LIMIT
        assert Case(job(1000), save_s=400.0).trains().at(540) is None
        assert Case(job(1000), save_s=400.0).trains().at(540.1) == AT_LIMIT

    def test_and_for_the_steps_in_progress_and_a_validation(self) -> None:
        case = Case(job(1000)).trains()
        for step, sent_at, validation in ((10, 5e6, 0.0), (20, 5e6 + 50, 0.0), (30, 5e6 + 200, 100.0)):
            case.stop.pace.row_logged(step, sent_at, SPENT | {"validation": validation})
        assert case.at(1000 - 30 - 3 * 5 - 100) is None
        assert case.at(1000 - 30 - 3 * 5 - 100 + 0.1) == AT_LIMIT

    def test_a_step_is_measured_by_one_clock(self) -> None:
        pace = Pace(RunState())
        pace.row_logged(10, 5e6, SPENT)
        pace.attempt_started()
        pace.row_logged(11, 1.0, SPENT)
        assert pace.stop_s == 30.0, "nothing is known yet"
        pace.row_logged(21, 21.0, SPENT)
        assert pace.stop_s == pytest.approx(6.0)

    @pytest.mark.parametrize(
        ("max_seconds", "ends_in_s", "why"),
        [(500.0, 1000.0, "stopping at train.max_seconds=500"), (950.0, 1000.0, AT_LIMIT), (500.0, 500.0, AT_LIMIT)],
    )
    def test_the_earlier_limit_wins_and_says_so(self, max_seconds: float, ends_in_s: float, why: str) -> None:
        case = Case(job(ends_in_s), max_seconds=max_seconds).trains()
        assert case.at(2000.0) == why
        assert case.outcome(2000.0) == ("requeued" if why == AT_LIMIT else "stopped")
        assert case.stop.is_cut_short == (why == AT_LIMIT)

    def test_without_a_requeue_the_run_is_interrupted(self) -> None:
        case = Case(job(1000, requeues=False)).trains()
        assert (case.outcome(950), case.stop.is_cut_short) == ("stopped", True)

    def test_the_times_of_the_try_before_count_until_there_are_others(self) -> None:
        case = Case(job(1000)).trains()
        case.run_log.state.validation_s = 200.0
        assert (case.at(1000 - 30 - 30 - 200), case.at(1000 - 30 - 30 - 200 + 0.1)) == (None, AT_LIMIT)
        for step, sent_at, validation in ((10, 5e6, 0.0), (20, 5e6 + 150, 100.0)):
            case.stop.pace.row_logged(step, sent_at, SPENT | {"validation": validation})
        assert (case.at(1000 - 30 - 3 * 5 - 100), case.run_log.state.validation_s) == (None, 100.0)

    def test_a_limit_that_is_too_short_for_a_start_is_an_error(self) -> None:
        case = Case(job(100))
        assert case.at(40) is None
        with pytest.raises(ClusterError) as caught:
            case.at(40.1)
        assert str(caught.value) == (
            "the time limit of the batch job is too short for a start: 60 s before it, the workers have yet to train; "
            "give the job more time; the newest checkpoint is of step 7"
        )

    def test_times_of_the_try_before_shorten_no_start(self) -> None:
        """One outage of the store would fail the job for good."""
        case = Case(job(1000), save_s=900.0)
        case.run_log.state.validation_s = 200.0
        assert case.at(940) is None
        assert case.trains().at(0) == AT_LIMIT

    def test_unless_the_start_has_waited_for_room(self) -> None:
        case = Case(job(100))
        assert case.at(10, waits=True) is None
        assert case.outcome(41) == "requeued"
        assert Case(job(100)).at(41, waits=True) == AT_LIMIT

    def test_a_limit_of_the_description_waits_for_the_first_step_and_that_of_the_job_does_not(self) -> None:
        case = Case(job(100), max_seconds=10.0)
        assert case.at(20) is None
        with pytest.raises(ClusterError, match="too short for a start"):
            case.at(41)
        assert case.trains().at(20) == "stopping at train.max_seconds=10"

    def test_a_job_without_a_limit(self) -> None:
        case = Case(GOES_ON, budget=1.0)
        assert case.at(1e9) is None
        case.run_log.state.worker_hours = 2.0
        assert case.at(1e9) is None
        assert case.trains().at(1e9) == "stopping at workers.max_worker_hours=1"
        assert case.outcome(1e9) == "stopped"


ON_PURPOSE = (TERM, INT, signal.SIGHUP, signal.SIGUSR2)
ORDERS = [
    ((USR1,), "requeued"),
    ((USR1, USR1), "requeued"),
    *(((number,), "stopped") for number in ON_PURPOSE),
    *((order, "stopped") for number in ON_PURPOSE for order in itertools.permutations((USR1, number))),
]


class TestSignals:
    @pytest.mark.parametrize(("numbers", "outcome"), ORDERS, ids=lambda value: str(value))
    @pytest.mark.parametrize("late", [False, True], ids=["at once", "during the save"])
    def test_only_the_warning_of_the_job_alone_requeues(
        self, numbers: tuple[signal.Signals, ...], outcome: str, *, late: bool
    ) -> None:
        case = Case(GOES_ON).trains()
        case.signals.count(numbers[0])
        first = case.stop.reason(1001.0, waits_for_room=False) if late else None
        for number in numbers[1:]:
            case.signals.count(number)
        stop = first or case.stop.reason(1001.0, waits_for_room=False)
        assert stop is not None
        case.stop.accept(stop)
        assert stop.text == f"stopping on {numbers[0].name}"
        assert case.stop.outcome(None, completed=False) == outcome
        assert (case.stop.is_cut_short, case.stop.is_abandoned) == (True, False)
        assert case.stop.outcome(None, completed=True) == "completed"
        assert case.stop.outcome(TrainingError("x"), completed=False) == "failed"
        assert case.stop.outcome(Interrupted("x"), completed=False) == "stopped"

    @pytest.mark.parametrize(("numbers", "outcome"), ORDERS, ids=lambda value: str(value))
    def test_without_a_requeue_none_does(self, numbers: tuple[signal.Signals, ...], outcome: str) -> None:
        del outcome
        case = Case(BatchJob()).trains()
        for number in numbers:
            case.signals.count(number)
        assert case.outcome(1) == "stopped"

    def test_launcher_stop_wins_too(self) -> None:
        case = Case(GOES_ON).trains()
        case.signals.count(USR1)
        assert case.outcome(1) == "requeued"
        case.run_log.is_stop_requested = True
        assert case.stop.outcome(None, completed=False) == "stopped"
        case = Case(GOES_ON).trains()
        case.run_log.is_stop_requested = True
        assert (case.outcome(1), case.stop.is_cut_short) == ("stopped", False)

    def test_one_in_the_last_step_does_not_either(self) -> None:
        """The next try would have nothing to do, and would end as this one did."""
        case = Case(GOES_ON).trains()
        case.signals.count(USR1)
        assert (case.outcome(1), case.stop.is_cut_short) == ("requeued", True)
        case.run_log.has_reached_end = True
        assert (case.stop.outcome(None, completed=False), case.stop.is_cut_short) == ("stopped", False)

    def test_one_that_comes_before_training(self) -> None:
        case = Case(GOES_ON)
        case.signals.count(USR1)
        assert case.outcome(1) == "requeued"


class TestDriver:
    def test_a_run_at_the_limit_of_its_job_is_saved_and_requeued(self, run: RunDirectory) -> None:
        script: Script = [HELLO, [*both(started(step=0)), saved(0, 5, seconds=20.0)], 120.0, left(2, 0, 9)]
        document, group = drive(run, script, job=job(200.0))

        assert (document["status"], document["step"], document["saved_step"]) == ("requeued", 9, 9)
        assert document["requeued"] == "at the time limit of its job"
        assert [order for order in group.orders if order.get("stop")] == [{"stop": True}]
        (requeued,) = events(run, "requeued")
        assert (requeued["step"], requeued["reason"]) == (9, "at the time limit of its job")
        assert events(run, "stopped") == []
        assert (run.read_status() or {})["status"] == "requeued"

    def test_the_longest_of_the_last_saves_counts(self, run: RunDirectory) -> None:
        training = [*both(started(step=0)), saved(0, 5, seconds=100.0), saved(0, 6, seconds=1.0)]
        document, _ = drive(run, [HELLO, training, 50.0, left(2, 0, 9)], job=job(200.0))
        assert document["status"] == "requeued"

    @pytest.mark.parametrize("saves", range(4))
    def test_a_save_of_the_try_before_counts_until_there_are_three_others(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, saves: int
    ) -> None:
        monkeypatch.setattr(test_driver, "RunState", partial(RunState, last_saves_s=[100.0]))
        training = [*both(started(step=0)), *(saved(0, 2 + number, seconds=10.0) for number in range(saves))]
        script: Script = [HELLO, training, 50.0, *([100.0] if saves == 3 else []), left(2, 0, 9)]
        document, _ = drive(run, script, job=job(200.0))
        assert document["status"] == "requeued"
        assert document["last_saves_s"] == [100.0, *[10.0] * saves, 2.0][-3:], "the last one as the run stops"

    def test_without_a_requeue_it_is_stopped(self, run: RunDirectory) -> None:
        script: Script = [HELLO, both(started(step=0)), 150.0, left(2, 0, 9)]
        document, _ = drive(run, script, job=job(200.0, requeues=False))

        assert (document["status"], document["requeued"]) == ("stopped", None)
        (stopping,) = events(run, "stop_requested")
        assert stopping["reason"] == AT_LIMIT
        assert len(events(run, "stopped")) == 1

    def test_a_start_that_is_longer_than_the_limit_fails(self, run: RunDirectory) -> None:
        with pytest.raises(ClusterError, match="too short for a start: .* there is no checkpoint yet"):
            drive(run, [HELLO, 150.0], job=job(200.0))
        assert (run.read_status() or {})["status"] == "failed"

    def test_one_that_waits_for_room_at_the_limit_is_requeued(self, run: RunDirectory) -> None:
        document, group = drive(run, [LAG, 150.0, []], lambda _: [node("a", 0)], job=job(200.0), wait_s=1e4)
        assert (document["status"], document["saved_step"], group.started) == ("requeued", None, [])

    def test_a_signal_that_comes_while_the_end_is_written_is_heard(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        signals = StopSignals()
        signals.count(USR1)
        write = RunDirectory.write_status

        def write_and_signal(directory: RunDirectory, status: dict[str, Any]) -> None:
            write(directory, status)
            if status["status"] == "requeued":
                signals.count(TERM)

        monkeypatch.setattr(RunDirectory, "write_status", write_and_signal)
        document, _ = drive(run, [[]], signals=signals, job=GOES_ON)

        assert (document["status"], document["requeued"]) == ("stopped", None)
        assert (run.read_status() or {})["status"] == "stopped"
        assert [event["kind"] for event in run.events().read()][-2:] == ["requeued", "stopped"]

    def test_a_request_that_comes_last_is_seen_before_it_is_cleared(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        signals = StopSignals()
        signals.count(USR1)
        clear = RunDirectory.clear_stop

        def ask_and_clear(directory: RunDirectory) -> None:
            clear(directory)

        monkeypatch.setattr(RunDirectory, "clear_stop", ask_and_clear)
        flush = type(run.events()).flush

        def flush_and_ask(log: Any) -> None:
            flush(log)
            if any(event["kind"] == "requeued" for event in run.events().read()):
                run.request_stop()

        monkeypatch.setattr(type(run.events()), "flush", flush_and_ask)
        document, _ = drive(run, [[]], signals=signals, job=GOES_ON)
        assert document["status"] == "stopped"


WAITS_FOR_DATA = Hung(
    step=7, doing="data", is_first_step=False, for_s=300.4, is_silent=True, stack="", data_delay="s3://x: no answer"
)
THREE = [node("a", 1), node("b", 1), node("c", 1)]
DEAD = "its node has died"
SILENT = "its agent has said nothing for 300 s"


class TestExcludedNodes:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "lost"

    @pytest.fixture
    def in_job(self, path: Path) -> BatchJob:
        return BatchJob(requeues=True, lost_nodes_path=path)

    def test_a_lost_node_is_told_once_and_the_run_does_not_wait_for_another(
        self, run: RunDirectory, in_job: BatchJob, path: Path
    ) -> None:
        """Two of two nodes are needed, and the job gets no third one."""

        def look(now: float) -> list[node]:  # type: ignore[valid-type]
            return [node("a", 1), node("b", 1)] if now < 0.6 else [node("a", 0)]

        script: Script = [
            hello("a", "b"), [*both(started(step=0)), saved(0, 5)], [agents_lost({1: DEAD})], LAG, 5.0, 6.0, []
        ]  # fmt: skip
        document, group = drive(run, script, look, job=in_job, wait_s=600.0)

        assert path.read_text() == "10.0.0.b\n"
        (excluded,) = events(run, "excluded")
        assert (excluded["address"], excluded["node"], excluded["cause"]) == ("10.0.0.b", "b", "node_lost")
        assert (document["status"], document["saved_step"]) == ("requeued", 5)
        assert document["requeued"] == "to go on without node 10.0.0.b"
        assert group.started == [2, 0]

    @pytest.mark.parametrize("without", ["requeues", "lost nodes"])
    def test_else_it_waits_as_long_as_that_may_help(self, run: RunDirectory, path: Path, without: str) -> None:
        in_job = BatchJob(requeues=without != "requeues", lost_nodes_path=path if without != "lost nodes" else None)

        def look(now: float) -> list[Any]:
            return [node("a", 1), node("b", 1)] if now < 0.6 else [node("a", 0)]

        script: Script = [
            hello("a", "b"), [*both(started(step=0)), saved(0, 5)], [agents_lost({1: DEAD})], LAG, 5.0, 6.0,
            *([] if without == "requeues" else [15.0]),
        ]  # fmt: skip
        expected = "batch job gets no other nodes" if without == "requeues" else "after 20 s of waiting"
        with pytest.raises(ClusterError, match=expected):
            drive(run, script, look, job=in_job, wait_s=20.0)
        assert path.exists() == (without == "requeues")

    def test_a_wait_that_may_be_short_does_not_end_the_run_either(self, run: RunDirectory, in_job: BatchJob) -> None:
        def look(now: float) -> list[Any]:
            return [node("a", 1), node("b", 1)] if now < 0.6 else [node("a", 0)]

        script: Script = [hello("a", "b"), both(started(step=0)), [agents_lost({1: DEAD})], LAG, 1.5, 2.0, []]
        document, _ = drive(run, script, look, job=in_job, wait_s=2.0)
        assert document["status"] == "requeued"

    def test_a_run_that_can_goes_on_with_the_rest(self, run: RunDirectory, in_job: BatchJob, path: Path) -> None:
        script: Script = [hello("a", "b"), both(started(step=0)), [agents_lost({1: DEAD})], hello("a", "c"),
                          both(started(step=0), 1), done(2, 1)]  # fmt: skip
        document, _ = drive(run, script, lambda _: THREE, job=in_job)
        assert (document["status"], path.read_text()) == ("completed", "10.0.0.b\n")

    def test_too_many_failures_of_a_node(self, run: RunDirectory, in_job: BatchJob, path: Path) -> None:
        lost = one(failure("gpu_lost", "CUDA error: uncorrectable ECC error encountered", step=3), 0, 0)
        script: Script = [hello("a", "a"), [*both(started(step=0)), saved(0, 5)], [lost, *exited(0)], []]
        document, _ = drive(run, script, job=in_job, max_failures=MaxFailuresSpec(machine=0))

        assert (document["status"], document["requeued"]) == ("requeued", "to go on without node 10.0.0.a")
        assert path.read_text() == "10.0.0.a\n"
        assert events(run, "excluded")[0]["cause"] == "gpu_lost"

    def test_a_hang_of_one_and_a_process_that_cannot_be_killed(
        self, run: RunDirectory, in_job: BatchJob, path: Path
    ) -> None:
        stuck = Unkillable(
            rank=1, id="b-1", generation=1, attempt=0, pid=4711, for_s=30.2, state="", on_gpu=False
        )  # fmt: skip
        script: Script = [
            hello("a", "b"), both(started(step=0)), [hung(0, "backward"), hung(1, "data")], [stuck], hello("a", "c"),
            both(started(step=0), 2), done(2, 2),
        ]  # fmt: skip
        drive(run, script, lambda _: THREE, job=in_job)
        assert path.read_text() == "10.0.0.b\n"
        assert [event["cause"] for event in events(run, "excluded")] == ["hung"]

    @pytest.mark.parametrize(
        "reports",
        [
            [failed(1, 0, place="step 3, mine.py:4, ValueError", step=3), *exited(0)],
            [died(1)],
            [not_begun(0, "start"), not_begun(1, "data")],
            [hung(0, "data"), hung(1, "data")],
            [hung(0, "backward"), hung(1, "data")],
            [hung(0, "backward", is_silent=True), hung(1, "data", is_silent=True)],
            [hung(0, "backward"), one(WAITS_FOR_DATA, 1)],
            [agents_lost({0: "its agent has said nothing for 300 s", 1: "its agent has said nothing for 300 s"})],
        ],
        ids=[
            "the code",
            "killed",
            "the same line of a first step",
            "all alike",
            "one behind the other",
            "all silent",
            "data",
            "all nodes",
        ],
    )
    def test_no_node_is_held_responsible_for_what_may_be_the_codes(
        self, run: RunDirectory, in_job: BatchJob, path: Path, reports: list[ToDriver]
    ) -> None:
        with pytest.raises((ClusterError, TrainingError)):
            drive(
                run, [hello("a", "b"), both(started(step=0)), reports], lambda _: THREE, job=in_job,
                max_failures=MaxFailuresSpec(machine=0, code=0),
            )  # fmt: skip
        assert not path.exists()
        assert events(run, "excluded") == []
        assert (run.read_status() or {})["status"] == "failed"

    def test_nor_is_the_only_one_if_it_says_nothing(self, run: RunDirectory, in_job: BatchJob, path: Path) -> None:
        """The job may have been suspended."""
        with pytest.raises(ClusterError):
            drive(
                run, [hello("a", "a"), both(started(step=0)), [hung(1, "data", is_silent=True)]], lambda _: THREE,
                job=in_job, max_failures=MaxFailuresSpec(machine=0),
            )  # fmt: skip
        assert not path.exists()

    def test_nor_is_a_second_one_that_says_nothing_at_the_same_place(
        self, run: RunDirectory, in_job: BatchJob, path: Path
    ) -> None:
        """Code that keeps Python's lock looks so."""
        again = Hung(step=7, doing="data", is_first_step=False, for_s=300.4, is_silent=True, stack="")
        script: Script = [hello("a", "b"), both(started(step=0)), [hung(1, "data", is_silent=True)]]
        script += [both(started(step=0), 1), [one(again, 0, 1)]]
        with pytest.raises(ClusterError):
            drive(run, script, lambda _: THREE, job=in_job, max_failures=MaxFailuresSpec(machine=1))
        assert path.read_text() == "10.0.0.b\n"
        assert (run.read_status() or {})["status"] == "failed"

    def test_nor_does_one_that_was_lost_before_requeue_a_later_failure(
        self, run: RunDirectory, in_job: BatchJob
    ) -> None:
        later = Hung(step=7, doing="data", is_first_step=False, for_s=300.4, is_silent=False, stack="")
        script: Script = [hello("a", "b"), both(started(step=0)), [agents_lost({1: DEAD})], hello("a", "c")]
        script += [both(started(step=0), 1), [one(later, 0, 1), one(later, 1, 1)]]
        with pytest.raises(ClusterError):
            drive(run, script, lambda _: THREE, job=in_job, max_failures=MaxFailuresSpec(machine=1))
        assert (run.read_status() or {})["status"] == "failed"

    def test_places_that_ray_does_not_find_yet_are_awaited(self, run: RunDirectory, in_job: BatchJob) -> None:
        """A former process may be slow to release what it holds."""
        vain: Script = [15.0, UNPLACED]
        document, _ = drive(run, [*(vain * 3), HELLO, finished(0)], job=in_job)
        assert document["status"] == "completed"
        with pytest.raises(ClusterError, match="Ray finds no room for 2 workers .* a batch job gets no other nodes"):
            drive(run, [*(vain * 3), 300.0, UNPLACED], job=in_job)

    @pytest.mark.parametrize(
        ("ranks", "reason", "told"),
        [((1, 2), DEAD, "a"), ((0, 1), DEAD, "ab"), ((2,), DEAD, "c"), ((0, 1, 2), DEAD, ""), ((1, 2), SILENT, "")],
        ids=["all others", "the own one too", "one of two", "all", "silence"],
    )
    def test_the_drivers_own_node_is_responsible_if_several_are_lost_and_they_are_all_others(
        self, run: RunDirectory, in_job: BatchJob, ranks: tuple[int, ...], reason: str, told: str
    ) -> None:
        lost = agents_lost(dict.fromkeys(ranks, reason))
        script: Script = [hello("a", "b", "c"), [one(started(step=0), rank) for rank in range(3)], [lost]]
        script += [[]] if told else []
        with nullcontext() if told else pytest.raises(ClusterError):
            drive(
                run, script, lambda _: [node("a", 1, is_here=True), node("b", 1), node("c", 1)], job=in_job, num=3,
                max_failures=MaxFailuresSpec(machine=0),
            )  # fmt: skip
        assert [event["address"] for event in events(run, "excluded")] == [f"10.0.0.{id}" for id in told]
        assert (run.read_status() or {})["status"] == ("requeued" if told else "failed")

    def test_room_that_comes_at_last_is_used(self, run: RunDirectory, in_job: BatchJob) -> None:
        def look(now: float) -> list[Any]:
            return [node("a", 1), node("b", 1)] if now < 0.6 or now > 11 else [node("a", 0)]

        script: Script = [hello("a", "b"), both(started(step=0)), [agents_lost({1: DEAD})], LAG, 5.0, 7.0]
        script += [hello("a", "b"), both(started(step=0), 1), done(2, 1)]
        document, _ = drive(run, script, look, job=in_job, wait_s=600.0)
        assert document["status"] == "completed"

    def test_nor_is_one_of_several_that_say_nothing(self, run: RunDirectory, in_job: BatchJob, path: Path) -> None:
        waited = one(failure("exchange_timeout", "waited for the others in vain", step=3), 0)
        script: Script = [hello("a", "b", "c"), [one(started(step=0), rank) for rank in range(3)], [waited], 6.0]
        with pytest.raises(ClusterError, match="worker 1 on node 10.0.0.b: says nothing"):
            drive(run, script, lambda _: THREE, job=in_job, num=3, max_failures=MaxFailuresSpec(machine=0))
        assert not path.exists()

    def test_a_failure_of_the_code_never_requeues_though_a_node_was_lost_before(
        self, run: RunDirectory, in_job: BatchJob
    ) -> None:
        raised: list[ToDriver] = [failed(1, 1, place="step 3, mine.py:4, ValueError", step=3), *exited(1)]
        script: Script = [hello("a", "b"), both(started(step=0)), [agents_lost({1: DEAD})], hello("a", "c"),
                          both(started(step=0), 1), raised]  # fmt: skip
        with pytest.raises(TrainingError):
            drive(run, script, lambda _: THREE, job=in_job, max_failures=MaxFailuresSpec(code=0))
        assert (run.read_status() or {})["status"] == "failed"

    def test_a_file_that_cannot_be_written_is_a_warning(self, run: RunDirectory, tmp_path: Path) -> None:
        in_job = BatchJob(requeues=True, lost_nodes_path=tmp_path / "no folder" / "lost")
        with pytest.raises(ClusterError):
            drive(
                run, [hello("a", "b"), both(started(step=0)), [agents_lost({1: DEAD})]], lambda _: THREE, job=in_job,
                max_failures=MaxFailuresSpec(machine=0),
            )  # fmt: skip
        assert events(run, "excluded") == []

    def test_a_limit_of_the_run_that_was_reached_before_holds(self, run: RunDirectory, in_job: BatchJob) -> None:
        lost = one(failure("gpu_lost", "CUDA error: uncorrectable ECC error encountered", step=3), 0, 0)
        script: Script = [hello("a", "a"), [*both(started(step=0)), saved(0, 5)], 10.0, [lost, *exited(0)], []]
        document, _ = drive(run, script, job=in_job, max_failures=MaxFailuresSpec(machine=0), max_seconds=9.0)
        assert document["status"] == "stopped"


class NoCluster:
    """A cluster that is always there."""

    def joined(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("status", ["requeued", "completed"])
def test_a_full_disk_does_not_hide_that_a_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    def write_out(_: str) -> bool:
        raise StorageError("stdout: No space left on device: the result is not written")

    monkeypatch.setattr(output, "write_out", write_out)
    ended = pytest.raises(SystemExit) if status == "requeued" else pytest.raises(StorageError)
    cluster: Any = NoCluster()
    document = {"run": "s3://runs/digits", "status": status, "step": 3, "time": {}}
    with ended as caught:
        output.drive_and_show(lambda _: document, cluster, as_json=True)
    if status == "requeued":
        assert getattr(caught.value, "code", None) == 75
        assert "warning: stdout: No space left on device" in capsys.readouterr().err
