"""The process that others are forked from: what they need is imported, no thread runs in it, no GPU was touched.

It is the standard library's fork server, with three things added. Any process of the same user and host can fork
from it, not only the one that started it: one import of torch, begun while Ray starts, serves all agents of the
driver's host, every restart of a training process, and the loader processes of each. A process ends with the one that
asked for it, its parent, though it is the server's child. And the server may die: its processes are then known to be
lost, and the next fork starts another.
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
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import popen_forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ForkServer, read_signed
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running as ensure_tracker_running
from typing import Any

# From 3.14 on a client needs a key, which would have to travel; there, every process starts its own server.
_CAN_SHARE = sys.version_info < (3, 14)
_ORPHAN_WAIT_S = 10.0
_SAFE_PATH = "PYTHONSAFEPATH"
_OURS = "launcher"
"""The value that is this module's own: what is forked from a server may start programs of the user's, and drops it."""
_own: Any = multiprocessing.forkserver._forkserver
"""The server that this process starts, if it starts one."""


class ServerLostError(ChildProcessError):
    """The server died, and with it what it knows of a process that was forked from it, such as how that ended."""


def start(modules: Sequence[str]) -> None:
    """Starts this process's own server, unless it runs, and forks from it from now on.

    It imports the modules in the background, and ends with this process. Strings hash alike in all that is forked from
    it, on every host and in every attempt: sets of them have one order.
    """
    os.environ["PYTHONHASHSEED"] = "0"  # an interpreter reads it when it starts
    _own.set_forkserver_preload([*dict.fromkeys([*modules, __name__])])
    # Ctrl-C reaches every process of the terminal; the server, which inherits this mask, has no say in it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _safe_path():
            _own.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _fork_from(_own)


def stop() -> None:
    """Ends this process's own server, if it runs, at once; what was forked from it goes on."""
    if _own._forkserver_pid is not None:  # it may be about to die, and pass for one that runs
        os.kill(_own._forkserver_pid, signal.SIGKILL)
        with suppress(FileNotFoundError):  # its socket was removed
            _own._stop()


def use(address: str, modules: Sequence[str] = ()) -> None:
    """From now on this process forks from the server at ``address``.

    ``modules``: What a server of its own is to import, which takes the place of that one if it dies.
    """
    _own.set_forkserver_preload([*modules])
    _fork_from(_SharedServer(address))


def own_address() -> str | None:
    """The address of the server that this process has started, or was forked from, if others can use it."""
    server: Any = multiprocessing.forkserver._forkserver
    return server._forkserver_address if _CAN_SHARE else None


def fork(target: Callable[..., None], args: tuple[Any, ...], name: str) -> "ChildProcess":
    """Starts ``target(*args)`` in a process forked from the server; its standard streams are the server's.

    If the server has died, one of this process's own takes its place.
    """
    with _hidden_main():
        try:
            return _started(target, args, name)
        except (ConnectionError, FileNotFoundError, EOFError):  # it has died, or does so before it tells of the process
            _replace_server()
            return _started(target, args, name)


def call(function: str, *args: Any, timeout_s: float | None = None) -> Any:
    """Calls ``module:function`` in a process of its own, and returns or raises what it returns or raises.

    What the process prints is dropped, unless it dies of something that is no exception.

    Raises:
        ServerLostError: The server died, and the process was killed.
        ChildProcessError: The process died; the message says how, and ends with what it printed last.
        TimeoutError: It has not returned in time, and was killed.
    """
    with tempfile.NamedTemporaryFile(prefix="launcher-", suffix=".log") as log:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = fork(_answer, (theirs, log.name, function, args), function)
        theirs.close()
        try:
            if not ours.poll(timeout_s):
                raise TimeoutError(f"has not returned within {timeout_s:g} s")
            result, error = ours.recv()
        except EOFError:
            process.join()
            printed = log.read().decode(errors="replace").strip().splitlines()
            kind = ServerLostError if process.is_server_lost else ChildProcessError
            raise kind(f"{_end_of(process)}{': ' + printed[-1] if printed else ''}") from None
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


def _end_of(process: "ChildProcess") -> str:
    code = process.exitcode or 0
    if process.is_server_lost:
        return "was lost with its fork server"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keeps the interpreters that start within it from importing what lies in the working directory.

    They run a program that is given on the command line, and would look there first, such as for ``random``.
    """
    if _SAFE_PATH in os.environ:
        yield
        return
    os.environ[_SAFE_PATH] = _OURS
    try:
        yield
    finally:
        os.environ.pop(_SAFE_PATH, None)


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


class ChildProcess(ForkServerProcess):
    """A process that the kernel kills when its parent ends, in whatever way; the server, whose child it is, lives on.

    A process that is stopped, or hangs in C, cannot notice by itself that nobody is left to hear of it; it would keep
    its memory and its GPU. Linux can do this; elsewhere such a process has to be killed by hand.
    """

    _popen: "_Popen"  # set by ``start``
    _lifeline: Connection
    """The process's end of a pipe over which nothing is ever sent."""
    _held: Connection
    """The parent's end, which the kernel closes with the parent."""

    def start(self) -> None:
        self._lifeline, self._held = multiprocessing.Pipe(duplex=False)
        with self._lifeline, ExitStack() as on_failure:
            on_failure.enter_context(self._held)  # what was forked nevertheless ends
            super().start()
            on_failure.pop_all()

    @property
    def is_server_lost(self) -> bool:
        """Whether the server died before it told of the end of this process, of which nobody else can tell."""
        return self._popen.is_server_lost

    def __reduce__(self) -> tuple[Any, ...]:
        # The lifeline comes first: to read the rest, such as a dataset, runs the user's code, which may hang.
        state = {name: value for name, value in vars(self).items() if name != "_held"}
        return _tied_process, (self._lifeline,), state

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> "_Popen":  # noqa: N802  # as the standard library calls it
        return _Popen(process_obj)


def _tied_process(lifeline: Connection) -> ChildProcess:
    """Makes a process of the one that reads this, and ties it to its parent.

    Source: fcntl(2), F_SETSIG.
    """
    if os.environ.get(_SAFE_PATH) == _OURS:
        del os.environ[_SAFE_PATH]
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if lifeline.poll():  # the parent ended before
            os.kill(os.getpid(), signal.SIGKILL)
    return ChildProcess.__new__(ChildProcess)


class _Popen(popen_forkserver.Popen):
    """What the parent knows of a process, of whose end the server tells. If the server dies, nobody can.

    The standard library then makes up the exit code 255, which a process may end with too, and leaves it running.
    """

    is_server_lost = False

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            try:
                self.returncode = read_signed(self.sentinel)
            except EOFError:
                self.is_server_lost = True
                _kill_orphan(self.pid)
                self.returncode = -signal.SIGKILL
        return self.returncode


def _kill_orphan(pid: int) -> None:
    """Kills a process that a dead server has left, and waits for its end: until then it holds its GPU.

    Not for ever: one that hangs in the kernel, such as in a driver, ends when that lets it.
    """
    with suppress(OSError):  # it has ended; or Linux is older than 5.3, and its end cannot be waited for
        os.kill(pid, signal.SIGKILL)
        if sys.platform == "linux":
            process = os.pidfd_open(pid)
            wait([process], _ORPHAN_WAIT_S)
            os.close(process)


class _Context(ForkServerContext):
    Process = ChildProcess


CONTEXT = _Context()
"""Makes processes forked from the server, for those that want a context of ``multiprocessing``."""


def _started(target: Callable[..., None], args: tuple[Any, ...], name: str) -> ChildProcess:
    process = ChildProcess(target=target, args=args, name=name)
    process.start()
    return process


def _fork_from(server: ForkServer) -> None:
    multiprocessing.forkserver._forkserver = server
    multiprocessing.forkserver.connect_to_new_process = server.connect_to_new_process


def _replace_server() -> None:
    """Starts a server of this process's own in place of the one that does not answer."""
    stop()
    start(_own._preload_modules)


class _SharedServer(ForkServer):
    """The client's side of a server that another process has started, and will end."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._forkserver_address = address
        # Every request hands over a descriptor that keeps the server alive; this one keeps nothing alive.
        self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)

    def ensure_running(self) -> None:
        with _safe_path():
            ensure_tracker_running()
