"""A process that others are forked from, its answers and its deaths."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import fork_server
from cluster.errors import DescriptionError

HERE = __name__


@pytest.fixture(autouse=True)
def server() -> None:
    fork_server.start([])


def answer(value: int) -> tuple[int, int]:
    print("this goes nowhere")
    return value + 1, os.getpid()


def refuse() -> None:
    raise DescriptionError("job.yaml: no")


def die() -> None:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(7)


def nested(address: str) -> int:
    """A process forked from the server uses it for its own children."""
    fork_server.use(address)
    return fork_server.call(f"{HERE}:answer", 1)[0]


def stop_for_ever() -> None:
    fork_server.belong_to_it()
    os.kill(os.getpid(), signal.SIGSTOP)


def leave_one_stopped() -> int:
    """For a process of its own, which then ends, and its server with it."""
    fork_server.start([])
    stopped = fork_server.fork(stop_for_ever, (), "stopped").pid
    assert stopped is not None
    while "T (stopped)" not in Path(f"/proc/{stopped}/status").read_text():
        time.sleep(0.01)
    return stopped


def test_it_returns_what_the_function_returns(capfd: pytest.CaptureFixture[str]) -> None:
    value, pid = fork_server.call(f"{HERE}:answer", 41)
    assert value == 42
    assert pid != os.getpid()
    assert capfd.readouterr().out == ""


def test_it_raises_what_the_function_raises() -> None:
    with pytest.raises(DescriptionError, match="job.yaml: no"):
        fork_server.call(f"{HERE}:refuse")


def test_a_death_is_told_with_the_last_words() -> None:
    with pytest.raises(ChildProcessError, match="was killed by SIGKILL: the last words"):
        fork_server.call(f"{HERE}:die")
    with pytest.raises(ChildProcessError, match="ended with exit code 7"):
        fork_server.call(f"{HERE}:leave")


def test_others_fork_from_it_too() -> None:
    address = fork_server.own_address()
    assert address is not None
    assert fork_server.call(f"{HERE}:nested", address) == 2


def test_no_child_is_left() -> None:
    fork_server.call(f"{HERE}:answer", 1)
    assert not multiprocessing.active_children()


def test_a_stopped_process_does_not_outlive_its_server() -> None:
    code = f"import os; from {HERE} import leave_one_stopped; print(leave_one_stopped(), flush=True); os._exit(0)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True, timeout=30
    )
    stopped = Path(f"/proc/{int(ended.stdout)}")
    deadline = time.monotonic() + 10
    while stopped.exists() and "Z (zombie)" not in (stopped / "status").read_text():
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.01)
