"""What every tracker promises, and what no failure of Weights & Biases may do to a run.

The W&B tests run the real client: online against a recording server on loopback, offline by handing
the local records to ``wandb sync``, as a user would.
"""

import io
import math
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.tracking import wandb_tracker
from cluster.tracking.tracker import MemoryTracker, Row, Tracker, TrackerSettings, open_tracker
from tests.processes import descendants
from tests.wandb_server import RecordedRun, WandbServer

KEY = "0123456789" * 4
CONFIG = {"train": {"epochs": 2, "global_batch": 64}, "optimizer": {"_target_": "SGD", "lr": 0.1}}


def rows(first: int, last: int) -> list[Row]:
    return [{"step": step, "train/loss": 1 / step, "lr": 0.1} for step in range(first, last + 1)]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "png")
    return file.getvalue()


@dataclass
class Recorded:
    """What a tracker has kept, in the terms of the contract."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    images: list[bytes]
    succeeded: bool | None

    @classmethod
    def by_wandb(cls, run: RecordedRun) -> "Recorded":
        kept = [{key: value for key, value in row.items() if not key.startswith("_")} for row in run.history]
        return cls(
            rows=[row for row in kept if "curves" not in row],  # an image comes as a row of its own
            summary=run.summary,
            images=[content for name, content in run.files.items() if name.startswith("media/images/curves_")],
            succeeded=run.exit_codes[-1] == 0 if run.exit_codes else None,
        )


@dataclass
class Driver:
    """Opens trackers as a driver does, and remembers what it was warned of."""

    settings: TrackerSettings
    warnings: list[str] = field(default_factory=list)

    def open(self, past: Sequence[Row] = (), **changes: Any) -> Tracker:
        return open_tracker(replace(self.settings, **changes), self.warnings.append, past)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's W&B; every process that a test starts is marked."""
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("TRACKER_TEST", str(tmp_path))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B that the environment leads to, with a key."""
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
    assert server.errors == []


@pytest.fixture
def driver(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Driver]:
    """A driver; afterwards none of its processes is left, and its terminal and environment are untouched."""
    yield Driver(
        TrackerSettings(
            mode="online",
            project="digits",
            group="sweep",
            tags=("cnn", "small"),
            name="digits-1",
            run_id="run1",
            directory=str(tmp_path / "tracker"),
            config=CONFIG,
            finish_timeout_s=60.0,
        )
    )
    assert "WANDB_SERVICE" not in os.environ
    assert capfd.readouterr() == ("", "")
    wait_until(lambda: not processes_marked(str(tmp_path)), "a process was left behind")


def processes_marked(mark: str) -> list[str]:
    marked = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TRACKER_TEST={mark}\0" in (process / "environ").read_text(errors="replace"):
                marked.append((process / "cmdline").read_text())
        except OSError:
            continue  # ended meanwhile, or not ours
    return [command for command in marked if command]  # a zombie has none


def wait_until(condition: Callable[[], Any], problem: str, timeout_s: float = 100.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.05)


def sync(folders: list[Path], server: WandbServer) -> None:
    """Upload local records as a user would."""
    command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", *map(str, folders)]
    environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def finish_within(tracker: Tracker, limit_s: float) -> None:
    begin = time.monotonic()
    tracker.finish({"best": 1}, {"curves": png()})
    assert time.monotonic() - begin < limit_s


def log_all(tracker: Tracker, first: int = 1) -> None:
    begin = time.monotonic()
    for row in rows(first, first + 999):
        tracker.log(row)
    assert time.monotonic() - begin < 5


class TrackerContract:
    """Subclasses say how to open a tracker and how to read what it kept."""

    def open(self, past: list[Row]) -> Tracker:
        raise NotImplementedError

    def recorded(self) -> Recorded:
        raise NotImplementedError

    def test_a_run_is_recorded_whole(self) -> None:
        tracker = self.open([])
        for row in rows(1, 5):
            tracker.log(row)
        tracker.log({"step": 5, "train/loss": 7.0})  # replayed: it is there already
        tracker.finish({"best/step": 3, "status": "completed"}, {"curves": png()})
        tracker.log({"step": 6, "train/loss": 7.0})  # too late
        tracker.finish({"best/step": 4}, {}, succeeded=False)
        kept = self.recorded()
        assert kept.rows == rows(1, 5)
        assert kept.summary.items() >= {"best/step": 3, "status": "completed"}.items()
        assert kept.images == [png()]
        assert kept.succeeded is True

    def test_a_resumed_run_has_each_step_once(self) -> None:
        first = self.open([])
        for row in rows(1, 4):
            first.log(row)
        first.finish({}, {}, succeeded=False)
        second = self.open(rows(1, 6))  # 5 and 6 were trained, but lost on the way to the tracker
        for row in rows(5, 8):
            second.log(row)
        second.finish({}, {})
        kept = self.recorded()
        assert kept.rows == rows(1, 8)
        assert kept.succeeded is True


class TestMemory(TrackerContract):
    def open(self, past: list[Row]) -> Tracker:
        self.tracker = MemoryTracker(past)
        return self.tracker

    def recorded(self) -> Recorded:
        images = list(self.tracker.images.values())
        return Recorded(self.tracker.rows, self.tracker.summary, images, self.tracker.succeeded)


class WandbContract(TrackerContract):
    mode = "online"

    @pytest.fixture(autouse=True)
    def surroundings(self, driver: Driver, server: WandbServer) -> Iterator[None]:
        self.driver, self.server = driver, server
        yield
        assert driver.warnings == []

    def open(self, past: list[Row]) -> Tracker:
        return self.driver.open(past, mode=self.mode)


@pytest.mark.slow
class TestOnline(WandbContract):
    def recorded(self) -> Recorded:
        return Recorded.by_wandb(self.server.runs["run1"])

    def test_what_wandb_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STORE_PASSWORD", "open-sesame")
        tracker = self.open([])
        tracker.log({"step": 1, "train/loss": float("nan")})
        tracker.finish({}, {}, succeeded=False)
        run = self.server.runs["run1"]
        assert tracker.url == f"{self.server.url}/tester/digits/runs/run1"
        assert run.config == CONFIG
        assert run.bucket.items() >= {"displayName": "digits-1", "groupName": "sweep", "tags": ["cnn", "small"]}.items()
        assert run.exit_codes == [1]
        assert math.isnan(run.history[0]["train/loss"])
        assert run.files.keys() == {"config.yaml", "wandb-summary.json"}
        assert self.server.other_paths == set(), "no telemetry"
        local = [path.read_bytes() for path in Path(self.driver.settings.directory).rglob("*") if path.is_file()]
        told = repr(run).encode() + b"".join(local)
        assert b"open-sesame" not in told
        assert KEY.encode() not in told

    def test_a_killed_driver_loses_no_row(self) -> None:
        script = f"""
            import time
            from cluster.tracking.tracker import TrackerSettings, open_tracker
            tracker = open_tracker({self.driver.settings!r}, print)
            for step in range(1, 101):
                tracker.log({{"step": step, "train/loss": 1.0}})
            time.sleep(0.3)  # they are on their way, W&B has not answered yet
            print("logged", flush=True)
            time.sleep(60)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "logged\n"
            process.kill()
        run = self.server.runs["run1"]
        wait_until(lambda: run.exit_codes, "the recorder did not finish the run")
        assert [row["step"] for row in run.history] == list(range(1, 101))
        assert run.exit_codes == [1]


class TestOffline(WandbContract):
    mode = "offline"

    def recorded(self) -> Recorded:
        sync(sorted(Path(self.driver.settings.directory).glob("wandb/offline-run-*-run1")), self.server)
        return Recorded.by_wandb(self.server.runs["run1"])

    def test_the_command_that_uploads_it_names_the_records_that_are_not_uploaded(self, tmp_path: Path) -> None:
        folder = tmp_path / "my records"
        for number in (1, 2):
            tracker = open_tracker(replace(self.driver.settings, mode="offline", directory=str(folder)), print)
            tracker.log({"step": number})
            tracker.finish({}, {})
            assert tracker.sync_command is not None
            program, verb, *records = shlex.split(tracker.sync_command)
            assert (program, verb, len(records)) == ("wandb", "sync", number)
            assert sorted(folder.glob("wandb/offline-run-*-run1")) == [Path(record) for record in records]
        sync([Path(records[0])], self.server)
        assert tracker.sync_command == shlex.join(["wandb", "sync", records[1]])

    def test_nothing_is_sent(self) -> None:
        tracker = self.open([])
        tracker.log({"step": 1})
        tracker.finish({}, {})
        assert Path(tracker.url or "").name.startswith("offline-run-")
        assert not self.server.runs
        assert not self.server.keys

    def test_a_stop_of_all_processes_of_the_driver_loses_nothing(self) -> None:
        """As Ray stops a job: SIGTERM for the driver, which finishes the run, and for all that descend from it."""
        settings = replace(self.driver.settings, mode="offline")
        script = f"""
            import signal, sys, time
            from cluster.tracking.tracker import TrackerSettings, open_tracker
            stopped = []
            signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
            tracker = open_tracker({settings!r}, print)
            tracker.log({{"step": 1, "train/loss": 1.0}})
            while tracker.url is None:
                time.sleep(0.05)
            print("recording", flush=True)
            while not stopped:
                time.sleep(0.05)
            sys.stdin.readline()
            for step in range(2, 6):
                tracker.log({{"step": step, "train/loss": 1.0}})
            tracker.finish({{"status": "interrupted"}}, {{"curves": {png()!r}}})
            print("finished", flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "recording\n"
            for pid in (process.pid, *(each.pid for each in descendants(process.pid))):
                with suppress(ProcessLookupError):  # a command that the client has called, and that has ended
                    os.kill(pid, signal.SIGTERM)
            time.sleep(1)  # who would end at that has ended
            assert process.communicate("\n")[0] == "finished\n"
        kept = self.recorded()
        assert [row["step"] for row in kept.rows] == [1, 2, 3, 4, 5]
        assert (kept.summary["status"], kept.images, kept.succeeded) == ("interrupted", [png()], True)

    def test_a_recorder_outlives_sigterm_as_long_as_its_driver_lives(self) -> None:
        tracker = self.open([])
        wait_until(lambda: tracker.url, "it does not record")
        os.kill(tracker._pid, signal.SIGTERM)  # type: ignore[attr-defined]
        for row in rows(1, 5):
            tracker.log(row)
        tracker.finish({}, {})
        assert self.recorded().rows == rows(1, 5)


class TestDisabled:
    def test_it_does_nothing(self, driver: Driver) -> None:
        tracker = driver.open(mode="disabled")
        tracker.log({"step": 1})
        tracker.finish({"best": 1}, {"curves": png()})
        assert tracker.url is None
        assert not Path(driver.settings.directory).exists()


@pytest.mark.slow
class TestNothingOutsideHurtsTheRun:
    """No exception, no wait, one warning that says what to do, and the rows on the disk."""

    def assert_recorded_offline(self, driver: Driver, tracker: Tracker) -> None:
        [warning] = driver.warnings
        assert "\n" not in warning
        assert warning.startswith("W&B: recording offline: ")
        assert warning.endswith(f"upload it later with: wandb sync {tracker.url}")
        with WandbServer() as later:
            sync([Path(tracker.url or "")], later)
            assert Recorded.by_wandb(later.runs["run1"]).rows == rows(1, 1000)

    @pytest.mark.usefixtures("server")
    def test_no_key(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WANDB_API_KEY")
        tracker = driver.open()
        log_all(tracker)
        finish_within(tracker, 100)
        assert "wandb login" in driver.warnings[0]
        self.assert_recorded_offline(driver, tracker)

    def test_no_server(self, driver: Driver, server: WandbServer) -> None:
        server.close()
        tracker = driver.open(connect_timeout_s=1.0)
        log_all(tracker)
        finish_within(tracker, 100)
        self.assert_recorded_offline(driver, tracker)

    def test_a_server_that_refuses(self, driver: Driver, server: WandbServer) -> None:
        server.fault = 403
        tracker = driver.open()
        log_all(tracker)
        finish_within(tracker, 100)
        assert "403" in driver.warnings[0]
        self.assert_recorded_offline(driver, tracker)

    def test_a_server_that_is_out_of_order(self, driver: Driver, server: WandbServer) -> None:
        server.fault = 500  # which wandb tries again and again
        tracker = driver.open(connect_timeout_s=2.0)
        log_all(tracker)
        wait_until(lambda: tracker.url, "not offline in time")
        finish_within(tracker, 100)
        self.assert_recorded_offline(driver, tracker)

    def test_a_run_that_ends_before_the_server_answers(self, driver: Driver, server: WandbServer) -> None:
        server.fault = "hang"
        tracker = driver.open(finish_timeout_s=9.0)
        log_all(tracker)
        finish_within(tracker, 100)
        self.assert_recorded_offline(driver, tracker)

    @pytest.mark.parametrize("fault", [500, 403, "hang", "dead"])
    def test_a_server_that_breaks(self, driver: Driver, server: WandbServer, fault: Any) -> None:
        tracker = driver.open(finish_timeout_s=6.0)
        tracker.log({"step": 1})
        wait_until(lambda: tracker.url, "W&B did not start")
        if fault == "dead":
            server.close()
        else:
            server.fault = fault
        log_all(tracker, first=2)
        finish_within(tracker, 70)
        [folder] = Path(driver.settings.directory).glob("wandb/run-*-run1")
        [warning] = driver.warnings
        assert "not everything was uploaded" in warning or "did not end within 6 s" in warning  # on a slow machine
        assert warning.endswith(f"; upload it later with: wandb sync --no-skip-online {folder}")
        with WandbServer() as later:
            sync([folder], later)
            assert Recorded.by_wandb(later.runs["run1"]).rows == [{"step": 1}, *rows(2, 1001)]

    @pytest.mark.usefixtures("server")
    @pytest.mark.parametrize("when", ["starting", "recording"])
    def test_a_recorder_that_is_killed(self, driver: Driver, when: str) -> None:
        tracker = driver.open()
        if when == "recording":
            wait_until(lambda: tracker.url, "W&B did not start")
        wait_until(lambda: tracker._pid, "the recorder did not start")  # type: ignore[attr-defined]
        os.kill(tracker._pid, signal.SIGKILL)  # type: ignore[attr-defined]
        log_all(tracker)
        finish_within(tracker, 10)
        [warning] = driver.warnings
        assert "its recorder ended early; " in warning

    @pytest.mark.usefixtures("server")
    def test_a_recorder_that_hangs(self, driver: Driver) -> None:
        tracker = driver.open(finish_timeout_s=1.0)
        wait_until(lambda: tracker.url, "W&B did not start")
        os.kill(tracker._pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        log_all(tracker)
        finish_within(tracker, 30)
        [warning] = driver.warnings
        assert "did not end within 1 s" in warning
        assert "wandb sync" in warning

    def test_more_rows_than_it_can_take(
        self, driver: Driver, server: WandbServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wandb_tracker, "_QUEUE_ROWS", 100)
        server.fault = "hang"
        tracker = driver.open(finish_timeout_s=6.0)
        for first in range(1, 10_000, 1000):
            log_all(tracker, first)
        finish_within(tracker, 70)
        [warning] = driver.warnings
        assert "cannot keep up" in warning

    @pytest.mark.usefixtures("server")
    def test_a_past_that_cannot_be_read(self, driver: Driver) -> None:
        def past() -> Iterator[Row]:
            yield {"step": 1}
            raise OSError("the bucket is gone")

        tracker = open_tracker(driver.settings, driver.warnings.append, past())
        log_all(tracker, first=2)
        finish_within(tracker, 100)
        assert driver.warnings == ["W&B: recording stopped: the bucket is gone; metrics are in the run directory"]

    @pytest.mark.usefixtures("server")
    def test_an_image_that_is_none(self, driver: Driver) -> None:
        tracker = driver.open()
        tracker.log({"step": 1})
        tracker.finish({"best": 1}, {"curves": b"not a picture"})
        [warning] = driver.warnings
        assert warning.startswith("W&B: recording stopped: ")

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a small disk")
    def test_a_full_disk(self, driver: Driver, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=True)
        try:
            tracker = driver.open(mode="offline", directory=str(disk))
            log_all(tracker)
            finish_within(tracker, 100)
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)
        [warning] = driver.warnings
        assert warning.startswith(f"W&B: no space left in {disk}/wandb/offline-run-")


def test_a_folder_that_cannot_be_written(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tracker = driver.open(mode="offline", directory=str(tmp_path / "file" / "tracker"))
    log_all(tracker)
    finish_within(tracker, 100)
    [warning] = driver.warnings
    assert warning == f"W&B: cannot write in {tmp_path}/file/tracker; recording in {tracker.url}"


def test_wandb_is_imported_by_the_recorder_only() -> None:
    check = "import sys, cluster.tracking.tracker; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
