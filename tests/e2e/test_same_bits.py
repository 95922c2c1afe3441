"""A run is a function of its description: any number of workers, stopped, killed, resumed elsewhere."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Ended, Running, checkpointed, events, interrupt, launcher, rows
from tests.faults.injection import Fault, fired
from tests.faults.planned import Bits, bits, undisturbed

SHORT = ("train.epochs=2", "checkpoint.every_steps=10", "tracking.mode=disabled")
HOLDS = [Fault(kind="hold", doing="forward", step=15), Fault(kind="hold", doing="forward", step=35)]
"""Where a run waits for what is done to it, in its first and in its second epoch."""


def run_short(cwd: Path, *overrides: str) -> Ended:
    return launcher("run", JOBS / "digits.yaml", *SHORT, *overrides, "--json", cwd=cwd)


@pytest.fixture(scope="module")
def reference() -> Bits:
    return undisturbed(SHORT)


@pytest.mark.parametrize("workers", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers(workers: int, tmp_path: Path, reference: Bits) -> None:
    assert bits(run_short(tmp_path, f"workers.num={workers}"), tmp_path / "runs/digits") == reference


def test_stopped_killed_and_resumed_elsewhere(tmp_path: Path, make_plan, reference: Bits) -> None:
    """One life of a run: a limit in mid-epoch, Ctrl-C, SIGKILL of everything, other workers and places each time.

    What is done to it from outside is done on Ray too, in ``tests/faults/test_kills.py``.
    """
    run, elsewhere = tmp_path / "runs/digits", tmp_path / "elsewhere"
    elsewhere.mkdir()

    plan = make_plan(*HOLDS)
    limited = run_short(tmp_path, "train.max_steps=7")
    assert limited.exit_code == 0, limited.stderr
    assert limited.document["status"] == "stopped"
    assert limited.document["step"] == 7

    interrupted = Running(["resume", run, "workers.num=3", "--json"], elsewhere)
    interrupt(interrupted, run, plan, saved_at=10)

    killed = Running(["resume", run, "workers.num=1"], elsewhere)
    killed.wait_until(lambda: checkpointed(run, 30)() and 1 in fired(plan))
    killed.signal_group(signal.SIGKILL)
    assert killed.wait().exit_code == -signal.SIGKILL
    status = launcher("status", run, "--json", cwd=tmp_path).document
    assert status["status"] == "failed", "nobody is running it any more"
    (claim,) = (run / "drivers").glob("*.json")
    claim.write_text("{")  # a kill can tear it

    resumed = launcher("resume", run, "workers.num=2", "--json", cwd=elsewhere)
    assert bits(resumed, run) == reference
    assert resumed.document["attempts"] == 4


def test_checkpoints_without_a_row_of_their_step_are_branched_and_resumed_from(tmp_path: Path, make_plan) -> None:
    """The newest row before the checkpoint of step 20 is of step 14."""
    sparse = ("train.log_every_steps=7", "train.max_steps=30", "checkpoint.every_steps=10", "workers.num=1")
    plan, run = make_plan(Fault(kind="hold", doing="forward", step=21)), tmp_path / "runs/digits"
    killed = Running(["run", JOBS / "digits.yaml", *sparse, "tracking.mode=disabled"], tmp_path)
    killed.wait_until(lambda: checkpointed(run, 20)() and 0 in fired(plan))
    killed.signal_group(signal.SIGKILL)
    killed.wait()
    branched = launcher("resume", run, "--at", 20, "--as", "branch", "--json", cwd=tmp_path)
    resumed = launcher("resume", run, "--json", cwd=tmp_path)

    for ended, home in ((branched, tmp_path / "runs/branch"), (resumed, run)):
        assert ended.exit_code == 0, ended.stderr
        assert [event["step"] for event in events(home, "training")][-1] == 20
        assert (ended.document["step"], ended.document["samples"]) == (30, 30 * 64)
        assert [json.loads(row)["step"] for row in rows(home).splitlines()] == [7, 14, 21, 22, 28], "an epoch has 22"
    assert branched.document["state_sha256"] == resumed.document["state_sha256"]
    assert rows(tmp_path / "runs/branch") == rows(run)


def test_killed_processes_are_replaced(tmp_path: Path, make_plan, reference: Bits) -> None:
    """First a training process, which its agent starts again; then an agent, in whose place another is started."""
    plan, run = make_plan(*HOLDS), tmp_path / "runs/digits"
    running = Running(["run", JOBS / "digits.yaml", *SHORT, "--json"], tmp_path)
    running.wait_until(lambda: checkpointed(run, 10)() and 0 in fired(plan))
    os.kill(fired(plan)[0]["pid"], signal.SIGKILL)
    running.wait_until(lambda: len(events(run, "training")) == 2 and 1 in fired(plan))
    os.kill(events(run, "attempt_started")[-1]["workers"][1]["pid"], signal.SIGKILL)
    ended = running.wait()
    assert bits(ended, run) == reference
    assert [lost["cause"] for lost in events(run, "worker_lost")] == ["killed", "killed"]
    assert ended.document["attempts"] == 3
    assert ended.document["time"]["lost"] > 0
    assert ended.document["time"]["recovery"] > 0
    assert sum(ended.document["time"].values()) == pytest.approx(ended.document["seconds"], rel=0.02)
