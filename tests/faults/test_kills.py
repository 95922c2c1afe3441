"""Processes killed at every moment of a run; the bits are those of an undisturbed one, and little is done twice."""

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, events, interrupt, launcher
from tests.faults.injection import EXIT_CODE, Fault, fired
from tests.faults.planned import Bits, assert_nothing_was_lost, bits, undisturbed, wait_for_end_of

pytestmark = pytest.mark.slow

SHORT = ("train.epochs=2", "checkpoint.every_steps=5", "tracking.mode=disabled")
OVERRIDES = (*SHORT, "workers.max_failures={machine: 20, code: 20}", "--json")
END_TIMEOUT_S = 150.0
MOMENTS = [
    Fault(kind="kill", doing="start", rank=0),
    Fault(kind="kill", doing="start", rank=1, after_s=0.2, follows=0),  # while it builds, or waits for the other
    Fault(kind="kill", doing="forward", step=7, rank=1),
    Fault(kind="kill", doing="start", rank=0, follows=2),  # during the recovery from it
    Fault(kind="kill", doing="backward", step=12, rank=0, after_s=0.003),  # in the exchange
    Fault(kind="kill", doing="storage", step=15, rank=0, after_s=0.005),  # amid the files of a checkpoint
    Fault(kind="kill", doing="storage", step=20, rank=0, after_s=0.02),
    Fault(kind="kill", doing="storage", step=20, rank=0, after_s=0.02, follows=6),  # twice in a row
    Fault(kind="kill", doing="validation", step=22, rank=1),
    Fault(kind="raise", doing="data", step=27, rank=1),
    Fault(kind="kill", doing="forward", step=30, rank=0),  # both at once
    Fault(kind="kill", doing="forward", step=30, rank=1),
    Fault(kind="kill", doing="forward", step=36, rank=1, victim="agent"),
    Fault(kind="kill", doing="start", rank=0, follows=12, victim="agent"),
]


@pytest.fixture(scope="module")
def reference() -> Bits:
    return undisturbed(SHORT)


def test_workers_killed_at_every_moment(tmp_path: Path, make_plan, reference: Bits) -> None:
    plan = make_plan(*MOMENTS)
    ended = launcher("run", JOBS / "digits.yaml", *OVERRIDES, cwd=tmp_path, on_ray=True)
    run = tmp_path / "runs/digits"

    assert bits(ended, run) == reference
    assert fired(plan).keys() == set(range(len(MOMENTS)))
    assert_nothing_was_lost(run)
    # Each is one failure and one attempt more, unless two hit one attempt.
    num_lost = len({fault["attempt"] for fault in fired(plan).values()})
    assert num_lost >= len(MOMENTS) - 2
    assert len(events(run, "worker_lost")) == num_lost
    assert ended.document["attempts"] == num_lost + 1
    assert wait_for_end_of(plan, END_TIMEOUT_S) == {}


def test_what_trying_again_does_not_help(tmp_path: Path, make_plan, reference: Bits) -> None:
    """An exception that comes again, and an exit code, end the run; it can be resumed."""
    run = tmp_path / "runs/digits"
    again = Fault(kind="raise", doing="data", step=12, rank=1)
    plan = make_plan(again, again, name="raised.json")
    raised = launcher("run", JOBS / "digits.yaml", *OVERRIDES, cwd=tmp_path)
    assert raised.exit_code == 1
    assert fired(plan).keys() == {0, 1}
    assert raised.document["attempts"] == 2
    error = raised.document["error"]
    assert "InjectedFault: fault 1 of the plan, in data after step 12 at step 12, for the second time; " in error
    assert error.endswith("; the newest checkpoint is of step 10")
    assert f"error: {error}\n" in raised.stderr
    assert wait_for_end_of(plan, END_TIMEOUT_S) == {}

    plan = make_plan(Fault(kind="exit", doing="forward", step=17), name="exited.json")
    exited = launcher("resume", run, "workers.num=1", "--json", cwd=tmp_path)
    assert exited.exit_code == 1
    assert fired(plan).keys() == {0}
    assert exited.document["attempts"] == 3
    assert f"ended with exit code {EXIT_CODE} at step" in exited.document["error"]
    assert wait_for_end_of(plan, END_TIMEOUT_S) == {}

    make_plan()
    assert bits(launcher("resume", run, "workers.num=3", "--json", cwd=tmp_path), run) == reference
    assert_nothing_was_lost(run)


def test_a_driver_interrupted_then_killed_amid_a_save(tmp_path: Path, make_plan, reference: Bits) -> None:
    """Ctrl-C, and elsewhere SIGKILL between the files of a checkpoint and its manifest; nothing outlives either."""
    run, elsewhere = tmp_path / "runs/digits", tmp_path / "elsewhere"
    elsewhere.mkdir()
    plan = make_plan(Fault(kind="hold", doing="forward", step=7), name="interrupted.json")
    interrupted = Running(["run", JOBS / "digits.yaml", *OVERRIDES, "workers.num=3"], tmp_path, on_ray=True)
    interrupt(interrupted, run, plan, saved_at=5)
    assert wait_for_end_of(plan, END_TIMEOUT_S) == {}

    plan = make_plan(Fault(kind="note", doing="forward", step=17), name="killed.json")
    running = Running(["resume", run, "workers.num=2"], elsewhere, on_ray=True)
    running.wait_until(lambda: 0 in fired(plan))
    os.kill(running.pid, signal.SIGSTOP)  # it commits nothing any more
    running.wait_until(lambda: uncommitted(run) != set())
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait().exit_code == -signal.SIGKILL
    assert wait_for_end_of(plan, END_TIMEOUT_S) == {}
    assert uncommitted(run), "its files are there, its manifest is not"

    make_plan()
    resumed = launcher("resume", run, "workers.num=4", "--json", cwd=tmp_path)
    assert bits(resumed, run) == reference
    assert resumed.document["attempts"] == 3
    assert_nothing_was_lost(run)
    assert uncommitted(run) == set()


def uncommitted(run: Path) -> set[str]:
    """The folders of checkpoints that both workers have written their files to, and that have no manifest."""
    folders: dict[str, set[str]] = {}
    for path in (run / "checkpoints").glob("*/[!.]*"):
        folders.setdefault(path.parent.name, set()).add(path.name.partition("-")[0])
    return {name for name, found in folders.items() if found == {"model", "optimizer", "training"}}
