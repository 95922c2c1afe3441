"""A driver in a batch job, as its script sees it: it saves before the limit, and the same command goes on."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.run.run_directory import RunDirectory
from tests.e2e.command import Ended, Running, checkpointed, events, launcher, rows
from tests.e2e.test_own_parts import JOB, MINE
from tests.faults.injection import Fault, fired, release

SLOWLY = """
import time


class Slowly(Points):
    def __init__(self, *args, slow, **kwargs):
        super().__init__(*args, **kwargs)
        self.slow = Path(slow)
        held, planning = self.slow.with_name("held"), self.slow.with_name("planning")
        while held.exists():
            planning.touch()
            time.sleep(0.05)

    def __getitem__(self, number):
        if self.slow.exists():
            time.sleep(0.1)
        return super().__getitem__(number)
"""
USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a job that takes minutes while the file ``slow`` is there."""
    (tmp_path / "mine.py").write_text(MINE + SLOWLY)
    train = f"train: {{_target_: mine.Slowly, length: 256, noise: 0.05, slow: {tmp_path / 'slow'}}}"
    job = JOB.replace("train: {_target_: mine.Points, length: 256, noise: 0.05}", train)
    job = job.replace("epochs: 3", "epochs: 10, log_every_steps: 1")
    (tmp_path / "own.yaml").write_text(job + "checkpoint: {every_steps: 4}\n")
    return tmp_path


@pytest.fixture
def undisturbed(home: Path) -> Ended:
    ended = launcher("run", "own.yaml", "name=undisturbed", "--json", cwd=home)
    assert ended.exit_code == 0, ended.stderr
    return ended


def begin(home: Path) -> Running:
    (home / "slow").touch()
    return Running(["run", "own.yaml", "--json"], home)


@pytest.mark.slow
def test_a_time_limit_that_is_too_short_twice(home: Path, undisturbed: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    run, reached = home / "runs/own", [0]
    monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", "1")
    for _ in range(2):
        ends_at = int(time.time()) + 100
        monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", str(ends_at))
        ended = begin(home).wait()

        assert (ended.exit_code, ended.document["status"]) == (75, "requeued"), ended.stderr
        assert time.time() < ends_at - 20, "it ends before its scheduler ends it"
        assert "stopping at the time limit of its job: the workers finish their step and save" in ended.stderr
        reached.append(ended.document["step"])
        assert checkpointed(run, reached[-1])()
        assert launcher("status", run, "--json", cwd=home).document["saved_step"] == reached[-1]
    assert 0 < reached[1] < reached[2] < 80
    assert [(event["step"], event["reason"]) for event in events(run, "requeued")] == [
        (step, "at the time limit of its job") for step in reached[1:]
    ]
    assert [event["step"] for event in events(run, "training")] == reached[:2]

    (home / "slow").unlink()
    monkeypatch.delenv("LAUNCHER_JOB_ENDS_AT")
    ended = launcher("run", "own.yaml", "--json", cwd=home)
    assert (ended.exit_code, ended.document["status"]) == (0, "completed"), ended.stderr
    assert ended.document["state_sha256"] == undisturbed.document["state_sha256"]
    assert rows(run) == rows(home / "runs/undisturbed")
    assert events(run, "worker_lost") == []


@pytest.mark.parametrize(
    ("numbers", "requeues", "exit_code", "status"),
    [
        ((USR1,), "1", 75, "requeued"),
        ((USR1,), "", 130, "stopped"),
        ((USR1, TERM), "1", 130, "stopped"),
        ((TERM, USR1), "1", 130, "stopped"),
    ],
)
def test_a_signal_of_its_script(
    home: Path, monkeypatch: pytest.MonkeyPatch, make_plan: Callable[..., Path], numbers: tuple[signal.Signals, ...],
    requeues: str, exit_code: int, status: str,
) -> None:  # fmt: skip
    run = home / "runs/own"
    monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", requeues)
    plan = make_plan(Fault(kind="hold", doing="forward", step=5))
    running = Running(["run", "own.yaml", "--json"], home)
    running.wait_until(lambda: 0 in fired(plan) and checkpointed(run, 4)())
    for number in numbers:
        os.kill(running.pid, number)
    running.wait_until(lambda: len(events(run, "stop_requested")) == 1)
    release(plan, 0)
    ended = running.wait()

    assert (ended.exit_code, ended.document["status"]) == (exit_code, status), ended.stderr
    assert checkpointed(run, ended.document["step"])()
    (stopping,) = events(run, "stop_requested")
    assert stopping["reason"] in {f"stopping on {number.name}" for number in numbers}, "they come at once"
    assert len(events(run, "requeued")) == (status == "requeued")
    told = launcher("status", run, cwd=home).stdout
    saved = f"saved at step {ended.document['step']} on SIGUSR1; its scheduler starts it again"
    assert (saved in told) == (status == "requeued")


@pytest.mark.parametrize(("requeues", "exit_code", "status"), [("1", 75, "requeued"), ("", 130, "interrupted")])
def test_one_that_comes_while_the_run_is_planned(
    home: Path, monkeypatch: pytest.MonkeyPatch, requeues: str, exit_code: int, status: str
) -> None:
    monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", requeues)
    (home / "held").touch()
    running = begin(home)
    running.wait_until((home / "planning").exists)
    os.kill(running.pid, USR1)
    ended = running.wait()

    assert (ended.exit_code, ended.document["status"]) == (exit_code, status), ended.stderr
    assert not RunDirectory(str(home / "runs/own")).exists()


def test_a_variable_that_means_nothing_is_an_error_before_anything_starts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", "tomorrow")
    ended = launcher("run", "own.yaml", "--json", cwd=home)
    assert ended.exit_code == 2
    assert ended.stderr == (
        "error: LAUNCHER_JOB_ENDS_AT: must be a Unix time in whole seconds, got 'tomorrow'; leave it unset if the job "
        "has no limit\n"
    )
