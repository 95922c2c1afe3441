"""Two processes that drive one run: the later one has it, the bits are those of an undisturbed one."""

import os
import signal
from pathlib import Path

import pytest

from cluster.run.run_directory import RunDirectory
from tests.e2e.command import JOBS, Running, checkpointed, events, launcher
from tests.faults.injection import Fault, fired, release
from tests.faults.planned import bits, undisturbed

pytestmark = pytest.mark.slow

SHORT = ("train.epochs=2", "checkpoint.every_steps=5", "tracking.mode=disabled")


def test_a_driver_that_was_taken_over_from_ends_and_writes_nothing(tmp_path: Path, make_plan) -> None:
    run, elsewhere = tmp_path / "runs/digits", tmp_path / "elsewhere"
    elsewhere.mkdir()
    plan = make_plan(Fault(kind="hold", doing="forward", step=12))
    old = Running(["run", JOBS / "digits.yaml", *SHORT, "--json"], tmp_path)
    old.wait_until(lambda: checkpointed(run, 10)() and 0 in fired(plan))
    claim = stop(old, run)
    release(plan, 0)

    refused = launcher("resume", run, "--json", cwd=elsewhere)
    assert refused.exit_code == 5
    error = refused.document["error"]
    assert f"process {old.pid} on " in error
    assert f"stop it with `launcher stop {run}`, or add --take-over to go on here in its place" in error
    taken = launcher("resume", run, "--take-over", "workers.num=3", "--json", cwd=elsewhere)
    before = content(run, but_of=claim)
    os.kill(old.pid, signal.SIGCONT)
    ended = old.wait()

    assert ended.exit_code == 5, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert " has taken the run over at " in line
    assert line.endswith("; this one ends and writes nothing more")
    assert f"taking {run} over from process {old.pid} on " in taken.stderr
    assert content(run, but_of=claim) == before, "it has changed nothing of what counts"
    assert bits(taken, run) == undisturbed(SHORT)
    assert [step for step in RunDirectory(str(run)).checkpoints.steps() if step > 44] == []
    assert len(events(run, "completed")) == 1
    assert launcher("status", run, "--json", cwd=elsewhere).document["status"] == "completed"


def stop(driver: Running, run: Path) -> str:
    """Stops a driver, also amid a write of its status, which is whole all the same. Returns its claim."""
    os.kill(driver.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, driver.pid, os.WSTOPPED)
    (path,) = (run / "drivers").glob("*.json")
    return path.stem


def content(run: Path, but_of: str) -> dict[Path, bytes]:
    """Everything but the logs of workers, and what bears one claim: it is passed over once there is a later one.

    Its driver may have been stopped between making sure of the claim and writing; then that write comes late.
    """
    found = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if path.parent.name != "logs" and but_of not in path.name}
