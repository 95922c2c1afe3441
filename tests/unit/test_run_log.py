"""What is written down on a slow store, above all while old checkpoints are removed.

The real record and run directory, on a file system in memory where a delete takes seconds of the test's clock, and a
write too if a test says so.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.errors import StorageError
from cluster.process.data_messages import SampleSkipped
from cluster.process.messages import MatrixMeasured
from cluster.run.lease import STATUS_INTERVAL_S
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from cluster.tracking.tracker import NoTracker
from jobs.spec import CheckpointSpec
from launcher.display.progress import open_progress
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from launcher.watching.status import SILENCE_S
from tests import saved
from tests.specs import bare_job

pytestmark = pytest.mark.usefixtures("calls_in_this_thread")

DELETE_S = 4.0


class SlowFileSystem(MemoryFileSystem):
    """``slow://``: deletes of what belongs to checkpoints take long, and something may happen meanwhile."""

    protocol = "slow"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    now: ClassVar[float] = 0.0
    write_s: ClassVar[float] = 0.0
    """What a write takes."""
    calls: ClassVar[list[tuple[float, str]]] = []
    """The changes so far, such as ``write /run/a``, and when each was made."""
    on_delete: ClassVar[Callable[[str], None]]
    """Told of the path before such a delete is made."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("slow://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        type(self).now += self.write_s
        self.calls.append((self.now, f"write {path}"))
        super().pipe_file(path, value, **kwargs)

    def rm_file(self, path):
        if "/checkpoints/step-" in path:
            type(self).now += DELETE_S
            type(self).on_delete(path)
        self.calls.append((self.now, f"delete {path}"))
        super().rm_file(path)


fsspec.register_implementation("slow", SlowFileSystem)


@pytest.fixture(autouse=True)
def _empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    SlowFileSystem.store.clear()
    monkeypatch.setattr(SlowFileSystem, "now", 0.0)
    monkeypatch.setattr(SlowFileSystem, "write_s", 0.0)
    monkeypatch.setattr(SlowFileSystem, "calls", [])
    at_delete(monkeypatch, lambda _: None)


def at_delete(monkeypatch: pytest.MonkeyPatch, do: Callable[[str], None]) -> None:
    monkeypatch.setattr(SlowFileSystem, "on_delete", staticmethod(do), raising=False)


@pytest.fixture
def run() -> RunDirectory:
    """A run with the checkpoints of five steps."""
    run = RunDirectory(Store("slow://run", patience_s=0))
    run.take_lease(clock=lambda: SlowFileSystem.now)
    for step in range(1, 6):
        saved.save(run.checkpoints, step, files_of(step))
    return run


@pytest.fixture
def record(run: RunDirectory) -> RunLog:
    """That of its driver, which keeps one checkpoint and has just saved step 6."""
    record = open_record(run)
    save(record, run, 6)
    return record


def open_record(run: RunDirectory, events: Sequence[Mapping[str, Any]] = ()) -> RunLog:
    plan: Any = SimpleNamespace(steps_per_epoch=10, total_steps=10, end_step=10)
    display = open_progress(io.StringIO(), clock=lambda: 0.0)
    return RunLog(
        spec=bare_job(checkpoint=CheckpointSpec(keep=1)),
        plan=plan,
        run=run,
        state=RunState(step=5, saved_step=5),
        display=display,
        tracker=NoTracker(),
        events=events,
        clock=lambda: SlowFileSystem.now,
    )


def files_of(step: int) -> dict[str, bytes]:
    return {"model.bin": b"m" * step, "optimizer.bin": b"o" * step}


def save(record: RunLog, run: RunDirectory, step: int) -> None:
    manifest = saved.manifest_of(step, saved.write_files(run.checkpoints, step, files_of(step)))
    record.checkpoint(manifest, (None, None), 0.1)


def removed(run: RunDirectory) -> list[list[int]]:
    """The steps that the events tell of."""
    return [event["steps"] for event in run.events().read() if event["kind"] == "checkpoints_removed"]


def test_a_driver_that_removes_many_checkpoints_does_not_look_dead(run: RunDirectory, record: RunLog) -> None:
    settled = []
    for _ in record.write():
        record.tend()
        settled.append((record.is_settled, record.saved_step))
    assert run.checkpoints.steps() == [6]
    assert removed(run) == [[1, 2, 3, 4, 5]]
    ended = SlowFileSystem.now
    assert ended == 5 * 3 * DELETE_S > 10 * STATUS_INTERVAL_S
    written = [when for when, call in SlowFileSystem.calls if when and call.startswith("write /run/drivers/")]
    pauses = [after - before for before, after in zip([0.0, *written], [*written, ended])]
    assert max(pauses) <= STATUS_INTERVAL_S + 2 * DELETE_S, "the two parts of a checkpoint are deleted in one step"
    assert min(pauses[:-1]) >= STATUS_INTERVAL_S
    num_settled = settled.count((True, 6))
    assert settled[-num_settled:] == [(True, 6)] * num_settled
    assert num_settled > 5 * 2, "workers may start meanwhile"


@pytest.mark.parametrize(
    ("news", "kept", "kinds"),
    [
        ("event", 6, ["checkpoint", "resized", "checkpoints_removed", "checkpoints_removed"]),
        ("save", 7, ["checkpoint", "checkpoints_removed", "checkpoint", "checkpoints_removed"]),
    ],
)
def test_what_comes_meanwhile_does_not_wait(
    run: RunDirectory, record: RunLog, monkeypatch: pytest.MonkeyPatch, news: str, kept: int, kinds: list[str]
) -> None:
    def happen(_: str) -> None:
        at_delete(monkeypatch, lambda _: None)
        if news == "event":
            record.event("resized", step=6)
        else:
            save(record, run, 7)

    at_delete(monkeypatch, happen)
    list(record.write())
    record.tend()
    assert run.checkpoints.steps() == [1, 2, 3, 4, 6], "the rest is left for later"
    assert record.is_settled == (news == "event"), "what is left to remove holds nobody up, a save does"

    num_calls = len(SlowFileSystem.calls)
    list(record.write())
    assert [event["kind"] for event in run.events().read()] == kinds
    later = [call.partition("/step-")[0] for _, call in SlowFileSystem.calls[num_calls:]]
    before = later[: later.index("delete /run/checkpoints")]
    assert any(call.startswith("write /run/events/") for call in before)
    assert ("write /run/checkpoints" in before) == (news == "save")
    assert run.store.at("checkpoints").folders() == ["fences", f"step-{kept:08d}"]
    assert sorted(step for steps in removed(run) for step in steps) == [*range(1, kept)]


def test_they_are_removed_also_if_there_is_always_more_to_write(
    run: RunDirectory, record: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_delete(monkeypatch, lambda _: record.event("resized", step=6))
    for _ in range(12):
        list(record.write())
    assert run.store.at("checkpoints").folders() == ["fences", "step-00000006"]


def test_each_try_has_the_same_steps(record: RunLog) -> None:
    """Else one that is left out now and then would pass for progress of a store that fails another for ever."""
    busy, idle = (set(record.write()) - {None} for _ in range(2))
    assert busy == idle


def test_what_is_removed_before_a_failure_is_told(
    run: RunDirectory, record: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        if "step-00000003/manifest" in path:
            at_delete(monkeypatch, lambda _: None)
            raise ConnectionError("reset")

    at_delete(monkeypatch, fail)
    with pytest.raises(StorageError, match="cannot delete step-00000003/manifest"):
        list(record.write())
    assert run.checkpoints.steps() == [1, 2, 3, 6]
    list(record.write())
    assert run.checkpoints.steps() == [6]
    assert removed(run) == [[4, 5], [1, 2, 3]]


def test_a_run_is_not_closed_before_they_are_removed(run: RunDirectory, record: RunLog) -> None:
    with record:
        record.close("completed", None, lambda: False)
    assert run.checkpoints.steps() == [6]
    assert [event["kind"] for event in run.events().read()] == ["checkpoint", "checkpoints_removed", "completed"]
    status = run.read_status()
    assert status is not None
    assert status["status"] == "completed"


def until_status(record: RunLog) -> Iterator[str | None]:
    """The steps of a write, but for the removal of what is old."""
    for step in record.write():
        yield step
        if step == "status":
            return


def test_a_driver_shows_that_it_lives_however_much_there_is_to_write_on_a_slow_store(
    run: RunDirectory, record: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowFileSystem, "write_s", 6.0)
    for number in range(10):
        record.matrix(MatrixMeasured(name=f"val/{number}", step=number, classes=["a"], values=[[1.0]]))
    (before,) = run.store.names("drivers")
    began_at, written = SlowFileSystem.now, run.read_status()
    assert written is not None
    for step in until_status(record):
        if step != "status":
            shown = run.read_status() or {}
            assert {**shown, "updated": 0} == {**written, "updated": 0}, "nothing is told before it is so"
    signs = [began_at, *(at for at, call in SlowFileSystem.calls if call == f"write /run/{before}" and at > began_at)]
    silent_s = [after - sign for sign, after in zip(signs, signs[1:])]
    # A sign bears the time at which its own write began.
    assert max(silent_s) + SlowFileSystem.write_s < SILENCE_S
    assert SlowFileSystem.now - began_at > 100.0, "all of it together takes longer than a driver may be silent"


def test_on_a_fast_store_the_status_is_sign_enough(record: RunLog) -> None:
    list(until_status(record))
    assert sum(call.startswith("write /run/drivers/") for _, call in SlowFileSystem.calls) == 2, "the claim, the status"


def test_a_bad_sample_is_told_once_by_all_drivers_of_a_run(
    run: RunDirectory, record: RunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_epoch(epoch: int, number: int = 3) -> SampleSkipped:
        return SampleSkipped("train", epoch, number, f"data/{number}.jpg: is gone")

    warned = list[str]()
    monkeypatch.setattr(record.display, "warn", warned.append)
    for epoch in (0, 1):
        record.sample_skipped(of_epoch(epoch))
    assert warned == [
        "data.train: sample 3 is bad and skipped: data/3.jpg: is gone; launcher status counts such samples, and "
        "events.jsonl in the run directory lists them"
    ]
    list(record.write())
    (event,) = [event for event in run.events().read() if event["kind"] == "sample_skipped"]
    assert (event["split"], event["epoch"], event["number"], event["reason"]) == ("train", 0, 3, "data/3.jpg: is gone")
    listed = [{"split": "train", "epoch": 0, "number": 3, "reason": "data/3.jpg: is gone"}]
    assert record.document()["skipped_samples"] == {"count": 1, "first": listed}

    later = open_record(run, run.events().read())
    later.sample_skipped(of_epoch(2))
    assert later.document()["skipped_samples"] == {"count": 1, "first": listed}
    later.sample_skipped(of_epoch(2, number=4))
    assert later.document()["skipped_samples"]["count"] == 2
