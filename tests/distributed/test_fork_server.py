"""A process that others are forked from, its answers and its deaths."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
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


def are_hashes_random() -> bool:
    return bool(sys.flags.hash_randomization)


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


def test_it_returns_what_the_function_returns(capfd: pytest.CaptureFixture[str]) -> None:
    value, pid = fork_server.call(f"{HERE}:answer", 41)
    assert value == 42
    assert pid != os.getpid()
    assert capfd.readouterr().out == ""


def test_strings_hash_alike_in_every_process() -> None:
    assert not fork_server.call(f"{HERE}:are_hashes_random")


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


def test_a_process_that_stands_still_dies_with_its_lifeline() -> None:
    theirs, ours = multiprocessing.Pipe(duplex=False)
    process = fork_server.fork(stop_with, (theirs,), "stopped")
    theirs.close()
    while "T (stopped)" not in Path(f"/proc/{process.pid}/status").read_text():
        assert process.is_alive()
        time.sleep(0.01)
    ours.close()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL


def stop_with(lifeline: Connection) -> None:
    fork_server.die_with(lifeline)
    os.kill(os.getpid(), signal.SIGSTOP)
