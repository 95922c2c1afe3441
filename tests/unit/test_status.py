"""Whether the driver of a run is alive, seen from elsewhere."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import claims
from cluster.run_directory import RunDirectory
from launcher import status
from launcher.status import is_driven

CHECKOUT = Path(__file__).parents[2]


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


CLAIM = """\
import sys
from cluster.run_directory import RunDirectory
RunDirectory(sys.argv[1]).claim()
print(flush=True)
input()
"""


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_driver_of_this_machine_lives_if_its_process_does(run: RunDirectory, is_reaped: bool) -> None:
    command = [sys.executable, "-c", CLAIM, run.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = run.read_status()
        lives = is_driven(run, found), status.read_status(run)["status"]
        process.kill()
        if is_reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        is_dead = not is_driven(run, found), status.read_status(run)["status"]
    assert found["pid"] == process.pid
    assert (lives, is_dead) == ((True, "running"), (True, "failed"))


@pytest.mark.parametrize("change", [{"place": "another boot"}, {"place": None}], ids=str)
def test_a_process_of_the_same_number_and_host_elsewhere_is_no_proof(run: RunDirectory, change) -> None:
    """As of a pod that was started again, or of the host that was booted again."""
    own = run.read_status()
    assert claims.is_alive(own)
    assert claims.is_alive(own | change) is None
    assert claims.is_alive(own | {"started": "1"}) is False, "another process has its number by now"


def test_a_run_that_was_claimed_and_has_not_begun_is_running(run: RunDirectory) -> None:
    document = status.read_status(run)
    assert (document["status"], document["step"], document["run"]) == ("running", 0, run.url)
    assert not set(claims.DRIVER_KEYS) & document.keys()
