"""The process that others are forked from: what they need is imported, no thread runs in it, no GPU was touched.

It is the standard library's fork server, with one thing added: any process of the same user and host can fork
from it, not only the one that started it. So one import of torch, begun while Ray starts, serves all agents of the
driver's host, every restart of a training process, and the loader processes of each.
"""

import fcntl
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ForkServer
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running as ensure_tracker_running
from typing import Any

# From 3.14 on a client needs a key, which would have to travel; there, every process starts its own server.
_CAN_SHARE = sys.version_info < (3, 14)


def start(modules: Sequence[str]) -> None:
    """Starts this process's own server, which imports the modules in the background and ends with this process.

    Strings hash alike in all that is forked from it, on every host and in every attempt: sets of them have one order.
    """
    os.environ["PYTHONHASHSEED"] = "0"  # an interpreter reads it when it starts
    multiprocessing.forkserver.set_forkserver_preload([*modules, __name__])
    # Ctrl-C reaches every process of the terminal; the server, which inherits this mask, has no say in it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def use(address: str) -> None:
    """From now on ``multiprocessing.get_context("forkserver")`` forks from the server at ``address``."""
    shared = _SharedServer(address)
    multiprocessing.forkserver._forkserver = shared
    multiprocessing.forkserver.connect_to_new_process = shared.connect_to_new_process


def own_address() -> str | None:
    """The address of the server that this process has started, or was forked from, if others can use it."""
    server: Any = multiprocessing.forkserver._forkserver
    return server._forkserver_address if _CAN_SHARE else None


def fork(target: Callable[..., None], args: tuple[Any, ...], name: str) -> BaseProcess:
    """Starts ``target(*args)`` in a process forked from the server; its standard streams are the server's."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args, name=name)
    with _hidden_main():
        process.start()
    return process


def call(function: str, *args: Any) -> Any:
    """Calls ``module:function`` in a process of its own, and returns or raises what it returns or raises.

    What the process prints is dropped, unless it dies of something that is no exception.

    Raises:
        ChildProcessError: The process died; the message says how, and ends with what it printed last.
    """
    with tempfile.NamedTemporaryFile(prefix="launcher-", suffix=".log") as log:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = fork(_answer, (theirs, log.name, function, args), function)
        theirs.close()
        try:
            result, error = ours.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            printed = log.read().decode(errors="replace").strip().splitlines()
            raise ChildProcessError(f"{how}{': ' + printed[-1] if printed else ''}") from None
        finally:
            process.kill()
            process.join()
    if error is not None:
        raise error
    return result


def resolve(function: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; importing its module here and not where it was named."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def die_with(lifeline: Connection) -> None:
    """Has the kernel kill this process when the other end of a pipe is closed, by whatever end its holder finds.

    A process that is stopped, or hangs in C, cannot notice by itself that nobody is left to hear of it; it would keep
    its memory and its GPU. Linux can do this; elsewhere such a process has to be killed by hand.

    Source: fcntl(2), F_SETSIG.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if lifeline.poll():  # it was closed before
            os.kill(os.getpid(), signal.SIGKILL)


def print_to(log_path: str) -> None:
    """Sends this process's standard output and error to the end of a file."""
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text file, not a test's capture


def _answer(connection: Connection, log_path: str, function: str, args: tuple[Any, ...]) -> None:
    print_to(log_path)
    try:
        answer: tuple[Any, Exception | None] = (resolve(function)(*args), None)
    except Exception as error:  # raised again where the call was made
        traceback.print_exc()
        answer = (None, error)
    connection.send(answer)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keeps a forked process from importing this process's main module a second time, such as Ray's worker script."""
    main = sys.modules["__main__"]
    path = main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        if path is not None:
            main.__file__ = path


class _SharedServer(ForkServer):
    """The client's side of a server that another process has started, and will end."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._forkserver_address = address
        # Every request hands over a descriptor that keeps the server alive; this one keeps nothing alive.
        self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)

    def ensure_running(self) -> None:
        ensure_tracker_running()
