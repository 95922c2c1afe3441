"""Two drivers of one run: at every storage call of the first, another takes over, in part or to its end.

The real record, run directory and logs, on a file system in memory that hands its calls to whoever wants to come first.
"""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.errors import StorageError
from cluster.run import lease
from cluster.run.checkpoints import Checkpoints
from cluster.run.lease import SupersededError
from cluster.run.manifest import FileEntry, Manifest
from cluster.run.run_directory import RunDirectory
from cluster.tracking.tracker import NoTracker
from jobs.spec import CheckpointSpec
from launcher.display.progress import open_progress
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from launcher.runs.rewind import go_back
from tests.specs import bare_job

URL = "watched://run"
SPEC = bare_job(checkpoint=CheckpointSpec(keep=2))
Call = Callable[[], Any]
Watch = Callable[[str, Call], Any]


def let(_: str, call: Call) -> Any:
    return call()


class WatchedFileSystem(MemoryFileSystem):
    """Every call goes through ``watch``, which is told what it is and makes it."""

    protocol = "watched"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    watch: ClassVar[Watch] = staticmethod(let)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("watched://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        return type(self).watch("write", lambda: MemoryFileSystem.pipe_file(self, path, value, **kwargs))

    def rm_file(self, path):
        return type(self).watch("delete", lambda: MemoryFileSystem.rm_file(self, path))

    def cat_file(self, path, **kwargs):
        return type(self).watch("read", lambda: MemoryFileSystem.cat_file(self, path, **kwargs))

    def find(self, path, **kwargs):
        return type(self).watch("list", lambda: list(MemoryFileSystem.find(self, path, **kwargs)))


fsspec.register_implementation("watched", WatchedFileSystem)
pytestmark = pytest.mark.usefixtures("calls_in_this_thread")


@pytest.fixture(autouse=True)
def _empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    WatchedFileSystem.store.clear()
    monkeypatch.setattr(WatchedFileSystem, "watch", staticmethod(let))


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ascending, so that every run of a scenario is the same."""
    numbers = itertools.count(1)
    monkeypatch.setattr(lease.secrets, "token_hex", lambda size: f"{next(numbers):0{2 * size}x}")


def watching(watch: Watch) -> None:
    WatchedFileSystem.watch = staticmethod(watch)


def drive(name: str, last: int) -> int:
    """What a driver does to a run directory: claims it, goes on from its newest checkpoint, closes the books.

    It saves every second step.

    Returns:
        The step it began at.
    """
    run = RunDirectory(URL)
    run.take_lease()
    found = run.checkpoints.newest_good(lambda step, defect: pytest.fail(f"{step}: {defect}"))
    begun = 0 if found is None else found[0].step
    record = record_of(run, last)
    record.event("attempt_started", by=name)
    record.begins_at(begun)
    list(record.write())
    for step in range(begun + 1, last + 1):
        record.row({"step": step, "epoch": 0, "samples": step, "by": name}, 0.0)
        if step % 2 == 0:
            record.checkpoint(save(run, step), (None, None), 0.1)
            list(record.write())
            record.tend()
    record.state.status = "completed"
    record.event("completed", by=name)
    record.flush()
    record._pending.is_closing = True  # what ``close`` sets, before it waits for the thread that is not here
    list(record.write())
    return begun


def record_of(run: RunDirectory, last: int) -> RunLog:
    plan: Any = SimpleNamespace(steps_per_epoch=10, total_steps=last, end_step=last)
    display = open_progress(io.StringIO(), clock=lambda: 0.0)
    return RunLog(spec=SPEC, plan=plan, run=run, state=RunState(), display=display, tracker=NoTracker())


def save(run: RunDirectory, step: int) -> Manifest:
    """The workers' part, whose bits follow from the step alone; not among the calls that are watched."""
    watch = WatchedFileSystem.watch
    watching(let)
    part = Checkpoints(run.store.at("checkpoints")).write_part(step, ("model", 0), b"%d" % step)
    watching(watch)
    return Manifest(
        step=step,
        files={"model": FileEntry((part,))},
        state_sha256=f"{step:064x}",
        metrics={},
        versions={},
        created="2030-01-01T00:00:00Z",
    )


def calls_of(work: Callable[[], object]) -> list[str]:
    """The storage calls that it makes, undisturbed."""
    kinds: list[str] = []

    def note(kind: str, call: Call) -> Any:
        kinds.append(kind)
        return call()

    watching(note)
    work()
    watching(let)
    return kinds


def assert_only_the_new_one_shows(begun: int, last: int) -> None:
    watching(let)
    run = RunDirectory(URL)
    rows = run.metrics().read()
    assert [row["step"] for row in rows] == list(range(1, last + 1)), "none is lost"
    assert all(row["by"] == "new" for row in rows if row["step"] > begun)
    told = [(event["kind"], event.get("by")) for event in run.events().read()]
    of_new = told[told.index(("attempt_started", "new")) :]
    assert "old" not in [by for _, by in of_new]
    saves = range(begun + 2, last + 1, 2)
    kinds = [kind for kind, _ in of_new if kind != "checkpoints_removed"]
    assert kinds == ["attempt_started", "training", *["checkpoint"] * len(saves), "completed"]
    newest = max(saves, default=begun)
    assert_newest_two(run, newest)
    status = run.read_status()
    assert status is not None
    assert (status["status"], status["step"]) == ("completed", last)
    third = RunDirectory(URL)
    third.take_lease()
    assert_newest_two(third, newest)


def assert_newest_two(run: RunDirectory, newest: int) -> None:
    """There is a row of every step up to these."""
    steps = [step for step in (newest - 2, newest) if step > 0]
    assert run.checkpoints.steps()[-2:] == steps
    assert all(run.checkpoints.read(step) for step in steps)


OLD_LAST = 4


def interleave(at: int, other_at: int | None, new_last: int) -> bool:
    """The new driver runs to its end at one call of the old one; that call is made at one of the new one's calls.

    Args:
        at: The old one's call, from 0.
        other_at: The new one's call before which it is made; none: after the last.
        new_last: The step at which the new one ends.

    Returns:
        Whether both calls were there to be made.
    """
    WatchedFileSystem.store.clear()
    counts = {"old": 0, "new": 0}
    outcome: list[Any] = []
    begun: list[int] = []

    def in_old(_: str, call: Call) -> Any:
        counts["old"] += 1
        if counts["old"] - 1 != at:
            return call()

        def make() -> None:
            try:
                outcome.append(call())
            except FileNotFoundError as error:
                outcome.append(error)

        def in_new(_: str, own_call: Call) -> Any:
            counts["new"] += 1
            if counts["new"] - 1 == other_at:
                make()
            return own_call()

        watching(in_new)
        begun.append(drive("new", new_last))
        if not outcome:
            make()
        watching(in_old)
        if isinstance(outcome[0], FileNotFoundError):
            raise outcome[0]
        return outcome[0]

    watching(in_old)
    with pytest.raises(SupersededError, match="has taken the run over"):
        drive("old", OLD_LAST)
    assert_only_the_new_one_shows(begun[0], max(begun[0], new_last))
    return other_at is None or counts["new"] > other_at


CLAIM_CALL = 5
"""Before it writes its claim, a driver is not there."""


@pytest.mark.slow
@pytest.mark.parametrize(("new_last", "least_points"), [(OLD_LAST + 2, 700), (OLD_LAST - 1, 500)])
def test_every_interleaving_of_two_drivers(new_last: int, least_points: int):
    """A call that changes something is made before, between any two, or after all calls of the new one.

    The new one passes the last step of the old one, or does not come so far.
    """
    old = calls_of(lambda: drive("old", OLD_LAST))
    assert old[CLAIM_CALL] == "write"
    num_points = 0
    for at in range(CLAIM_CALL, len(old)):
        changes = old[at] in ("write", "delete")
        for other_at in (None, *range(10_000 if changes else 1)):
            if (at, other_at) == (len(old) - 1, 0):
                break  # the old one has ended before the new one begins
            num_points += 1
            if not interleave(at, other_at, new_last):
                break
    assert num_points > least_points


class TakenOver:
    """Two drivers: the old one has committed a checkpoint of step 2 and keeps one, the new one is to come."""

    def __init__(self) -> None:
        self.old, self.new = RunDirectory(URL), RunDirectory(URL)
        self.old.take_lease()
        self.save_and_remove(2)

    def save_and_remove(self, step: int) -> None:
        """As a driver does, which makes sure of its claim before each."""
        self.old.check_lease()
        self.commit(step)
        self.old.check_lease()
        list(self.old.checkpoints.retain(step, 1))

    def commit(self, step: int) -> None:
        self.old.checkpoints.commit(save(self.old, step))


def come_before(at: int, first: Call) -> Iterator[int]:
    """From now on, something else is done first at the call of this number, from 0; counts the calls."""
    counted = itertools.count()

    def watch(_: str, call: Call) -> Any:
        if next(counted) == at:
            watching(let)
            first()
            watching(watch)
        return call()

    watching(watch)
    return counted


def at_each_call(work: Callable[[TakenOver], Any], first: Callable[[TakenOver], Any]) -> Iterator[TakenOver]:
    """For each call of the work, the drivers after something else was done before that call."""
    for at in itertools.count():
        WatchedFileSystem.store.clear()
        drivers = TakenOver()
        counted = come_before(at, partial(first, drivers))
        work(drivers)
        watching(let)
        if next(counted) <= at:
            assert at > 1
            return
        yield drivers


def test_a_driver_that_goes_on_until_it_sees_the_new_claim_loses_no_checkpoint() -> None:
    """What it commits meanwhile counts, for it removes older ones."""

    def go_on(drivers: TakenOver) -> None:
        with contextlib.suppress(SupersededError):
            for step in (4, 6, 8):
                drivers.save_and_remove(step)

    begun = set()
    for drivers in at_each_call(lambda drivers: drivers.new.take_lease(), go_on):
        found = drivers.new.checkpoints.newest_good(lambda step, defect: pytest.fail(f"{step}: {defect}"))
        assert found is not None
        begun.add(found[0].step)
    assert begun == {2, 8}


def test_a_commit_that_comes_late_costs_no_checkpoint_and_counts_if_the_new_driver_begins_there() -> None:
    for drivers in at_each_call(lambda drivers: drivers.new.take_lease(), lambda drivers: drivers.commit(4)):
        steps = drivers.new.checkpoints.steps()
        with pytest.raises(SupersededError):
            drivers.save_and_remove(4)
        assert steps in ([2], [2, 4])
        drivers.commit(4)
        drivers.commit(6)
        assert RunDirectory(URL).checkpoints.steps() == steps
        third = RunDirectory(URL)
        third.take_lease()
        assert third.checkpoints.steps() == steps


def test_a_driver_that_takes_over_from_one_that_goes_back_keeps_what_it_builds_on() -> None:
    """The parts of its checkpoint that have not changed are those of the newest one that it has found."""

    def save_and_go_back(drivers: TakenOver) -> None:
        with contextlib.suppress(SupersededError):
            drivers.old.check_lease()
            drivers.commit(4)
            go_back(drivers.old, drivers.old.checkpoints.manifest(2))

    def take_over(drivers: TakenOver) -> None:
        drivers.new.take_lease()
        newest = drivers.new.checkpoints.steps()[-1]
        built_on.add(newest)
        drivers.new.checkpoints.commit(replace(drivers.new.checkpoints.manifest(newest), step=6))

    built_on = set[int]()
    for _ in at_each_call(save_and_go_back, take_over):
        found = RunDirectory(URL).checkpoints.newest_good(lambda step, defect: pytest.fail(f"{step}: {defect}"))
        assert found is not None
        assert found[0].step == 6
    assert built_on == {2, 4}


def test_beyond_the_checkpoint_that_workers_fell_back_to_no_late_manifest_counts() -> None:
    """The newest one is bad, and so the step that the run was claimed at is not where it goes on."""
    WatchedFileSystem.store.clear()
    drivers = TakenOver()
    drivers.commit(8)
    drivers.new.take_lease()
    record = record_of(drivers.new, last=20)
    record.fell_back(8, "a part is missing")
    record.begins_at(2)
    list(record.write())
    drivers.commit(4)
    assert RunDirectory(URL).checkpoints.steps() == [2]
    record.checkpoint(save(drivers.new, 10), (None, None), 0.1)
    list(record.write())
    assert RunDirectory(URL).store.names("checkpoints/step-00000008"), "the bad one stays for somebody to look at"


def test_of_two_drivers_whose_claims_a_person_removes_the_later_one_goes_on() -> None:
    def remove_claims(drivers: TakenOver) -> None:
        drivers.old.store.delete(drivers.old.store.names("drivers"))

    def claim(drivers: TakenOver) -> None:
        with contextlib.suppress(StorageError):  # it has not begun, and says so
            drivers.new.take_lease()
            begun.append(drivers)

    begun: list[TakenOver] = []
    num_points = 0
    for drivers in at_each_call(claim, remove_claims):
        num_points += 1
        if drivers in begun:
            drivers.new.check_lease()
            with pytest.raises(SupersededError):
                drivers.old.check_lease()
        else:
            drivers.old.check_lease()
    assert len(begun) == num_points, "all but one, at whose call its claim was not seen; and one undisturbed"


@pytest.mark.parametrize(
    "read",
    [
        lambda run: run.checkpoints.steps(),
        lambda run: [*run.checkpoints.survey().manifests],
        lambda run: [run.checkpoints.newest_good(lambda step, defect: pytest.fail(f"{step}: {defect}"))[0].step],
    ],
    ids=["steps", "survey", "newest good"],
)
def test_a_reader_never_sees_a_late_manifest_whenever_the_run_is_taken_over(read: Callable) -> None:
    seen: list[list[int]] = []

    def take_over(drivers: TakenOver) -> None:
        drivers.new.take_lease()
        drivers.commit(4)

    for _ in at_each_call(lambda _: seen.append(read(RunDirectory(URL))), take_over):
        pass
    assert seen == [[2]] * len(seen)


@pytest.mark.parametrize("at", range(2))
def test_a_reader_of_a_log_that_is_written_meanwhile_misses_nothing_that_was_there(at: int) -> None:
    """Each flush puts another part in the place of the one before, which is gone when the reader comes to it."""
    run = RunDirectory(URL)
    run.take_lease()
    log = run.metrics()
    log.append({"step": 1})
    log.flush()

    def write() -> None:
        log.append({"step": 2})
        log.flush()

    counted = come_before(at, write)
    found = [row["step"] for row in RunDirectory(URL).metrics().read()]
    assert next(counted) > at, "there was a call to come before"
    assert found in ([1], [1, 2])
