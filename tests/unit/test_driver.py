"""What the driver makes of the workers' messages: whom it blames, what it tries again, and when it gives up.

The worker group is a script; everything else is the product's own, on a store in memory.
"""

import io
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from cluster.capacity import Node, WorkerResources
from cluster.errors import Cause, ClusterError, Interrupted, LauncherError, TrainingError
from cluster.host.batch_job import BatchJob
from cluster.process.data_messages import DataDelayed, SampleSkipped
from cluster.process.messages import (
    DOING,
    Doing,
    EnvironmentsCompared,
    Exited,
    Failed,
    Finished,
    FromWorker,
    GoesOn,
    Hello,
    Hung,
    Report,
    RowLogged,
    SaveSkipped,
    ShareWritten,
    Spent,
    StillHere,
    TimeSpent,
    ToDriver,
    TrainingStarted,
    Unkillable,
)
from cluster.process.placement_messages import AgentsLost, AgentsPlaced, AgentsUnplaced
from cluster.run.manifest import Part, Share
from cluster.run.run_directory import RunDirectory
from cluster.tracking.tracker import NoTracker
from jobs.spec import MaxFailuresSpec, TrainSpec, WorkersSpec
from launcher.display.progress import open_progress
from launcher.driver.driver import Driver
from launcher.driver.membership import MOST_MISFITS, Membership
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from launcher.driver.stop_conditions import StopConditions
from launcher.driver.stop_signals import StopSignals
from tests.specs import bare_job

Script = list[list[ToDriver] | float]
"""What is said, batch by batch; a number lets so many seconds pass."""
PRESENT = -1
"""Stands, in a script, for the generation of the agents that were started last."""
SPENT: Spent = {**dict.fromkeys(DOING, 0.0), "start": 1.0, "data": 0.1, "forward": 0.2, "backward": 0.3}
STARTED_AT = 1_700_000_000.0
"""When the driver starts, in Unix time."""
LAG = 0.6
"""Seconds after which room for fewer than the most is believed to be all there is."""


class Group:
    """Workers that say what the script says."""

    resources = WorkerResources(cpus=1.0, gpus=0, accelerator=None)

    def __init__(self, script: Script, *, is_shared: bool = False) -> None:
        self.script = list(script)
        self.is_shared = self.may_grow = is_shared
        self.prepared: list[set[str]] = []
        self.released: list[set[str]] = []
        self.now = 0.0
        self.orders: list[dict[str, Any]] = []
        self.started: list[int] = []
        self.without: list[set[str]] = []
        self.started_at: list[float] = []
        self.is_closed = False
        self.is_settled: Callable[[], bool] = lambda: True

    def messages(self, timeout_s: float) -> list[ToDriver]:
        if not self.is_settled():  # the script goes on when the store has what was said
            time.sleep(0.001)
            return []
        assert self.script, "the driver waits for what never comes"
        said = self.script.pop(0)
        self.now += timeout_s if isinstance(said, list) else said
        return [self.with_generation(message) for message in said] if isinstance(said, list) else []

    def with_generation(self, message: ToDriver) -> ToDriver:
        if isinstance(message, Hello | AgentsPlaced | AgentsUnplaced | AgentsLost) and message.generation == PRESENT:
            return replace(message, generation=len(self.started))
        return message

    def prepare(self, nodes: list[Node]) -> None:
        self.prepared.append({node.id for node in nodes})

    def release(self, others_than: frozenset[str]) -> None:
        self.released.append(set(others_than))

    def start(self, num_workers: int, without: frozenset[str]) -> int:
        self.started.append(num_workers)
        self.without.append({*without})
        self.started_at.append(self.now)
        return len(self.started)

    def order(self, **changes: Any) -> None:
        self.orders.append(changes)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def run() -> RunDirectory:
    memory = fsspec.filesystem("memory")
    if memory.exists("/driver"):
        memory.rm("/driver", recursive=True)
    return RunDirectory("memory://driver/run")


def drive(
    run: RunDirectory,
    script: Script,
    look: Callable[[float], list[Node]] = lambda _: [node("a", 2)],
    *,
    max_seconds: float | None = None,
    step: int = 0,
    first_workers: list[dict[str, Any]] | None = None,
    screen: io.StringIO | None = None,
    is_shared: bool = False,
    signals: StopSignals | None = None,
    job: BatchJob | None = None,
    **workers: Any,
) -> tuple[dict[str, Any], Group]:
    """Drives a run through a script, which ends with the run.

    ``look`` tells the nodes that there are by then; ``step`` is that of the newest checkpoint of a run that is resumed,
    ``first_workers`` are those that it began on; a person sees ``screen``. ``is_shared``: the cluster is, and it grows.
    """
    spec = bare_job(train=TrainSpec(max_seconds=max_seconds), workers=WorkersSpec(**({"num": 2} | workers)))
    group = Group(script, is_shared=is_shared)
    plan: Any = SimpleNamespace(steps_per_epoch=10, total_steps=100, end_step=100)
    display = open_progress(screen or io.StringIO(), clock=lambda: group.now)
    run.take_lease()
    record = RunLog(
        spec=spec,
        plan=plan,
        run=run,
        state=RunState(step=step, saved_step=step or None),
        display=display,
        tracker=NoTracker(),
    )
    group.is_settled = lambda: record.is_settled
    stop = StopConditions(
        spec,
        record,
        signals or StopSignals(),
        job or BatchJob(),
        clock=lambda: group.now,
        unix_clock=lambda: STARTED_AT,
    )
    driver = Driver(
        spec=spec, run_url=run.url, run_log=record, stop=stop, first_workers=first_workers, clock=lambda: group.now
    )
    scripted: Any = group
    try:
        with record:
            driver.drive(lambda: Membership(scripted, spec.workers, lambda: look(group.now)))
    finally:
        assert group.is_closed
        assert not group.script, "the driver left before the end of the script"
    return record.document(), group


def node(id: str, free: float, *, drains_at: float | None = None, is_here: bool = False) -> Node:
    """A node of four cores."""
    return Node(
        id=id, address=f"10.0.0.{id}", resources={"CPU": 4.0}, free={"CPU": free}, drains_at=drains_at, is_here=is_here
    )


def hello(*nodes: str, generation: int = PRESENT) -> list[ToDriver]:
    """Agents on these nodes, by rank, placed and there."""
    return [
        AgentsPlaced(generation=generation, nodes=nodes),
        *(
            Hello(rank=rank, id=f"{id}-{rank}", generation=generation, node=id, address=f"10.0.0.{id}", pid=rank)
            for rank, id in enumerate(nodes)
        ),
    ]


HELLO = hello("a", "a")
UNPLACED: list[ToDriver] = [AgentsUnplaced(generation=PRESENT)]
"""Ray has waited for room for the agents in vain."""


def agents_lost(lost: dict[int, str], reason: str = "", *, generation: int = PRESENT) -> ToDriver:
    return AgentsLost(generation=generation, lost=lost, reason=reason)


def not_started(reason: str = "the placement group was not ready in 60 s") -> list[ToDriver]:
    return [agents_lost({}, reason)]


def one(report: Report, rank: int, attempt: int = 0) -> ToDriver:
    return FromWorker(rank, attempt, report)


def all_of(count: int, report: Report, attempt: int = 0) -> list[ToDriver]:
    return [one(report, rank, attempt) for rank in range(count)]


def both(report: Report, attempt: int = 0) -> list[ToDriver]:
    return all_of(2, report, attempt)


def started(*, step: int) -> TrainingStarted:
    return TrainingStarted(step=step, spent=SPENT)


def compared(
    workers: Sequence[dict[str, Any]], differences: str = "", *, is_refused: bool = False
) -> EnvironmentsCompared:
    return EnvironmentsCompared(workers=workers, differences=differences, is_refused=is_refused)


def row(step: int) -> ToDriver:
    content = {"step": step, "epoch": step // 10, "samples": step}
    return one(RowLogged(row=content, time=float(step), spent=SPENT), rank=0)


def saved(attempt: int, step: int, seconds: float = 2.0) -> ToDriver:
    share = Share(
        step=step,
        num_parts={"model": 1},
        parts={("model", 0): Part.of(f"step-{step:08d}/model", b"weights")},
        state_files=["model"],
        metrics={},
        versions={},
        created="2026-01-01T00:00:00+00:00",
    )
    return one(ShareWritten(share=share, seconds=seconds, best_step=None, best_metric=None, spent=SPENT), 0, attempt)


def left(count: int, attempt: int, step: int) -> list[ToDriver]:
    """The workers have saved and finished, with steps left to do."""
    return [saved(attempt, step), *all_of(count, Finished(step=step, completed=False, spent=SPENT), attempt)]


def done(count: int, attempt: int) -> list[ToDriver]:
    return all_of(count, Finished(step=100, completed=True, spent=SPENT), attempt)


def finished(attempt: int) -> list[ToDriver]:
    """Both workers, from the first step on."""
    return [*both(started(step=0), attempt), *done(2, attempt)]


def hung(rank: int, doing: Doing, *, step: int = 7, is_silent: bool = False, stack: str = "") -> ToDriver:
    found = Hung(step=step, doing=doing, is_first_step=False, for_s=300.4, is_silent=is_silent, stack=stack)
    return one(found, rank)


def not_begun(rank: int, doing: Doing, attempt: int = 0, *, line: int = 3) -> ToDriver:
    """A process is told as hung in its first step."""
    stack = f'  File "mine.py", line {line} in __init__'
    found = Hung(step=0, doing=doing, is_first_step=True, for_s=1800.4, is_silent=False, stack=stack)
    return one(found, rank, attempt)


def failure(
    cause: Cause,
    message: str,
    *,
    error: type[LauncherError] = ClusterError,
    step: int | None = None,
    place: str = "",
    traceback: str = "",
) -> Failed:
    return Failed(error=error, cause=cause, message=message, step=step, place=place, traceback=traceback)


def failed(rank: int, attempt: int, *, place: str = "", step: int | None = None) -> ToDriver:
    raised = failure("code", "ValueError: bad", error=TrainingError, step=step, place=place, traceback="T")
    return one(raised, rank, attempt)


def lost_peer(rank: int, attempt: int = 0) -> ToDriver:
    return one(failure("connection_lost", "lost the others", step=3), rank, attempt)


def died(rank: int, attempt: int = 0, *, code: int = -9, log_tail: str = "") -> ToDriver:
    return one(Exited(exit_code=code, oom_kill=False, step=0, log_tail=log_tail), rank, attempt)


def exited(attempt: int) -> list[ToDriver]:
    return [died(rank, attempt, code=1) for rank in range(2)]


def events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events().read() if event["kind"] == kind]


class TestStragglers:
    @pytest.mark.parametrize(
        ("seconds", "slow"), [((2.0, 1.0, 1.0), []), ((1.0, 1.0, 2.0), [2])], ids=["with two shards", "with one"]
    )
    def test_workers_are_compared_by_the_shards_that_their_hosts_give_them(
        self, run: RunDirectory, seconds: Sequence[float], slow: list[int]
    ) -> None:
        """Of 4 shards, worker 0, which is alone on its host, has two, and the others have one each."""
        windows: Script = [
            [one(TimeSpent(step=20 * count, spent=SPENT | {"forward": count * spent}), rank)
             for rank, spent in enumerate(seconds)]
            for count in range(1, 6)
        ]  # fmt: skip
        agents = hello("a", "b", "b")
        script: Script = [[agents[0], *reversed(agents[1:])], all_of(3, started(step=0)), *windows, done(3, 0)]

        drive(run, script, lambda _: [node("a", 1), node("b", 2)], num=3)

        assert [event["rank"] for event in events(run, "worker_slow")] == slow


class TestHangs:
    @pytest.mark.parametrize(
        ("reports", "blamed", "reason"),
        [
            ([hung(0, "backward"), hung(1, "data", stack='  File "mine.py", line 3 in f')], 1,
             'no progress for 300 s in data, File "mine.py", line 3 in f'),
            ([hung(0, "backward", step=8), hung(1, "backward")], 1, "no progress for 300 s in backward"),
            ([hung(0, "forward"), hung(1, "backward")], 0, "no progress for 300 s in forward"),
            ([hung(0, "backward"), hung(1, "backward", is_silent=True, stack="State:\tT (stopped)")], 1,
             "no progress for 300 s in backward, State: T (stopped)"),
            ([hung(0, "backward"), hung(1, "backward")], 0,
             "no progress for 300 s in backward, and so for all: what they exchange is stuck"),
            ([hung(0, "data"), hung(1, "data")], 0, "no progress for 300 s in data, and so for all"),
        ],
        ids=["waiting for data", "a step behind", "before the exchange", "silent", "all alike", "all at their data"],
    )  # fmt: skip
    def test_the_one_that_the_others_wait_for_is_blamed(
        self, run: RunDirectory, reports: list[ToDriver], blamed: int, reason: str
    ) -> None:
        document, group = drive(run, [HELLO, both(started(step=0)), reports, finished(attempt=1)])

        (lost,) = events(run, "worker_lost")
        assert (lost["rank"], lost["reason"]) == (blamed, reason)
        assert [order.get("attempt") for order in group.orders] == [0, 1]
        assert document["status"] == "completed"

    def test_a_worker_whose_silence_is_certain_is_replaced_at_once(self, run: RunDirectory) -> None:
        silent = [hung(1, "backward", is_silent=True)]
        drive(run, [HELLO, both(started(step=0)), silent, finished(attempt=1)])

        assert [event["waiting"] for event in events(run, "worker_hung")] == [[]]

    def test_nobody_is_blamed_while_one_works_and_when_all_go_on(self, run: RunDirectory) -> None:
        """Rank 0 waits for a slow store, which is no hang, and rank 1 waits for rank 0."""
        script: Script = [
            HELLO, both(started(step=0)), [hung(1, "backward")], 60.0, [one(GoesOn(), rank=1)], [hung(0, "data")], 60.0,
            [one(GoesOn(), rank=0)], done(2, 0),
        ]  # fmt: skip
        document, _ = drive(run, script)

        assert events(run, "worker_lost") == []
        assert document["attempts"] == 1


class TestFirstSteps:
    def test_one_that_is_not_done_is_tried_again(self, run: RunDirectory) -> None:
        reports = [not_begun(0, "start"), not_begun(1, "start")]
        document, _ = drive(run, [HELLO, reports, finished(attempt=1)])

        assert document["status"] == "completed"
        assert document["failures"] == {"machine": 1, "preemption": 0, "code": 0}
        (lost,) = events(run, "worker_lost")
        assert (lost["cause"], lost["rank"], lost["reason"]) == ("hung", 0, (
            "has not done its first step after 1800 s, importing, or building model and data sets, "
            'File "mine.py", line 3 in __init__, and so for all'
        ))  # fmt: skip
        (hang,) = events(run, "worker_hung")
        assert (hang["doing"], hang["is_first_step"]) == ("start", True)

    def test_at_the_same_line_it_ends_the_run_and_the_key_to_raise_is_named(self, run: RunDirectory) -> None:
        script: Script = [
            HELLO, *([not_begun(0, "data", attempt), not_begun(1, "data", attempt)] for attempt in range(2)),
        ]  # fmt: skip
        with pytest.raises(ClusterError) as caught:
            drive(run, script)

        assert str(caught.value) == (
            "worker 0 on node 10.0.0.a: has not done its first step after 1800 s, reading the first batch, "
            'File "mine.py", line 3 in __init__, and so for all at step 0, for the second time; '
            "see where it stood; if it was at work, raise workers.first_step_timeout_s; then resume; "
            "see memory://driver/run/logs, attempt 1, worker 0; there is no checkpoint yet"
        )

    def test_elsewhere_it_is_tried_again_as_far_as_the_budget_goes(self, run: RunDirectory) -> None:
        script: Script = [
            HELLO,
            *([not_begun(rank, "data", attempt, line=attempt) for rank in range(2)] for attempt in range(3)),
        ]
        with pytest.raises(ClusterError, match=r"and workers.max_failures.machine=2 is used up"):
            drive(run, script, max_failures=MaxFailuresSpec(machine=2))

    def test_a_process_that_is_slow_and_gets_there_is_left_alone(self, run: RunDirectory) -> None:
        going_on: list[ToDriver] = [one(GoesOn(), rank=0), *both(started(step=0))]
        document, _ = drive(run, [HELLO, [not_begun(0, "forward")], 60.0, going_on, done(2, 0)])

        assert document["attempts"] == 1


class TestExceptions:
    def test_once_is_bad_luck(self, run: RunDirectory) -> None:
        raised = [failed(1, 0, place="step 3, mine.py:4, ValueError", step=3), *exited(0)]
        document, _ = drive(run, [HELLO, both(started(step=0)), raised, finished(attempt=1)])

        assert document["status"] == "completed"
        (lost,) = events(run, "worker_lost")
        assert {name: lost[name] for name in ("cause", "rank", "node", "address", "step", "reason")} == {
            "cause": "code", "rank": 1, "node": "a", "address": "10.0.0.a", "step": 3, "reason": "ValueError: bad",
        }  # fmt: skip
        assert document["failure"]["message"] == "ValueError: bad"
        assert document["failures"] == {"machine": 0, "preemption": 0, "code": 1}

    def test_twice_at_the_same_place_is_the_codes(self, run: RunDirectory) -> None:
        place = "step 3, mine.py:4, ValueError"
        raised = [[failed(1, attempt, place=place, step=3), *exited(attempt)] for attempt in range(2)]
        with pytest.raises(TrainingError) as caught:
            drive(run, [HELLO, both(started(step=0)), raised[0], both(started(step=0), 1), raised[1]])

        assert str(caught.value) == (
            "worker 1 on node 10.0.0.a: ValueError: bad at step 3, for the second time; there is no checkpoint yet"
        )
        assert caught.value.traceback == "T"

    def test_elsewhere_it_is_tried_again_as_far_as_the_budget_goes(self, run: RunDirectory) -> None:
        raised = [[failed(1, attempt, place=f"step {attempt}", step=3), *exited(attempt)] for attempt in range(2)]
        with pytest.raises(TrainingError, match=r"bad at step 3, and workers.max_failures.code=1 is used up; there is"):
            drive(run, [HELLO, raised[0], raised[1]], max_failures=MaxFailuresSpec(code=1))

        assert len(events(run, "worker_lost")) == 2

    def test_what_all_agree_on_is_not_tried_again_and_the_save_under_way_is_kept(self, run: RunDirectory) -> None:
        """Rank 1 is heard first; what rank 0 was saving becomes a checkpoint before the run ends."""
        script: Script = [
            HELLO, both(started(step=0)), [failed(1, 0), exited(0)[1]], [saved(0, 5), failed(0, 0), exited(0)[0]],
        ]  # fmt: skip
        with pytest.raises(TrainingError) as caught:
            drive(run, script)

        assert str(caught.value).endswith("; the newest checkpoint is of step 5")
        assert run.checkpoints.steps() == [5]

    def test_last_words_are_not_waited_for_without_end(self, run: RunDirectory) -> None:
        with pytest.raises(TrainingError):
            drive(run, [HELLO, both(started(step=0)), [failed(1, 0)], 4.0, 4.0])


class TestRows:
    def test_a_checkpoint_may_be_newer_than_the_last_row(self, run: RunDirectory) -> None:
        """With train.log_every_steps=7 the newest row before step 40 is of step 35."""
        run.take_lease()
        metrics = run.metrics()
        for step in (28, 35):
            metrics.append({"step": step})
        metrics.flush()
        document, _ = drive(run, [HELLO, both(started(step=40)), done(2, 0)])

        assert document["status"] == "completed"
        assert [row["step"] for row in run.metrics().read()] == [28, 35]


class TestData:
    def test_a_store_that_does_not_answer_is_named_once_a_minute(self, run: RunDirectory) -> None:
        delayed = [one(DataDelayed(reason="s3://data: does not answer"), rank) for rank in (1, 0)]
        screen = io.StringIO()
        script: Script = [HELLO, both(started(step=0)), delayed, [row(5)], 61.0, delayed, done(2, 0)]
        drive(run, script, screen=screen)

        told = [(event["rank"], event["step"], event["reason"]) for event in events(run, "data_delayed")]
        assert told == [(1, 0, "s3://data: does not answer"), (1, 5, "s3://data: does not answer")]
        assert "worker 1 on node 10.0.0.a waits for data: s3://data: does not answer; it" in screen.getvalue()

    def test_a_bad_sample_that_was_skipped_is_recorded_by_any_rank(self, run: RunDirectory) -> None:
        skipped = SampleSkipped("train", 0, 3, "s3://data/3.jpg: is gone")
        document, _ = drive(run, [HELLO, both(started(step=0)), [one(skipped, rank=1)], done(2, 0)])

        (event,) = events(run, "sample_skipped")
        assert event["reason"] == "s3://data/3.jpg: is gone"
        assert document["skipped_samples"]["count"] == 1


class TestOverdueCheckpoints:
    def test_the_worker_that_holds_them_up_is_named_once(self, run: RunDirectory) -> None:
        """An epoch has 10 steps, and there is a save at the end of each."""
        skipped = one(SaveSkipped(step=20, reason="too slow"), rank=1)
        script: Script = [
            HELLO, both(started(step=0)), [skipped], 40.0, [row(29)], [row(30)], [row(40)], 40.0,
            [saved(0, 10)], [row(50)], done(2, 0),
        ]  # fmt: skip
        drive(run, script)

        (left_out,) = events(run, "checkpoint_left_out")
        assert (left_out["step"], left_out["rank"], left_out["reason"]) == (20, 1, "too slow")
        (overdue,) = events(run, "checkpoint_overdue")
        assert {name: overdue[name] for name in ("step", "saved_step", "ranks", "reason")} == {
            "step": 30, "saved_step": 0, "ranks": [1], "reason": "too slow",
        }  # fmt: skip
        assert run.checkpoints.steps() == [10]

    def test_a_checkpoint_that_comes_begins_the_count_again(self, run: RunDirectory) -> None:
        script: Script = [
            HELLO, both(started(step=0)), 40.0, [row(30)], [saved(0, 30)], 40.0, [row(60)], 1.0, [row(70)], done(2, 0),
        ]  # fmt: skip
        drive(run, script)

        overdue = events(run, "checkpoint_overdue")
        assert [(event["step"], event["saved_step"]) for event in overdue] == [(30, 0), (60, 30)]


class TestDeaths:
    def test_consequences_of_a_death_are_not_its_cause(self, run: RunDirectory) -> None:
        """Rank 0 says that it lost its peer before the peer's agent says how that ended."""
        broken = [lost_peer(0), died(0, code=1)]
        drive(run, [HELLO, both(started(step=0)), broken, [died(1)], finished(attempt=1)])

        (lost,) = events(run, "worker_lost")
        assert (lost["rank"], lost["reason"]) == (1, "killed by SIGKILL")

    def test_a_budget_that_is_used_up_ends_the_run(self, run: RunDirectory) -> None:
        with pytest.raises(ClusterError) as caught:
            drive(run, [HELLO, [died(1)], [died(1, 1, log_tail="last")]], max_failures=MaxFailuresSpec(machine=1))

        assert str(caught.value) == (
            "worker 1 on node 10.0.0.a: killed by SIGKILL at step 0, and workers.max_failures.machine=1 is used up; "
            "find out who killed it, then resume; see memory://driver/run/logs, attempt 1, worker 1; "
            "there is no checkpoint yet"
        )
        assert caught.value.traceback == "last"
        assert [lost.get("log_tail") for lost in events(run, "worker_lost")] == [None, "last"]

    def test_a_run_is_not_complete_if_an_agent_is_lost_before_the_last_checkpoint_is_whole(
        self, run: RunDirectory
    ) -> None:
        """Rank 0 has finished, and at first there is no room to start others."""
        lost = agents_lost({1: "its node has died"})
        script: Script = [
            HELLO, both(started(step=0)), [done(2, 0)[0], lost], 10.0, HELLO, both(started(step=0), 1), done(2, 1),
        ]  # fmt: skip
        document, group = drive(run, script, lambda now: [] if 0.6 < now < 10 else [node("a", 2)])

        assert (document["status"], group.started) == ("completed", [2, 2])

    def test_a_process_that_leaves_without_a_word_is_the_codes(self, run: RunDirectory) -> None:
        with pytest.raises(TrainingError) as caught:
            drive(run, [HELLO, both(started(step=4)), [died(1, code=3, log_tail="last words")]])

        assert str(caught.value) == (
            "worker 1 on node 10.0.0.a: ended with exit code 3 at step 4; see memory://driver/run/logs, attempt 0, "
            "worker 1; the newest checkpoint is of step 4"
        )
        assert caught.value.traceback == "last words"


class TestEnvironments:
    """What the bits depend on beside the description: recorded for each attempt, and told if it may change them."""

    HERE = {"gpu": "NVIDIA H200", "cpu": "x86_64", "code": {"mine": "a" * 64}}
    FIRST = [{"ranks": [0, 1], **HERE}]
    ALONE: list[ToDriver] = [one(compared(FIRST), rank=0), one(started(step=0), rank=0)]
    """A worker says what it is like, and begins to train, alone."""
    LACKS_MODULE = failure("environment", "No module named 'x'", error=TrainingError, step=0)

    def told(self, workers: list[dict[str, Any]], attempt: int = 0, differences: str = "") -> list[ToDriver]:
        return [one(compared(workers, differences), 0, attempt), *both(started(step=0), attempt)]

    def test_each_attempt_is_recorded(self, run: RunDirectory) -> None:
        screen = io.StringIO()
        script: Script = [HELLO, self.told(self.FIRST), [died(1)], self.told(self.FIRST, 1), done(2, 1)]
        drive(run, script, screen=screen)

        assert [event["workers"] for event in events(run, "environment")] == [self.FIRST] * 2
        assert "bits" not in screen.getvalue()

    def test_other_workers_within_a_run_are_told_once(self, run: RunDirectory) -> None:
        other = [{"ranks": [0, 1], **self.HERE, "gpu": "NVIDIA A100"}]
        screen = io.StringIO()
        script: Script = [
            HELLO, self.told(self.FIRST), [died(1)], self.told(other, 1), [died(1, 1)], self.told(other, 2), done(2, 2),
        ]  # fmt: skip
        drive(run, script, screen=screen)

        assert [line for line in screen.getvalue().splitlines() if "bits" in line] == [
            "warning: the run began on other workers: GPU NVIDIA H200 -> NVIDIA A100; "
            "the bits may differ from an undisturbed run's"
        ]

    def test_other_workers_than_those_of_the_first_attempt(self, run: RunDirectory) -> None:
        first = [{"ranks": [0, 1], **self.HERE, "code": {"mine": "b" * 64}}]
        screen = io.StringIO()
        drive(run, [HELLO, self.told(self.FIRST), done(2, 0)], first_workers=first, screen=screen)

        expected = "the run began on other workers: code of mine bbbbbbbbbbbb -> aaaaaaaaaaaa; the bits may"
        assert expected in screen.getvalue()

    def refused(self, workers: list[dict[str, Any]], attempt: int) -> list[ToDriver]:
        """All workers say that they differ, and end."""
        differ = failure("environment", "workers differ: cpu")
        ranks = [rank for of_workers in workers for rank in of_workers["ranks"]]
        return [
            one(compared(workers, "cpu", is_refused=True), 0, attempt),
            *(one(differ, rank, attempt) for rank in ranks),
            *(died(rank, attempt, code=1) for rank in ranks),
        ]

    def test_a_node_that_joins_and_is_unlike_the_others_is_left_out(self, run: RunDirectory) -> None:
        """Of two that join, the run goes on with the one that is like those it has trained on, whose code has changed.

        No row was told by then: a run may tell few.
        """
        screen = io.StringIO()

        def look(now: float) -> list[Node]:
            return [node("a", now < 0.8), node("b", 1 < now < 7.9 or now > 9), node("c", 1 < now < 7.9)]

        edited = {**self.HERE, "code": {"mine": "b" * 64}}
        others = [{"ranks": [0, 2], **edited}, {"ranks": [1], **edited, "cpu": "aarch64"}]
        script: Script = [
            LAG, hello("a"), self.ALONE, 1.0, 5.5, left(1, 0, 9), hello("a", "b", "c"), self.refused(others, 1), LAG,
            hello("a", "c"), both(started(step=9), 2), *[3.0] * 5, done(2, 2),
        ]  # fmt: skip
        document, group = drive(run, script, look, num=(1, 3), screen=screen)

        assert (document["status"], document["failures"]) == ("completed", {"machine": 0, "preemption": 0, "code": 0})
        assert list(zip(group.started, group.without)) == [(1, set()), (3, set()), (2, {"b"})]
        (event,) = events(run, "nodes_left_out")
        assert (event["step"], event["nodes"], event["reason"]) == (9, ["b"], "workers differ: cpu")
        told_of = (
            "going on without node 10.0.0.b, which cannot be used until Ray is started there anew: workers differ: cpu"
        )
        assert f"warning: step 9: {told_of}\n" in screen.getvalue()

    @pytest.mark.parametrize(
        ("there", "joined"),
        [({"code": {"mine": "b" * 64}}, {}), ({}, {}), ({"cpu": "aarch64"}, {"cpu": "ppc64"})],
        ids=["edited where it trains", "all have other data than planned", "all are others"],
    )
    def test_if_those_that_trained_are_unlike_themselves_the_run_ends(
        self, run: RunDirectory, there: dict[str, Any], joined: dict[str, Any]
    ) -> None:
        """What the node that joins is like does not matter then."""

        def look(now: float) -> list[Node]:
            return [node("a", now < 0.8), node("b", 1 < now < 7.9)]

        others = [{"ranks": [0], **self.HERE, **there}, {"ranks": [1], **self.HERE, **joined}]
        if there == joined:
            others = [{"ranks": [0, 1], **self.HERE}]
        script: Script = [
            LAG, hello("a"), [*self.ALONE, row(1)], 1.0, 5.5, left(1, 0, 9), hello("a", "b"), self.refused(others, 1),
        ]  # fmt: skip
        with pytest.raises(ClusterError, match="workers differ: cpu"):
            drive(run, script, look, num=(1, 2))

        assert events(run, "nodes_left_out") == []

    @pytest.mark.parametrize("cpu", ["ppc64", "x86_64"])
    def test_those_that_trained_last_are_the_measure_also_once_they_are_gone(self, run: RunDirectory, cpu: str) -> None:
        """Nodes of two kinds take the place of the one that is lost; if neither is of its kind, the run ends."""

        def look(now: float) -> list[Node]:
            return [node("a", 1)] if now < 1 else [node("b", now < 1.5), node("c", now < 1.5)]

        others = [{"ranks": [0], **self.HERE, "cpu": "aarch64"}, {"ranks": [1], **self.HERE, "cpu": cpu}]
        lost = agents_lost({0: "its node has died"})
        script: Script = [LAG, hello("a"), [*self.ALONE, row(1)], [lost], hello("b", "c"), self.refused(others, 1)]
        if cpu == self.HERE["cpu"]:
            script += [LAG, hello("c"), all_of(1, started(step=0), 2), done(1, 2)]
            document, group = drive(run, script, look, num=(1, 2))
            assert (document["status"], group.without[-1]) == ("completed", {"b"})
        else:
            with pytest.raises(ClusterError, match="workers differ: cpu"):
                drive(run, script, look, num=(1, 2))

    @pytest.mark.parametrize("is_there", [True, False], ids=["of itself", "of Ray"])
    def test_so_is_one_that_lacks_a_module(self, run: RunDirectory, is_there: bool) -> None:
        """Too few are left, so another node is waited for, and the room of the one that is left is let go of."""
        screen = io.StringIO()

        def look(now: float) -> list[Node]:
            is_disturbed = 0.2 < now < 20
            second = [] if is_disturbed else [node("b", 1)]
            return [node("a", not is_disturbed), *second, node("c", now > 0.2)]

        lost = agents_lost({1: "its node has died"})
        of_itself = [one(self.LACKS_MODULE, rank=1, attempt=1), died(1, 1, code=1), died(0, 1, code=1)]
        of_ray = [agents_lost({}, "No module named 'x'")]
        joined = [hello("a", "c"), of_itself] if is_there else [hello("a", "c")[:1], of_ray]
        script: Script = [
            hello("a", "b"), [*both(started(step=0)), row(1)], 1.0, [lost], *joined, LAG, 1.0, 20.0, hello("a", "b"),
            both(started(step=0), 1 + is_there), done(2, 1 + is_there),
        ]  # fmt: skip
        document, group = drive(run, script, look, screen=screen)

        assert (document["status"], group.started) == ("completed", [2, 2, 0, 2])
        assert group.without == [set(), set(), {"c"}, {"c"}]
        (waiting,) = events(run, "waiting")
        assert waiting["reason"] == (
            "there is room for 1 of at least 2 workers of 1 CPU each, on 2 nodes, of which node 10.0.0.c cannot be "
            f"used ({'' if is_there else 'the workers did not start: '}No module named 'x')"
        )

    def test_after_ten_that_did_not_fit_no_others_are_taken(self, run: RunDirectory) -> None:
        """Each comes as soon as the one before is left out, on a host of its own."""
        others = [{"ranks": [0], **self.HERE}, {"ranks": [1], **self.HERE, "cpu": "aarch64"}]
        script: Script = [LAG, hello("a"), [*self.ALONE, row(1)], 6.0, 6.0, left(1, 0, 9)]
        for number in range(MOST_MISFITS):
            script += hello("a", f"b{number}"), self.refused(others, number + 1)
        last = MOST_MISFITS + 1
        script += LAG, hello("a"), all_of(1, started(step=9), last), 6.0, 6.0, done(1, last)
        screen = io.StringIO()

        def look(now: float) -> list[Node]:
            return [node("a", now < 0.8), node(f"b{screen.getvalue().count('going on without')}", now > 1)]

        document, group = drive(run, script, look, num=(1, 2), screen=screen)

        assert document["status"] == "completed"
        tries = [(2, number) for number in range(MOST_MISFITS)]
        assert list(zip(group.started, map(len, group.without))) == [(1, 0), *tries, (1, MOST_MISFITS + 1)]
        assert screen.getvalue().count("no others are taken until launcher resume") == 1

    @pytest.mark.parametrize("is_like_itself", [True, False], ids=["other data", "no module"])
    def test_one_that_holds_all_places_is_left_out_too(self, run: RunDirectory, is_like_itself: bool) -> None:
        """Ray has placed both workers on the node that joined; the one that trained before is there still."""
        others = [{"ranks": [0, 1], **self.HERE}]
        failed = [one(self.LACKS_MODULE, rank=1, attempt=1), died(1, 1, code=1), died(0, 1, code=1)]
        script: Script = [
            LAG, hello("a"), [*self.ALONE, row(1)], 6.0, 6.0, left(1, 0, 9), hello("b", "b"),
            self.refused(others, 1) if is_like_itself else failed, LAG, LAG, hello("a"), all_of(1, started(step=9), 2),
            done(1, 2),
        ]  # fmt: skip

        def look(now: float) -> list[Node]:
            return [node("a", now < 0.8 or now > 14), node("b", 4 if now > 1 else 0)]

        document, group = drive(run, script, look, num=(1, 2))

        assert (document["status"], group.without[-1]) == ("completed", {"b"})

    def test_many_that_lack_a_module_are_left_out_at_once_and_another_takes_the_place_of_the_one_that_is_lost(
        self, run: RunDirectory
    ) -> None:
        """No worker was ever on the node that is left."""
        lost = agents_lost({0: "its node has died"})
        lacking = agents_lost(dict.fromkeys((0, 1), "No module named 'x'"))
        script: Script = [
            LAG, hello("a"), [*self.ALONE, row(1)], [lost], hello("b", "c")[:1], [lacking], LAG, LAG, hello("d"),
            all_of(1, started(step=0), 1), done(1, 1),
        ]  # fmt: skip

        def look(now: float) -> list[Node]:
            return [node("a", 1)] if now < 1 else [node("b", now < 1.7), node("c", now < 1.7), node("d", now > 1.7)]

        document, group = drive(run, script, look, num=(1, 2))

        assert (document["status"], group.without) == ("completed", [set(), set(), {"b", "c"}])

    def test_a_module_that_nobody_had_before_is_the_newcomers(self, run: RunDirectory) -> None:
        others = [
            {"ranks": [0], **self.HERE},
            *({"ranks": [rank], **self.HERE, "code": {"prepare": f"{rank}" * 64}} for rank in (1, 2)),
        ]
        script: Script = [
            LAG, hello("a"), [*self.ALONE, row(1)], 6.0, 6.0, left(1, 0, 9), hello("a", "b", "c"),
            self.refused(others, 1), LAG, LAG, hello("a"), all_of(1, started(step=9), 2), done(1, 2),
        ]  # fmt: skip

        def look(now: float) -> list[Node]:
            return [node("a", now < 0.8), node("b", now > 1), node("c", now > 1)]

        document, group = drive(run, script, look, num=(1, 3))

        assert (document["status"], group.without[-1]) == ("completed", {"b", "c"})

    def test_nodes_that_trained_before_others_took_their_place_are_newcomers(self, run: RunDirectory) -> None:
        """All workers were placed on another kind of node, and trained there; then on both kinds."""
        own, other = [{"ranks": [0], **self.HERE}], [{"ranks": [0, 1], **self.HERE, "cpu": "aarch64"}]
        both_kinds = [{"ranks": [0], **self.HERE}, {"ranks": [1], **self.HERE, "cpu": "aarch64"}]
        told = [one(compared(group), 0, attempt) for attempt, group in enumerate([own, other])]
        lost = agents_lost({0: "killed"})
        script: Script = [
            LAG, hello("a"), [told[0], one(started(step=0), rank=0), row(1)], 6.0, 6.0, left(1, 0, 9), hello("b", "b"),
            [told[1], *both(started(step=9), 1), *both(TimeSpent(step=10, spent=SPENT), 1)], [lost], hello("a", "b"),
            self.refused(both_kinds, 2), hello("b", "b"), both(started(step=9), 3), done(2, 3),
        ]  # fmt: skip

        def look(now: float) -> list[Node]:
            return [node("a", now < 0.8 or now > 13.5), node("b", 4 if now > 1 else 0)]

        document, group = drive(run, script, look, num=(1, 2))

        assert (document["status"], group.without[-1]) == ("completed", {"a"})

    def test_workers_that_differ_from_the_beginning_end_the_run(self, run: RunDirectory) -> None:
        others = [{"ranks": [0], **self.HERE}, {"ranks": [1], **self.HERE, "cpu": "aarch64"}]
        with pytest.raises(ClusterError, match="workers differ: cpu"):
            drive(run, [hello("a", "b"), self.refused(others, 0)], lambda _: [node("a", 1), node("b", 1)])

        assert events(run, "environment") == events(run, "nodes_left_out") == []

    def test_workers_that_may_differ(self, run: RunDirectory) -> None:
        screen = io.StringIO()
        drive(run, [HELLO, self.told(self.FIRST, differences="GPU A here, B there"), done(2, 0)], screen=screen)

        assert "warning: workers differ: GPU A here, B there; the bits may differ" in screen.getvalue()


class TestElastic:
    def test_it_begins_with_what_is_there_and_takes_more_once_there_has_been_room_for_a_while(
        self, run: RunDirectory
    ) -> None:
        def look(now: float) -> list[Node]:
            return [node("a", 1)] if now < 10 else [node("a", 0), node("b", 2)]

        script: Script = [
            LAG, hello("a"), all_of(1, started(step=0)), 10.0, 4.0, 2.0, left(1, 0, 9), LAG, hello("a", "b", "b"),
            all_of(3, started(step=9), 1), done(3, 1),
        ]  # fmt: skip
        document, group = drive(run, script, look, num=(1, 4))

        assert group.started == [1, 3]
        assert [order for order in group.orders if order.get("stop")] == [{"stop": True}]
        (resized,) = events(run, "resized")
        assert (resized["before"], resized["workers"], resized["step"]) == (1, 3, 9)
        assert document["workers"] == 3

    def test_room_that_comes_and_goes_is_not_taken(self, run: RunDirectory) -> None:
        def look(now: float) -> list[Node]:
            return [node("a", 1 - now // 3 % 2)]

        script: Script = [LAG, hello("a"), all_of(1, started(step=0)), *[1.1] * 20, done(1, 0)]
        _, group = drive(run, script, look, num=(1, 4))

        assert group.started == [1]

    def test_it_never_takes_more_than_the_most(self, run: RunDirectory) -> None:
        script: Script = [hello("a", "a"), both(started(step=0)), *[3.0] * 5, done(2, 0)]
        _, group = drive(run, script, lambda _: [node("a", 2), node("b", 4)], num=(1, 2))

        assert group.started == [2]

    def test_a_lost_node_is_done_without(self, run: RunDirectory) -> None:
        """What the survivors hold is theirs to take again."""

        def look(now: float) -> list[Node]:
            return [node("a", 0), node("b", 0)] if now < 2 else [node("a", 0)]

        script: Script = [
            hello("a", "a", "b"), all_of(3, started(step=0)), 2.0, [agents_lost({2: "its node has died"})],
            [lost_peer(0)], LAG, hello("a", "a"), both(started(step=0), 1), done(2, 1),
        ]  # fmt: skip
        first = [node("a", 2), node("b", 1)]
        _, group = drive(run, script, lambda now: first if now < 0.1 else look(now), num=(1, 3))

        assert group.started == [3, 2]
        (lost,) = events(run, "worker_lost")
        assert (lost["rank"], lost["reason"]) == (2, "its node has died")
        orders = [order["agents"] for order in group.orders if "agents" in order]
        assert orders == [{"a-0", "a-1", "b-2"}, {"a-0", "a-1"}]

    def test_an_agent_that_falls_silent_is_replaced_though_ray_has_not_lost_it(self, run: RunDirectory) -> None:
        here: list[ToDriver] = [StillHere(0, "a-0"), StillHere(1, "of before")]
        script: Script = [
            HELLO, both(started(step=0)), 200.0, here, 110.0, 0.1, HELLO, both(started(step=0), 1), done(2, 1),
        ]  # fmt: skip
        _, group = drive(run, script, hang_timeout_s=300.0)

        assert group.started == [2, 2]
        (lost,) = events(run, "worker_lost")
        assert (lost["rank"], lost["reason"]) == (1, "its agent has said nothing for 310 s")

    def test_agents_that_speak_more_rarely_than_the_limit_are_not_silent(self, run: RunDirectory) -> None:
        _, group = drive(run, [HELLO, both(started(step=0)), 10.0, done(2, 0)], hang_timeout_s=1.0)

        assert group.started == [2]

    def test_too_few_are_waited_for(self, run: RunDirectory) -> None:
        def look(now: float) -> list[Node]:
            return [node("a", 1 if now < 30 else 2)]

        _, group = drive(run, [10.0, 10.0, 20.0, HELLO, finished(0)], look, num=2)

        assert group.started == [2]
        (waiting,) = events(run, "waiting")
        assert waiting["reason"] == "there is room for 1 of at least 2 workers of 1 CPU each, on 1 node"

    def test_but_not_for_ever(self, run: RunDirectory) -> None:
        with pytest.raises(ClusterError) as caught:
            drive(run, [LAG, 10.0, 10.0], lambda _: [node("a", 1)], num=2, wait_s=15.0)

        assert str(caught.value) == (
            "there is room for 1 of at least 2 workers of 1 CPU each, on 1 node, after 15 s of waiting "
            "(workers.wait_s); free or add nodes, or lower workers.num, then launcher resume memory://driver/run"
        )

    def test_what_becomes_free_a_moment_late_is_not_done_without(self, run: RunDirectory) -> None:
        """Ray lets go of the room of agents bit by bit, and tells of it late."""

        def look(now: float) -> list[Node]:
            return [node("a", now >= 0.2), node("b", now >= 0.4)]

        _, group = drive(run, [0.3, 0.3, 0.3, 0.3, hello("a", "b"), done(2, 0)], look, num=(1, 3))

        assert group.started == [2]

    def test_of_room_that_never_stays_the_same_the_least_is_taken(self, run: RunDirectory) -> None:
        """As others run short tasks on a cluster, of a core or less each."""
        looks = [0.3] * 17  # 5.1 s
        _, group = drive(run, [*looks, hello("a", "a"), done(2, 0)], unsteady(2, 3), num=(1, 4))

        assert group.started == [2]

    def test_and_if_that_is_too_little_it_is_not_waited_for_for_ever(self, run: RunDirectory) -> None:
        looks: Script = [0.3] * 71  # four times 5.1 s, and 0.3 s between two of them
        with pytest.raises(ClusterError, match=r"workers of 1 CPU each, on 1 node, after 15 s of waiting"):
            drive(run, looks, unsteady(1, 3), num=(2, 4), wait_s=15.0)

        assert len(events(run, "waiting")) == 1


def unsteady(*free: float) -> Callable[[float], list[Node]]:
    """A node that has as much free now, and as much 0.3 s later, and so on."""
    return lambda now: [node("a", free[round(now / 0.3) % len(free)])]


class TestRoom:
    """A cluster that others use too."""

    def test_room_that_another_run_has_taken_is_waited_for_and_is_no_failure(self, run: RunDirectory) -> None:
        """Two runs see the same room at the same time, and one gets it."""

        def look(now: float) -> list[Node]:
            return [node("a", 2 if now < 1 or now > 20 else 0)]

        script: Script = [15.0, UNPLACED, LAG, 5.0, HELLO, finished(0)]
        document, group = drive(run, script, look, max_failures=MaxFailuresSpec(machine=0), max_worker_hours=0.004)

        assert (document["status"], document["waits_for"]) == ("completed", None)
        assert group.started == [2, 2]
        assert document["failures"]["machine"] == 0
        assert events(run, "agents_lost") == []
        assert len(events(run, "waiting")) == 1
        assert document["worker_hours"] < 0.001, "of workers that hold a place"

    def test_room_that_ray_does_not_find_is_not_waited_for_for_ever(self, run: RunDirectory) -> None:
        with pytest.raises(ClusterError) as caught:
            drive(run, [15.0, UNPLACED, 15.0, UNPLACED, 15.0, UNPLACED], wait_s=30.0)

        assert str(caught.value).startswith(
            "Ray finds no room for 2 workers of 1 CPU each, though there is some for 2, after 30 s of waiting "
        )
        assert events(run, "waiting")[0]["step"] == 0

    def test_in_a_cluster_that_others_use_ray_is_asked_for_the_least_though_there_is_no_room(
        self, run: RunDirectory
    ) -> None:
        """An autoscaler brings nodes for what Ray has no room for, and for nothing else that others might use."""
        screen = io.StringIO()
        script: Script = [
            LAG, 5.0, 6.0, 15.0, UNPLACED, LAG, 10.0, hello("b", "b"), both(started(step=0)), done(2, 0),
        ]  # fmt: skip
        full = [node("a", 0)]
        document, group = drive(run, script, lambda _: full, num=(2, 4), is_shared=True, screen=screen, wait_s=100.0)

        assert (document["status"], group.started) == ("completed", [2, 2])
        assert group.started_at == pytest.approx([11.85, 28.2], abs=1)
        assert document["workers"] == 2, "and not those that were only asked for"
        assert "an autoscaler, if there is one, is asked for them" in screen.getvalue()

    def test_nodes_that_it_does_not_need_may_be_taken_away_by_an_autoscaler(self, run: RunDirectory) -> None:
        """What is kept there for a start of workers would keep them."""

        def look(_: float) -> list[Node]:
            here = Node(id="s", address="s", resources={"CPU": 0.5}, free={}, drains_at=None, is_here=True)
            return [here, *(node(id, 1) for id in "abc")]

        script: Script = [hello("a", "b"), both(started(step=0)), 2.0, done(2, 0)]
        _, fixed = drive(run, script, look)
        assert fixed.prepared[0] == fixed.prepared[-1] == {"s", "a", "b", "c"}
        _, grows = drive(run, script, look, is_shared=True)
        assert (grows.prepared[0], grows.prepared[-1]) == ({"s"}, {"s", "a", "b"})
        assert {"s", "a", "b", "c"} in grows.prepared, "wherever they may come to be"
        assert grows.released == [{"a", "b"}]

    def test_on_a_machine_alone_it_is_not(self, run: RunDirectory) -> None:
        document, group = drive(run, [LAG, 50.0, []], lambda _: [node("a", 0)], max_seconds=40.0)

        assert (document["status"], group.started) == ("stopped", [])

    def test_a_run_that_waits_holds_no_room(self, run: RunDirectory) -> None:
        """Its second node is drained. Another run, which lost a node too, may need what it held."""
        within = time.time() + 1000.0

        def look(now: float) -> list[Node]:
            if now < 0.6:
                return [node("a", 1), node("b", 1)]
            second = node("b", 0, drains_at=within) if now < 30 else node("c", 1)
            return [node("a", now > 30), second]

        script: Script = [
            hello("a", "b"), both(started(step=0)), 2.0, left(2, 0, 9), LAG, LAG, 30.0, hello("a", "c"),
            both(started(step=9), 1), done(2, 1),
        ]  # fmt: skip
        document, group = drive(run, script, look)

        assert (document["status"], group.started) == ("completed", [2, 0, 2])
        assert len(events(run, "waiting")) == 1

    def test_what_is_waited_for_is_in_the_run_directory(self, run: RunDirectory) -> None:
        with pytest.raises(ClusterError):
            drive(run, [LAG, 10.0, 10.0], lambda _: [node("a", 1)], wait_s=15.0)

        status = run.read_status()
        assert status is not None
        assert status["waits_for"] == "there is room for 1 of at least 2 workers of 1 CPU each, on 1 node"


class TestStarts:
    """Agents that do not come up."""

    def test_they_are_tried_again_later_and_later(self, run: RunDirectory) -> None:
        script: Script = []
        for wait_s in (1, 2, 4):
            script += [not_started(), wait_s - 0.25, 0.25]
        document, group = drive(run, [*script, HELLO, finished(0)])

        assert group.started_at == pytest.approx([0.0, 1.25, 3.5, 7.75])
        assert document["status"] == "completed"
        assert document["failures"] == {"machine": 3, "preemption": 0, "code": 0}
        assert document["failure"]["cause"] == "not_started"

    def test_no_later_than_a_minute_and_soon_again_after_one_that_came_up(self, run: RunDirectory) -> None:
        failed_start: Script = [not_started(), 60.0]
        script = [*failed_start * 9, HELLO, both(started(step=0))]
        script += [[agents_lost({1: "its node has died"})], not_started(), 1.0]
        _, group = drive(run, [*script, HELLO, finished(1)], max_failures=MaxFailuresSpec(machine=None))

        first, *others = group.started_at
        assert len(others) == 11
        assert first + 9 * 60.25 == pytest.approx(others[8])
        assert others[10] - others[9] == pytest.approx(1.25)

    def test_they_have_the_budget_of_the_machine(self, run: RunDirectory) -> None:
        with pytest.raises(ClusterError) as caught:
            drive(run, [not_started(), 1.0, not_started()], step=5, max_failures=MaxFailuresSpec(machine=1))

        assert str(caught.value) == (
            "the workers did not start: the placement group was not ready in 60 s, and workers.max_failures.machine=1 "
            "is used up; see /tmp/ray/session_latest/logs there, or raise workers.start_timeout_s; then resume; "
            "the newest checkpoint is of step 5"
        )

    def test_one_that_is_late_is_a_failure_that_names_its_node(self, run: RunDirectory) -> None:
        """As in a late recovery, with a node that imports slowly."""
        there = hello("a", "b")
        script: Script = [
            there, [*both(started(step=0)), saved(0, 5)], [agents_lost({1: "died"})],
            there[:2], 299.5, 1.0, 1.0, 1.0, there, both(started(step=5), 1), done(2, 1),
        ]  # fmt: skip
        document, group = drive(run, script, lambda _: [node("a", 1), node("b", 1)])

        assert document["status"] == "completed"
        assert group.started == [2, 2, 2]
        assert [event["reason"] for event in events(run, "agents_lost")] == [
            "", "1 of 2 agents were there after 300 s (workers.start_timeout_s); late: node 10.0.0.b",
        ]  # fmt: skip
        assert document["failures"]["machine"] == 2
        assert [event["step"] for event in events(run, "training")] == [0, 5]

    def test_how_long_they_may_take_is_written(self, run: RunDirectory) -> None:
        _, group = drive(run, [HELLO[:1], 1000.0, HELLO, finished(0)], start_timeout_s=2000.0)

        assert group.started == [2]

    @pytest.mark.parametrize("until_ray_answers", [[14.0, HELLO[:1]], [15.0, UNPLACED, LAG, 14.0, HELLO[:1]]])
    def test_they_have_it_once_there_is_room_for_them(self, run: RunDirectory, until_ray_answers: Script) -> None:
        script = [*until_ray_answers, 9.0, HELLO[1:], finished(0)]
        document, _ = drive(run, script, start_timeout_s=10.0, max_failures=MaxFailuresSpec(machine=0))

        assert (document["status"], document["failures"]["machine"]) == ("completed", 0)

    def test_agents_of_which_ray_says_nothing_at_all_are_not_waited_for_for_ever(self, run: RunDirectory) -> None:
        """Their processes do not come up, before which Ray does not tell where they are."""
        document, group = drive(run, [39.0, 2.0, 1.0, 1.0, HELLO, finished(0)], start_timeout_s=10.0)

        assert (document["failures"]["machine"], group.started) == (1, [2, 2])
        (lost,) = events(run, "agents_lost")
        assert lost["reason"] == (
            "Ray has placed none of 2 agents after 40 s (workers.start_timeout_s and 30 s to find room)"
        )

    def test_a_late_word_of_a_group_before_changes_nothing(self, run: RunDirectory) -> None:
        """Ray replaces the agents a moment after the driver has asked for it, and tells of it late."""

        def look(now: float) -> list[Node]:
            return [node("a", 2, drains_at=math.inf if now > 333.0 else None), node("b", 2)]

        late = [*hello("a", "a", generation=1), agents_lost({1: "its node has died"}, generation=1)]
        there = hello("b", "b", generation=2)
        script: Script = [
            331.0, 0.1, 1.0, late, there[:2], late, there[2:], late, both(started(step=0)), late, 2.0, done(2, 0),
        ]  # fmt: skip
        document, group = drive(run, script, look)

        assert (document["status"], document["attempts"], group.started) == ("completed", 1, [2, 2])
        assert [order["agents"] for order in group.orders if "agents" in order] == [{"b-0", "b-1"}]
        assert document["failures"]["machine"] == 1, "only the first start, which took too long"
        assert events(run, "leaving") == [], "no agent is on the node that is drained"

    def test_what_is_said_of_agents_that_were_let_go_of_is_no_further_failure(self, run: RunDirectory) -> None:
        document, _ = drive(run, [not_started(), not_started(), 1.0, HELLO, finished(0)])

        assert document["failures"]["machine"] == 1

    def test_workers_that_ray_gives_up_together_are_lost(self, run: RunDirectory) -> None:
        taken = not_started("Training was interrupted by node preemption (preempted_ranks=[1])")
        script: Script = [HELLO, both(started(step=0)), taken, HELLO, finished(1)]
        document, _ = drive(run, script, max_failures=MaxFailuresSpec(machine=0))

        assert document["failures"] == {"machine": 0, "preemption": 1, "code": 0}
        assert document["failure"]["message"].startswith("the workers were lost: Training was interrupted")


class TestLimits:
    """``train.max_seconds`` ends a run also while no worker trains."""

    def test_a_first_start_may_go_on_beyond_it_to_the_end_of_a_step(self, run: RunDirectory) -> None:
        document, group = drive(run, [HELLO, 100.0, both(started(step=0)), left(2, 0, 1)], max_seconds=10.0)

        assert (document["status"], document["step"]) == ("stopped", 1)
        assert [order for order in group.orders if order.get("stop")] == [{"stop": True}]

    def test_a_start_after_a_failure_may_not(self, run: RunDirectory) -> None:
        script: Script = [HELLO, [not_begun(0, "start"), not_begun(1, "start")], 10.0, []]
        document, _ = drive(run, script, step=5, max_seconds=9.0)

        assert (document["status"], document["step"], document["attempts"]) == ("stopped", 5, 2)
        (stopping,) = events(run, "stop_requested")
        assert stopping["reason"] == "stopping at train.max_seconds=9"

    def test_a_first_start_that_fails_beyond_it_is_not_tried_again(self, run: RunDirectory) -> None:
        script: Script = [HELLO, 10.0, [not_begun(0, "start"), not_begun(1, "start")], []]
        document, _ = drive(run, script, max_seconds=9.0)

        assert (document["status"], document["step"], document["attempts"]) == ("stopped", 0, 1)
        assert len(events(run, "stop_requested")) == 1

    def test_neither_while_agents_are_waited_for(self, run: RunDirectory) -> None:
        document, group = drive(run, [not_started(), 0.9, []], max_seconds=1.0)

        assert (document["status"], group.started) == ("stopped", [2])

    def test_nor_while_there_is_no_room(self, run: RunDirectory) -> None:
        document, group = drive(run, [LAG, 10.0, []], lambda _: [node("a", 1)], max_seconds=9.0)

        assert (document["status"], group.started) == ("stopped", [])

    def test_workers_that_fail_on_their_way_out_are_not_started_again(self, run: RunDirectory) -> None:
        script: Script = [HELLO, [*both(started(step=0)), saved(0, 5)], 10.0, [died(1)], []]
        document, _ = drive(run, script, max_seconds=9.0)

        assert (document["status"], document["step"], document["attempts"]) == ("stopped", 5, 1)


class TestSavedStep:
    def test_it_is_that_of_the_newest_checkpoint(self, run: RunDirectory) -> None:
        script: Script = [HELLO, [*both(started(step=0)), saved(0, 5), row(7)], [died(1)]]
        with pytest.raises(ClusterError):
            drive(run, script, max_failures=MaxFailuresSpec(machine=0))
        status = run.read_status() or {}
        assert (status["status"], status["step"], status["saved_step"]) == ("failed", 7, 5)


class TestSignals:
    @pytest.mark.parametrize(
        "numbers",
        [(signal.SIGINT,), (signal.SIGHUP,) * 3, (signal.SIGUSR1, signal.SIGTERM), (signal.SIGUSR2, signal.SIGHUP)],
    )
    def test_they_stop_a_run(self, run: RunDirectory, numbers: tuple[signal.Signals, ...]) -> None:
        """A closed terminal sends SIGHUP more than once; Slurm sends SIGUSR1, and SIGTERM when the time is up."""
        signals = StopSignals()
        for number in numbers:
            signals.count(number)
        document, _ = drive(run, [[]], signals=signals)

        assert document["status"] == "stopped"
        (stopping,) = events(run, "stop_requested")
        assert stopping["reason"] == f"stopping on {numbers[0].name}"

    @pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
    def test_a_second_one_that_is_sent_on_purpose_abandons_it(self, run: RunDirectory, second: signal.Signals) -> None:
        signals = StopSignals()
        for number in (signal.SIGHUP, signal.SIGTERM, second):
            signals.count(number)
        with pytest.raises(Interrupted, match="abandoned at step 0"):
            drive(run, [], signals=signals)


class TestLeaving:
    def draining(self, within_s: float, **here: bool) -> Callable[[float], list[Node]]:
        """Two nodes for two workers; the one of rank 1 is drained while they train."""
        deadline = time.time() + within_s

        def look(now: float) -> list[Node]:
            drains_at = deadline if now > 0.6 else None
            return [node("a", 1), node("b", 1, drains_at=drains_at, **here)]

        return look

    def test_a_drained_node_is_left_after_a_save(self, run: RunDirectory) -> None:
        script: Script = [
            hello("a", "b"), [*both(started(step=0)), saved(0, 5)], 1.1, left(2, 0, 9), hello("a", "a"),
            both(started(step=9), 1), done(2, 1),
        ]  # fmt: skip
        document, group = drive(run, script, self.draining(60.0))

        assert group.started == [2, 2]
        assert [event["reason"] for event in events(run, "leaving")] == ["node 10.0.0.b is being drained"]
        assert [event["step"] for event in events(run, "training")] == [0, 9]
        assert document["time"]["lost"] == 0

    def test_or_at_once_if_a_save_would_not_fit(self, run: RunDirectory) -> None:
        script: Script = [
            hello("a", "b"), [*both(started(step=0)), saved(0, 5, seconds=30.0)], 1.1, 0.1, hello("a", "a"),
            both(started(step=5), 1), done(2, 1),
        ]  # fmt: skip
        _, group = drive(run, script, self.draining(10.0))

        assert group.started == [2, 2]
        assert not [order for order in group.orders if order.get("stop")]
        (leaving,) = events(run, "leaving")
        assert leaving["reason"].endswith(
            "s are left, and a save takes 30.0 s, so the checkpoint of step 5 is relied upon"
        )
        assert events(run, "worker_lost") == []

    def test_saves_before_the_last_one_and_those_of_drivers_before_do_not_count(
        self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(f"{__name__}.RunState", partial(RunState, last_saves_s=[900.0]))
        saves = [saved(0, 5, seconds=30.0), saved(0, 6)]
        for script in ([[*both(started(step=0)), *saves], 1.1], [both(started(step=0)), 1.1]):
            rest = [left(2, 0, 9), hello("a", "a"), both(started(step=9), 1), done(2, 1)]
            _, group = drive(run, [hello("a", "b"), *script, *rest], self.draining(10.0))
            assert [order for order in group.orders if order.get("stop")] == [{"stop": True}]

    def test_the_drivers_own_node_ends_the_run_resumable(self, run: RunDirectory) -> None:
        script: Script = [hello("a", "b"), both(started(step=0)), 1.1, left(2, 0, 9)]
        document, _ = drive(run, script, self.draining(60.0, is_here=True))

        assert document["status"] == "stopped"
        (stopping,) = events(run, "stop_requested")
        assert stopping["reason"] == "node 10.0.0.b is being drained, and the driver runs on it"

    def test_workers_that_die_on_their_way_out_are_no_failure(self, run: RunDirectory) -> None:
        gone = [agents_lost({1: "its node has died"})]
        script: Script = [
            hello("a", "b"), both(started(step=0)), 1.1, gone,
            hello("a", "a"), both(started(step=0), 1), done(2, 1),
        ]  # fmt: skip
        _, group = drive(run, script, self.draining(60.0), max_failures=MaxFailuresSpec(machine=0))

        assert group.started == [2, 2]
        assert events(run, "worker_lost") == []

    def test_one_that_is_killed_while_its_node_is_drained_is_preempted(self, run: RunDirectory) -> None:
        script: Script = [
            hello("a", "b"), both(started(step=0)), 1.1, [died(1)],
            hello("a", "a"), both(started(step=0), 1), done(2, 1),
        ]  # fmt: skip
        document, group = drive(run, script, self.draining(60.0), max_failures=MaxFailuresSpec(machine=0))

        assert group.started == [2, 2]
        (lost,) = events(run, "worker_lost")
        assert (lost["cause"], lost["reason"]) == ("preempted", "its node was being drained: killed by SIGKILL")
        assert document["failures"] == {"machine": 0, "preemption": 1, "code": 0}

    def test_a_budget_of_worker_hours(self, run: RunDirectory) -> None:
        script: Script = [HELLO, both(started(step=0)), 1800.0, left(2, 0, 9)]
        document, _ = drive(run, script, max_worker_hours=0.9)

        assert document["status"] == "stopped"
        assert document["worker_hours"] == pytest.approx(1.0, abs=0.01)
        (stopping,) = events(run, "stop_requested")
        assert stopping["reason"] == "stopping at workers.max_worker_hours=0.9"


class TestLostGpus:
    ECC = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"

    def lost(self, attempt: int, rank: int = 0) -> list[ToDriver]:
        """A worker loses its GPU, and the other one loses it."""
        of_gpu = one(failure("gpu_lost", self.ECC, step=3), rank, attempt)
        return [lost_peer(1 - rank, attempt), of_gpu, *exited(attempt)]

    def agents(self, *nodes: str) -> list[ToDriver]:
        return [replace(agent, gpu="0") if isinstance(agent, Hello) else agent for agent in hello(*nodes)]

    def test_the_run_leaves_a_node_whose_gpu_is_lost_if_it_keeps_its_size(self, run: RunDirectory) -> None:
        screen = io.StringIO()
        nodes = [node("a", 1), node("b", 1), node("c", 1)]
        script: Script = [
            self.agents("a", "b"),
            both(started(step=0)),
            self.lost(0),
            1.1,
            self.agents("b", "c"),
            finished(1),
        ]
        document, group = drive(run, script, lambda _: nodes, screen=screen)

        assert (document["status"], document["failures"]["machine"]) == ("completed", 1)
        assert list(zip(group.started, group.without)) == [(2, set()), (2, {"a"})]
        assert group.started_at[1] - group.started_at[0] >= 1
        (left_out,) = events(run, "nodes_left_out")
        assert (left_out["nodes"], left_out["reason"]) == (["a"], f"GPU lost: {self.ECC}")
        (lost,) = events(run, "worker_lost")
        assert (lost["cause"], lost["rank"], lost["node"], lost["gpu"]) == ("gpu_lost", 0, "a", "0")
        said = f"worker 0 on node 10.0.0.a, GPU 0: {self.ECC} at step 3; restarting from the newest checkpoint in 1 s"
        assert f"{said}, without node 10.0.0.a until Ray is started there anew" in screen.getvalue()

    def test_else_it_leaves_the_node_at_the_second_loss_if_it_can_go_on_at_all(self, run: RunDirectory) -> None:
        screen = io.StringIO()

        def look(now: float) -> list[Node]:  # the agents hold what there is
            return [node("a", now < 0.1), node("b", now < 0.1)]

        script: Script = [
            self.agents("a", "b"), both(started(step=0)), self.lost(0), 1.1, self.agents("a", "b"),
            both(started(step=0), 1), self.lost(1), 2.1, LAG, self.agents("b"), all_of(1, started(step=0), 2),
            done(1, 2),
        ]  # fmt: skip
        document, group = drive(run, script, look, screen=screen, num=(1, 2))

        assert document["status"] == "completed"
        assert list(zip(group.started, group.without)) == [(2, set()), (2, set()), (1, {"a"})]
        said = "where Ray may give out the same GPU again: the other nodes have room for 1 of 2 workers"
        assert said in screen.getvalue()

    def test_and_stays_on_its_only_node_as_long_as_machines_may_fail(self, run: RunDirectory) -> None:
        script: Script = [
            self.agents("a", "a"), self.lost(0), 1.1, self.agents("a", "a"), self.lost(1), 2.1, self.agents("a", "a"),
            self.lost(2),
        ]  # fmt: skip
        with pytest.raises(ClusterError, match=r"max_failures.machine=2 is used up; look at the GPU there") as caught:
            drive(run, script, max_failures=MaxFailuresSpec(machine=2))

        assert f"worker 0 on node 10.0.0.a, GPU 0: {self.ECC} at step 3" in str(caught.value)
        assert events(run, "nodes_left_out") == []

    def test_a_process_that_cannot_be_killed_is_left_with_its_node(self, run: RunDirectory) -> None:
        """It hangs, and the agent is told to start the next one; what an earlier generation says comes too late."""

        def stuck(generation: int) -> ToDriver:
            return Unkillable(
                rank=1, id="b-1", generation=generation, attempt=0, pid=4711, for_s=30.2,
                state="State:\tD (disk sleep)", on_gpu=True,
            )  # fmt: skip

        nodes = [node("a", 1), node("b", 1), node("c", 1)]
        script: Script = [
            self.agents("a", "b"), both(started(step=0)), [hung(0, "backward"), hung(1, "data")], [stuck(1)], 1.1,
            [*self.agents("a", "c"), stuck(1)], finished(2),
        ]  # fmt: skip
        document, group = drive(run, script, lambda _: nodes)

        assert (document["status"], document["failures"]["machine"]) == ("completed", 2)
        assert list(zip(group.started, group.without)) == [(2, set()), (2, {"b"})]
        last = events(run, "worker_lost")[-1]
        assert (last["cause"], last["rank"], last["node"]) == ("gpu_lost", 1, "b")
        assert "its former process 4711 has not ended 30 s after SIGKILL, State: D (disk sleep)" in last["reason"]
