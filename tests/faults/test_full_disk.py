"""A disk that is full, or a quota that is used up, at every write of a run's life: nothing old is lost, and it goes on.

The real run directory and record, on a disk of 1 MB, or in a folder that tells of a quota when a file is synced.
"""

import errno
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import StorageError
from cluster.process.messages import MatrixMeasured
from cluster.run.run_directory import RunDirectory
from cluster.storage.local import SyncedLocalFileSystem
from cluster.storage.store import Store
from cluster.tracking.tracker import NoTracker
from launcher.display.progress import open_progress
from launcher.driver.run_log import RunLog
from launcher.driver.run_state import RunState
from tests.faults.lives import save
from tests.specs import bare_job

pytestmark = pytest.mark.usefixtures("calls_in_this_thread")

STEPS_A_LIFE = 4
write_file = SyncedLocalFileSystem.pipe_file


class Disk:
    """Where a run lies. From the write of one number on, counted from 0, there is no room."""

    def __init__(self, folder: Path, *, has_quota: bool) -> None:
        self.num_writes = 0
        self.held: dict[str, bytes] = {}
        """The files that there were at the newest write without room."""
        self._run_path = folder / "run"
        self._filler = folder / "filler"
        self._has_quota = has_quota
        self._full_at: int | None = None

    def begin(self, prepared: Path, full_at: int | None) -> None:
        """Holds nothing but a copy of a run."""
        shutil.rmtree(self._run_path, ignore_errors=True)
        shutil.copytree(prepared, self._run_path)
        self.num_writes, self._full_at = 0, full_at

    def run(self) -> RunDirectory:
        return RunDirectory(Store(str(self._run_path), patience_s=0))

    def files(self) -> dict[str, bytes]:
        paths = (path for path in self._run_path.rglob("*") if path.is_file())
        return {str(path.relative_to(self._run_path)): path.read_bytes() for path in paths}

    def become_full(self) -> None:
        self._full_at = self.num_writes

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)
        self._full_at = None

    def write(self, fs: SyncedLocalFileSystem, path: str, value: bytes) -> None:
        if self._is_full:
            self.held = self.files()
            if not self._has_quota:
                self._fill()
        write_file(fs, path, value)
        self.num_writes += 1

    def sync(self, descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)  # what its names take was counted when they were given
        if self._is_full and self._has_quota and not is_folder:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    @property
    def _is_full(self) -> bool:
        return self._full_at is not None and self.num_writes >= self._full_at

    def _fill(self) -> None:
        with self._filler.open("ab") as file:
            file.write(bytes(shutil.disk_usage(self._filler.parent).free))


@pytest.fixture(params=["room", "quota"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    has_quota = request.param == "quota"
    disk = Disk(tmp_path if has_quota else request.getfixturevalue("full_disk"), has_quota=has_quota)
    monkeypatch.setattr(SyncedLocalFileSystem, "pipe_file", lambda fs, path, value: disk.write(fs, path, value))
    monkeypatch.setattr(os, "fsync", disk.sync)
    return disk


def life(run: RunDirectory, number: int) -> Iterator[Callable[[], Any]]:
    """What a driver and its workers write, one piece of work at a time; each may be done again after it has failed."""
    last = number * STEPS_A_LIFE
    yield run.take_lease
    yield partial(run.write_environment, {"attempts": [number]})
    yield partial(run.write_job, f"life: {number}\n")
    yield partial(run.write_tracker_id, f"of life {number}")
    found = run.checkpoints.newest_good(lambda step, defect: pytest.fail(f"{step}: {defect}"))
    begun, before = (0, None) if found is None else (found[0].step, found[0])
    plan: Any = SimpleNamespace(steps_per_epoch=10, total_steps=last, end_step=last)
    display = open_progress(io.StringIO(), clock=lambda: 0.0)
    record = RunLog(
        spec=bare_job(), plan=plan, run=run, state=RunState(step=begun), display=display, tracker=NoTracker()
    )

    def write() -> None:
        list(record.write())

    record.event("attempt_started", life=number)
    record.begins_at(begun)
    yield write
    for step in range(begun + 1, last + 1):
        record.row({"step": step, "epoch": 0, "samples": step}, 0.0)
        record.matrix(MatrixMeasured(name="val/confusion", step=step, classes=[], values=[]))
        if step % 2 == 0:
            yield lambda step=step: record.checkpoint(save(run, step, f"life{number}", before), (None, None), 0.1)
            yield write
    yield partial(run.write_log, number, 0, b"said by life %d" % number)
    yield partial(run.write_picture, "curves", b"of life %d" % number)
    record.state.status = "completed"
    record.event("completed")
    record.flush()
    record._pending.is_closing = True  # what ``close`` sets, before it waits for the thread that is not here
    yield write


def live(run: RunDirectory, number: int) -> None:
    for work in life(run, number):
        work()


def assert_complete(run: RunDirectory, number: int) -> None:
    last = number * STEPS_A_LIFE
    status = run.read_status()
    assert status is not None
    assert (status["status"], status["step"]) == ("completed", last)
    steps = list(range(1, last + 1))
    assert [row["step"] for row in run.metrics().read()] == steps
    assert len(run.store.read("metrics.jsonl").splitlines()) == last
    assert run.events().read()[-1]["kind"] == "completed"
    assert run.checkpoints.read(last)[0].step == last
    assert list(run.checkpoints.survey().defects) == []
    assert run.read_job() == f"life: {number}\n"
    assert run.read_environment() == {"attempts": [number]}
    assert run.read_tracker_id() == f"of life {number}"
    assert run.read_log(run.log_names(number)[0]) == b"said by life %d" % number
    assert run.store.read("curves.png") == b"of life %d" % number


@pytest.mark.parametrize("then", ["goes on", "resumes"])
def test_nothing_old_is_lost(disk: Disk, tmp_path: Path, then: str) -> None:
    prepared = RunDirectory(str(tmp_path / "prepared"))
    live(prepared, 1)
    assert_complete(prepared, 1)
    disk.begin(Path(prepared.url), full_at=None)
    live(disk.run(), 2)
    assert_complete(disk.run(), 2)
    num_writes = disk.num_writes
    assert num_writes > 30
    for full_at in range(num_writes):
        disk.begin(Path(prepared.url), full_at)
        told: list[str] = []
        for work in life(disk.run(), 2):
            try:
                work()
            except StorageError as error:
                told.append(str(error))
                assert disk.files() == disk.held
                disk.make_room()
                if then == "resumes":
                    live(disk.run(), 2)
                    break
                work()
        (message,) = told
        assert message.endswith("; make room, or use another store")
        assert_complete(disk.run(), 2)
        (matrix,) = disk.run().read_matrices().values()
        # It is written after the checkpoint of its step, and not made again by who goes on from there.
        assert matrix["step"] == 2 * STEPS_A_LIFE or then == "resumes"


def test_a_claim_that_was_lost_is_written_when_there_is_room(disk: Disk) -> None:
    run = disk.run()
    run.take_lease()
    run.write_status({"status": "running", "step": 3})
    claims = run.store.names("drivers")
    run.store.delete(claims)
    disk.become_full()
    with pytest.raises(StorageError, match="cannot write drivers/.*; make room, or use another store"):
        run.check_lease()
    disk.make_room()
    run.check_lease()
    assert run.store.names("drivers") == claims
    status = run.read_status()
    assert status is not None
    assert status["step"] == 3
