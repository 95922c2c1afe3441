"""Whether the driver of a run is alive, seen from elsewhere."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.run_directory import RunDirectory
from launcher import status
from launcher.status import is_driven


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(str(tmp_path / "run"))
    run.claim()
    return run


@pytest.fixture
def seen(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bool, float]]:
    """Whether a driver on another host counts as alive, and the seconds that it was watched for."""

    def look(ago_s: float, change: dict[str, Any] | None) -> tuple[bool, float]:
        now = [0.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds
            if change is not None and now[0] > 6.0:
                monkeypatch.setattr(run, "read_status", lambda: found | change)

        found = {"host": "elsewhere", "pid": 1, "status": "running", "updated": time.time() - ago_s, "step": 4}
        monkeypatch.setattr(run, "read_status", lambda: found)
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        monkeypatch.setattr(time, "sleep", sleep)
        return is_driven(run, found), now[0]

    return look


@pytest.mark.parametrize(
    ("ago_s", "change", "expected", "watched_s"),
    [
        (0.0, {"updated": 1.0}, True, 6.5),
        (0.0, None, False, 12.0),
        (-3600.0, {"updated": 1.0}, True, 6.5),
        (-3600.0, None, False, 12.0),
        (60.0, {"step": 5}, True, 6.5),
        (60.0, {"status": "completed"}, False, 6.5),
        (600.0, {"updated": 1.0}, False, 0.0),
    ],
    ids=["writes", "silent", "writes, fast clock", "silent, fast clock", "writes, slow clock", "ends", "long gone"],
)
def test_a_driver_elsewhere_lives_if_it_writes(seen, ago_s, change, expected, watched_s) -> None:
    assert seen(ago_s, change) == (expected, watched_s)


def test_a_driver_of_this_machine_lives_if_its_process_does(run: RunDirectory) -> None:
    command = [sys.executable, "-c", "print(flush=True); input()", "launcher"]  # its command line tells what it is
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = {"host": socket.gethostname(), "pid": process.pid, "status": "running", "updated": 0.0}
        lives = is_driven(run, found)
        process.communicate(b"\n")
    assert lives
    assert not is_driven(run, found)


def test_a_run_that_was_claimed_and_has_not_begun_is_running(run: RunDirectory, monkeypatch) -> None:
    monkeypatch.setattr(status, "_is_launcher", lambda pid: pid == os.getpid())
    document = status.read_status(run)
    assert (document["status"], document["step"], document["run"]) == ("running", 0, run.url)
    assert not {"host", "pid", "claimed"} & document.keys()
