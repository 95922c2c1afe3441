"""A process that others are forked from, its answers and its deaths."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import DescriptionError, TrainingError, class_in_tree
from cluster.process import fork_server
from tests.errors import all_kinds, error_of, facts
from tests.processes import state, wait_until

HERE = __name__
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def server() -> None:
    fork_server.start([])


def answer(value: int) -> tuple[int, int]:
    print("this goes nowhere")
    return value + 1, os.getpid()


def are_hashes_random() -> bool:
    return bool(sys.flags.hash_randomization)


def get_signals() -> int:
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for number in numbers:
        os.kill(os.getpid(), number)
    return len(numbers)


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


def test_no_process_looks_for_garbage_in_what_the_server_imported() -> None:
    assert fork_server.call("gc:get_freeze_count") > 10_000


def test_signals_that_reach_many_processes_do_not_reach_a_forked_one() -> None:
    """A closed terminal and a scheduler send them to all; only the driver acts on them."""
    assert fork_server.call(f"{HERE}:get_signals") == 4


def test_it_raises_what_the_function_raises() -> None:
    with pytest.raises(DescriptionError, match="job.yaml: no"):
        fork_server.call(f"{HERE}:refuse")


def refuse_with(kind: str) -> None:
    raise error_of(fork_server.resolve(kind))


def test_it_raises_every_error_as_its_class_in_the_tree() -> None:
    for kind in all_kinds():
        error = error_of(kind)
        with pytest.raises(class_in_tree(error)) as caught:
            fork_server.call(f"{HERE}:refuse_with", f"{kind.__module__}:{kind.__qualname__}")
        assert facts(caught.value) == facts(error)


def refuse_in_private() -> None:
    class PrivateError(Exception):
        def __init__(self, *, what: str) -> None:
            super().__init__(f"{what} is private")
            self.file = open(os.devnull)  # noqa: SIM115

    raise PrivateError(what="it")


def test_an_exception_that_only_its_process_knows_arrives_as_text() -> None:
    with pytest.raises(TrainingError) as caught:
        fork_server.call(f"{HERE}:refuse_in_private")
    assert str(caught.value) == "PrivateError: it is private"
    assert "in refuse_in_private" in caught.value.traceback


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


def stop(report: Connection) -> None:
    report.send((os.getpid(), os.getppid()))
    os.kill(os.getpid(), signal.SIGSTOP)


class Endless:
    """An argument that takes for ever to read."""

    def __init__(self, report: Connection) -> None:
        self._report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return read_for_ever, (self._report,)


def read_for_ever(report: Connection) -> None:
    report.send((os.getpid(), os.getppid()))
    threading.Event().wait()


def itself(report: Connection) -> Connection:
    return report


def have_child(report: Connection, argument: Callable[[Connection], Any]) -> None:
    address = fork_server.own_address()
    assert address is not None
    fork_server.use(address)
    fork_server.fork(stop, (argument(report),), "child")
    threading.Event().wait()


@pytest.mark.parametrize(
    ("argument", "at"), [(itself, "T (stopped)"), (Endless, "S (sleeping)")], ids=["stopped", "reading its arguments"]
)
def test_a_process_dies_with_its_parent(argument: Callable[[Connection], Any], at: str) -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    parent = fork_server.fork(have_child, (theirs, argument), "parent")
    theirs.close()
    child, _ = ours.recv()
    wait_until(lambda: state(child) == at)
    parent.kill()
    parent.join()
    wait_until(lambda: state(child) == "", limit_s=5)


def server_of() -> int:
    return os.getppid()


def kill_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def die_with_server() -> None:
    kill_server()
    os.kill(os.getpid(), signal.SIGKILL)


def with_own_server(function: str) -> Any:
    """Calls it in a process forked from a server that may die."""
    fork_server.start([])
    return fork_server.call(f"{HERE}:{function}")


def loss_with_own_server() -> str:
    with pytest.raises(fork_server.ServerLostError) as caught:
        with_own_server("die_with_server")
    return str(caught.value)


def test_a_call_outlives_its_server() -> None:
    fork_server.call(f"{HERE}:with_own_server", "kill_server")
    assert fork_server.call(f"{HERE}:loss_with_own_server") == "was lost with its fork server"


def lose_own_server(how: str) -> tuple[int, int]:
    before = with_own_server("server_of")
    if how == "killed":
        os.kill(before, signal.SIGKILL)
    else:
        os.unlink(fork_server.own_address() or "")
    after = fork_server.call(f"{HERE}:server_of")
    assert not Path(f"/proc/{before}").exists(), "it has been waited for"
    return before, after


@pytest.mark.parametrize("how", ["killed", "its socket is removed"])
def test_a_dead_server_is_replaced(how: str) -> None:
    before, after = fork_server.call(f"{HERE}:lose_own_server", how)
    assert before != after
    wait_until(lambda: state(after) == "")


def stop_own_server() -> tuple[int, int, int]:
    fork_server.stop()
    before = with_own_server("server_of")
    fork_server.stop()
    assert not Path(f"/proc/{before}").exists(), "it has been waited for"
    fork_server.stop()
    return before, fork_server.call(f"{HERE}:server_of"), with_own_server("server_of")


def test_a_server_that_is_stopped_and_starts_again() -> None:
    before, after, same = fork_server.call(f"{HERE}:stop_own_server")
    assert before != after == same


def fork_from(address: str) -> int:
    fork_server.use(address)
    return fork_server.call(f"{HERE}:answer", 1)[0]


@pytest.mark.parametrize("moment", ["gone", "refuses", "dies amid the request"])
def test_a_dead_server_of_others_is_replaced(moment: str, tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        if moment != "gone":
            listener.bind(address)
        if moment == "dies amid the request":
            listener.listen()
            threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        assert fork_server.call(f"{HERE}:fork_from", address) == 2


def lose_server_of_child(report: Connection) -> None:
    fork_server.start([])
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = fork_server.fork(stop, (theirs,), "child")
    child, server = ours.recv()
    assert process.is_alive()
    os.kill(server, signal.SIGKILL)
    process.join()
    report.send((process.is_server_lost, state(child)))


def test_no_child_of_a_dead_server_is_left() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    parent = fork_server.fork(lose_server_of_child, (theirs,), "parent")
    theirs.close()
    assert ours.recv() == (True, "")
    parent.join()


def test_the_working_directory_does_not_come_before_the_standard_library(tmp_path: Path) -> None:
    """Also of a program that has not been started with -P, such as the installed command."""
    (tmp_path / "program").mkdir()
    program = tmp_path / "program/launcher"
    program.write_text(
        "import os\n"
        "from cluster.process import fork_server\n"
        "fork_server.start(['cluster.errors'])\n"
        "print(fork_server.call('os:getenv', 'PYTHONSAFEPATH'), os.getenv('PYTHONSAFEPATH'))\n"
        "print(fork_server.call('os:getcwd'))\n"
    )
    (tmp_path / "cluster").mkdir()
    for name in ("random", "signal", "struct", "selectors", "threading", "cluster/__init__", "cluster/errors"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    ended = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert (ended.stdout, ended.stderr) == (f"None None\n{tmp_path}\n", "")


def work_on() -> None:
    threading.Event().wait()


def tell_twice() -> int:
    fork_server.tell_caller("one")
    fork_server.tell_caller("two")
    return 3


def test_a_call_tells_what_it_does() -> None:
    told = list[str]()
    assert (fork_server.call(f"{HERE}:tell_twice", tell=told.append), told) == (3, ["one", "two"])
    assert fork_server.call(f"{HERE}:tell_twice") == 3, "nobody need listen"
    fork_server.tell_caller("nobody has called this process")


def test_a_process_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the call nor at the end of the interpreter."""
    made = list[fork_server.ChildProcess]()

    def remember(process: fork_server.ChildProcess) -> None:
        made.append(process)

    monkeypatch.setattr(fork_server.ChildProcess, "kill", remember)
    monkeypatch.setattr(fork_server, "LAST_WAIT_S", 0.1)
    with pytest.raises(TimeoutError):
        fork_server.call(f"{HERE}:work_on", timeout_s=0.1)

    (process,) = made
    assert process.is_alive()
    assert process not in multiprocessing.active_children()
    monkeypatch.undo()
    assert process.kill_within(10)
