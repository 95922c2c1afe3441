"""Whether the driver of a run is alive, seen from elsewhere."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sleeping import replace_sleep

from cluster.errors import ClusterError, StorageError
from cluster.run import lease
from cluster.run.checkpoints import Checkpoints, Survey
from cluster.run.manifest import Share, join
from cluster.run.run_directory import RunDirectory
from launcher.display.tables import summary
from launcher.driver.background_writer import HANGS_S
from launcher.watching import status
from launcher.watching.status import SILENCE_S, is_driven, refuse_if_running
from launcher.watching.stop import stop_run

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(str(tmp_path / "run"))
    run.take_lease()
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
        replace_sleep(monkeypatch, sleep)
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
        (600.0, {"updated": 1.0}, True, 6.5),
        (600.0, None, False, 12.0),
        (7200.0, {"updated": 1.0}, False, 0.0),
    ],
    ids=[
        "writes",
        "silent",
        "writes, fast clock",
        "silent, fast clock",
        "writes, slow clock",
        "ends",
        "writes, slower clock",
        "silent, slower clock",
        "long gone",
    ],  # fmt: skip
)
def test_a_driver_elsewhere_lives_if_it_writes(seen, ago_s, change, expected, watched_s) -> None:
    assert seen(ago_s, change) == (expected, watched_s)


CLAIM = """\
import sys
from cluster.run.run_directory import RunDirectory
RunDirectory(sys.argv[1]).take_lease()
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
    assert lease.is_alive(own)
    assert lease.is_alive(own | change) is None
    assert lease.is_alive(own | {"started": "1"}) is False, "another process has its number by now"


def test_a_run_that_was_claimed_and_has_not_begun_is_running(run: RunDirectory) -> None:
    document = status.read_status(run)
    assert (document["status"], document["step"], document["run"]) == ("running", 0, run.url)
    assert not set(lease.DRIVER_KEYS) & document.keys()


def die_elsewhere(run: RunDirectory, ago_s: float) -> None:
    """What the driver of a node that died some seconds ago has left: its last sign of life, and nothing that ends."""
    (name,) = run.store.names("drivers")
    left = {"host": "node-1", "place": "elsewhere", "status": "running", "step": 4, "updated": time.time() - ago_s}
    run.store.write(name, json.dumps((run.read_status() or {}) | left).encode())


@pytest.mark.parametrize(
    ("ago_s", "expected"),
    [(lease.STATUS_INTERVAL_S, "running"), (3 * HANGS_S, "running"), (60.0, "failed"), (3600.0, "failed")],
)
def test_a_node_that_died_is_told_within_a_minute_and_a_slow_store_is_no_death(run: RunDirectory, ago_s, expected):
    die_elsewhere(run, ago_s)
    document = status.read_status(run)
    assert document["status"] == expected
    if expected == "failed":
        assert document["error"] == f"the driver on node-1 has said nothing for {ago_s:.0f} s; resume goes on"
        assert document["step"] == 4


def keep(run: RunDirectory, step: int) -> str:
    """Writes a checkpoint; returns the name of its one part."""
    part = run.checkpoints.write_part(step, ("model", 0), f"weights of {step}".encode())
    share = Share(
        step=step, num_parts={"model": 1}, parts={("model", 0): part}, state_files=["model"], metrics={}, versions={},
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    manifest = join([share])
    assert manifest is not None
    run.checkpoints.commit(manifest)
    return part.object


@pytest.mark.parametrize("ending", ["stopped", "failed", "killed", "not begun"])
def test_the_end_of_a_run_tells_from_where_it_goes_on(run: RunDirectory, ending: str) -> None:
    """The step that a driver wrote last may be later than the newest checkpoint, and earlier."""
    if ending == "killed":
        die_elsewhere(run, 600.0)
    elif ending == "not begun":
        run.write_status({"status": "failed", "error": "no"})
    else:
        run.write_status({"status": ending, "step": 7, "saved_step": 6})
    document = status.read_status(run)
    assert document["saved_step"] is None
    assert "none yet, so resume begins at step 0" in summary(document)

    keep(run, 5)
    part = keep(run, 6)
    document = status.read_status(run)
    assert document["saved_step"] == 6
    assert re.search("^ +checkpoint +step 6$", summary(document), re.MULTILINE)

    run.store.delete([f"checkpoints/{part}"])
    assert status.read_status(run)["saved_step"] == 5, "resume passes over one that lacks a part"


def test_a_table_reads_no_checkpoints(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def survey(_: Checkpoints) -> Survey:
        raise StorageError("checkpoints: cannot be read")

    run.write_status({"status": "stopped", "step": 7, "saved_step": 6})
    monkeypatch.setattr(Checkpoints, "survey", survey)
    (document,) = status.read_statuses([run])
    assert (document["status"], document["saved_step"]) == ("stopped", 6)
    with pytest.raises(StorageError):
        status.read_status(run)


def test_the_clocks_of_two_machines_may_differ_a_little() -> None:
    assert 3 * HANGS_S + 5.0 <= SILENCE_S <= 60.0 - lease.STATUS_INTERVAL_S


@pytest.mark.parametrize(("ago_s", "is_refused"), [(60.0, True), (600.0, False)])
def test_who_acts_on_it_waits_longer(run: RunDirectory, ago_s, is_refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver whose store is away for a minute must not lose its checkpoints, nor miss a stop."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    replace_sleep(monkeypatch, sleep)
    die_elsewhere(run, ago_s)
    if is_refused:
        with pytest.raises(ClusterError, match="is running, at step 4; stop it first"):
            refuse_if_running(run)
        with pytest.raises(ClusterError, match="still running 0 s after it was asked to stop"):
            stop_run(run, 0.0)
    else:
        assert refuse_if_running(run)["status"] == "failed"
        assert stop_run(run, 300.0)["status"] == "failed"
        assert now[0] < 40.0
    assert run.is_stop_requested(), "its clock may be at fault"


def test_a_driver_whose_clock_is_behind_is_left_its_checkpoints_and_is_stopped(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, begun_at = [0.0], time.time()

    def sleep(seconds: float) -> None:
        """It gives a sign of life, ten minutes ago by its clock; once it is asked to, it stops after half a minute."""
        now[0] += seconds
        die_elsewhere(run, time.time() - begun_at + 600.0 - now[0])
        if run.is_stop_requested() and now[0] > 30.0:
            (name,) = run.store.names("drivers")
            run.store.write(name, json.dumps((run.read_status() or {}) | {"status": "stopped"}).encode())

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    replace_sleep(monkeypatch, sleep)
    die_elsewhere(run, 600.0)
    with pytest.raises(ClusterError, match="is running, at step 4; stop it first"):
        refuse_if_running(run)
    assert stop_run(run, 300.0)["status"] == "stopped"
    assert now[0] > 30.0


def test_a_driver_whose_clock_is_ahead_is_gone_once_it_has_written_nothing_for_long(run: RunDirectory) -> None:
    now = [0]
    lookout = status.Lookout(lambda silence_s: status.read_status(run, silence_s), lambda: now[0])
    die_elsewhere(run, -3600.0)
    for now[0] in range(0, 121, 10):
        assert lookout.look()["status"] == "running"
    now[0] += 1
    assert lookout.look()["status"] == "failed"
    die_elsewhere(run, -3601.0)
    assert lookout.look()["status"] == "running"
