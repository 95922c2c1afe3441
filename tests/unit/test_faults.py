"""Plans of faults: what can be planned, and that each fault happens once."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injection import Fault, FaultyActivity, InjectedFault, fired, read_plan, release, write_plan


def activity(plan: Path, rank: int = 0, attempt: int = 0) -> FaultyActivity:
    """That of a training process, whose agent is this process."""
    _, theirs = multiprocessing.Pipe()
    return FaultyActivity(theirs, plan, rank, attempt)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "burn", "doing": "forward"}, "no such fault"),
        ({"kind": "kill", "doing": "dinner"}, "no such fault"),
        ({"kind": "kill", "doing": "forward", "victim": "driver"}, "no such fault"),
        ({"kind": "raise", "doing": "forward", "victim": "agent"}, "an agent gets signals alone, not 'raise'"),
        ({"kind": "stop", "doing": "forward", "victim": "fork_server"}, "a fork server is killed, not 'stop'"),
        ({"kind": "hang", "doing": "forward", "victim": "loader"}, "a loader is killed at the mark, not 'hang'"),
        ({"kind": "kill", "doing": "data", "victim": "loader", "after_s": 0.1}, "not 'kill' 0.1 s later"),
        ({"kind": "hang", "doing": "forward", "after_s": 0.1}, "'hang' happens to the thread that passes the mark"),
        ({"kind": "hold", "doing": "forward", "after_s": 0.1}, "'hold' happens to the thread that passes the mark"),
        ({"kind": "kill", "doing": "forward", "after_s": -1.0}, "after_s must be finite and at least 0, got -1.0"),
    ],
)
def test_what_cannot_be_planned(fault: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fault(**fault)


def test_a_plan_is_read_as_it_was_written(path: Path) -> None:
    faults = [Fault(kind="kill", doing="storage", step=5, rank=1, after_s=0.5), Fault(kind="note", doing="start")]
    write_plan(faults, path)
    assert read_plan(path) == faults


def test_a_fault_happens_once_at_its_moment_and_leaves_a_proof(path: Path) -> None:
    write_plan([Fault(kind="raise", doing="forward", step=3, rank=1)], path)
    for rank, doing, step in ((0, "forward", 3), (1, "backward", 3), (1, "forward", 2)):
        activity(path, rank).mark(doing, step)
    assert fired(path) == {}

    with pytest.raises(InjectedFault, match="fault 0 of the plan, in forward after step 3"):
        activity(path, rank=1, attempt=2).mark("forward", 3)
    proof = fired(path)[0]
    assert {name: proof[name] for name in ("rank", "attempt", "pid", "doing", "step")} == {
        "rank": 1, "attempt": 2, "pid": os.getpid(), "doing": "forward", "step": 3,
    }  # fmt: skip
    activity(path, rank=1, attempt=3).mark("forward", 3)


def test_a_fault_waits_for_the_one_that_it_follows(path: Path) -> None:
    write_plan([Fault(kind="note", doing="data"), Fault(kind="note", doing="start", follows=0)], path)
    first = activity(path)
    assert fired(path) == {}
    first.mark("data", 0)
    assert fired(path).keys() == {0}
    activity(path, attempt=1)
    assert fired(path)[1]["attempt"] == 1


def test_who_is_held_goes_on_when_it_is_released(path: Path) -> None:
    write_plan([Fault(kind="hold", doing="data", step=1)], path)
    passes = threading.Thread(target=activity(path).mark, args=("data", 1))
    passes.start()
    while not fired(path):
        passes.join(timeout=0.01)
    assert passes.is_alive()
    release(path, 0)
    passes.join(timeout=60)
    assert not passes.is_alive()
    activity(path).mark("data", 1)  # nobody else is held


def test_two_alike_happen_to_two_processes(path: Path) -> None:
    again = Fault(kind="raise", doing="data", step=1)
    write_plan([again, again], path)
    for number in range(2):
        with pytest.raises(InjectedFault, match=f"fault {number} "):
            activity(path, attempt=number).mark("data", 1)
    assert fired(path).keys() == {0, 1}


def test_a_loader_is_killed_once_there_is_one(path: Path) -> None:
    write_plan([Fault(kind="kill", doing="data", victim="loader")], path)
    assert multiprocessing.active_children() == [], "none of another test"
    watched = activity(path)
    watched.mark("data", 0)
    assert fired(path) == {}
    loader = multiprocessing.Process(target=signal.pause)
    loader.start()
    watched.mark("data", 1)
    loader.join(timeout=60)
    assert loader.exitcode == -signal.SIGKILL
    assert fired(path)[0]["step"] == 1
