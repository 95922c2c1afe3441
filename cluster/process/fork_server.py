"""The fork server: a process with the needed modules imported, no other thread and no GPU in use, to fork others from.

It is the standard library's fork server with three additions:

- Any process of the same user and host can fork from it, not only the one that started it. One import of torch, begun
  while Ray starts, serves all agents on the driver's host, every restart of training processes and their loaders.
- A forked process ends with its parent, the process that asked for it, although it is a child of the server.
- The server may die. Its processes then count as lost, and the next fork starts another server.

It replaces private parts of ``multiprocessing.forkserver`` (tested with Python 3.11): the module's global
``_forkserver`` and its ``connect_to_new_process``, and the attributes of ``ForkServer`` that hold the address, the
process id and the descriptor that keeps the server alive. From ``multiprocessing.process`` it takes ``_children``, the
processes that are waited for when the interpreter ends.
"""

import fcntl
import gc
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ForkServer
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running as ensure_tracker_running
from multiprocessing.util import get_temp_dir
from typing import Any

from cluster.errors import LauncherError, TrainingError, one_line, storable
from cluster.gpu_errors import SIGNS
from cluster.host.batch_job import is_batch_job
from cluster.host.processes import state_of
from cluster.host.signals import kept_from_children, obey_sigterm
from cluster.host.temporary_folder import check_socket_path, in_temporary_folder
from cluster.process.forked_environment import take_environment
from cluster.process.popen import LAST_WAIT_S, Popen

# From Python 3.14 on a client needs an authentication key, which would have to be sent; every process starts its own.
_CAN_SHARE = sys.version_info < (3, 14)
_SAFE_PATH = "PYTHONSAFEPATH"
_OURS = "launcher"
"""The value of PYTHONSAFEPATH that marks it as set here: forked processes remove it, so that the user's programs, which
they may start, do not inherit it."""
_own: Any = multiprocessing.forkserver._forkserver
"""The server that this process starts itself, if any."""
_caller: Connection | None = None
"""In the process of a ``call``: what its result is sent through."""


class ServerLostError(ChildProcessError):
    """The server died before it reported how a process forked from it ended; nobody else knows that."""


def start(modules: Sequence[str]) -> None:
    """Start this process's own server unless it runs, and fork from it from now on.

    The server imports the modules in the background and ends with this process. String hashes are the same in every
    process forked from it, on every host and in every attempt, so that sets of strings iterate in one order.

    Raises:
        TemporaryFolderError: Its socket cannot be made in the temporary folder.
    """
    os.environ["PYTHONHASHSEED"] = "0"  # read by the interpreter at its start
    _own.set_forkserver_preload([*dict.fromkeys([*modules, __name__])])
    _check_temporary_folder()
    # A scheduler sends SIGTERM to all processes of a batch job; the driver acts on it, and needs the workers to save.
    also = [signal.SIGTERM] if is_batch_job() else []
    with kept_from_children(), _safe_path():
        ensure_tracker_running()  # it unblocks SIGINT, which the server must not get while it imports
    with kept_from_children(*also), _safe_path():
        _own.ensure_running()
    _fork_from(_own)


def stop() -> None:
    """Kill this process's own server if it runs; the processes forked from it go on."""
    if _own._forkserver_pid is not None:  # a dying server may still look alive, so kill it in any case
        os.kill(_own._forkserver_pid, signal.SIGKILL)
        with suppress(FileNotFoundError):  # its socket is already removed
            _own._stop()


def use(address: str, modules: Sequence[str] = ()) -> None:
    """Fork from the server at ``address`` from now on.

    Args:
        address: The address of a server on this host.
        modules: What this process's own server imports, which replaces that one if it dies.
    """
    _own.set_forkserver_preload([*modules])
    _fork_from(_SharedServer(address))


def own_address() -> str | None:
    """Return the address of the server that this process forks from; None if other processes cannot use it."""
    server: Any = multiprocessing.forkserver._forkserver
    return server._forkserver_address if _CAN_SHARE else None


def fork(target: Callable[..., None], args: tuple[Any, ...], name: str) -> "ChildProcess":
    """Start ``target(*args)`` in a process forked from the server; its standard streams are the server's.

    If the server has died, a server of this process's own replaces it.
    """
    with _hidden_main():
        try:
            return _started(target, args, name)
        except (ConnectionError, FileNotFoundError, EOFError):  # it died, at the latest before it sent the id
            _replace_server()
            return _started(target, args, name)


def call(
    function: str, *args: Any, timeout_s: float | None = None, tell: Callable[[str], None] = lambda _: None
) -> Any:
    """Call ``module:function`` in a forked process; return what it returns, or raise its error.

    What the process prints is dropped unless it ends without returning or raising.

    Args:
        function: The function, as ``module:function``.
        args: Its arguments.
        timeout_s: The longest time without a line that it tells, or the result; None: no limit.
        tell: Receives the lines that the function gives to ``tell_caller``.

    Raises:
        LauncherError: What the function raised. An exception of another class, which may exist in that process alone,
            becomes a ``TrainingError`` with its text and its traceback.
        ServerLostError: The server died, and the process was killed.
        ChildProcessError: The process died; the message says how and ends with the last line that it printed.
        TimeoutError: The function did not return in time, and the process was killed.
    """
    with in_temporary_folder():
        log = tempfile.NamedTemporaryFile(prefix="launcher-", suffix=".log")  # noqa: SIM115
    with log:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = fork(_send_result, (theirs, log.name, function, args), function)
        theirs.close()
        try:
            while True:
                if not ours.poll(timeout_s):
                    raise TimeoutError(f"has not returned within {timeout_s:g} s")
                message = ours.recv()
                if not isinstance(message, str):
                    break
                tell(message)
            result, error = message
        except EOFError:
            process.join(LAST_WAIT_S)
            printed = log.read().decode(errors="replace").strip().splitlines()
            kind = ServerLostError if process.is_server_lost else ChildProcessError
            telling = [line for line in printed if any(sign in line for sign in SIGNS)] or printed
            raise kind(f"{_end_of(process)}{': ' + telling[-1] if telling else ''}") from None
        finally:
            process.kill_within(LAST_WAIT_S)
    if error is not None:
        raise error
    return result


def tell_caller(text: str) -> None:
    """Tell the process whose ``call`` runs here, if any, what is being done."""
    if _caller is not None:
        _caller.send(text)


def resolve(function: str) -> Callable[..., Any]:
    """Import and return the function that ``module:function`` names."""
    module, _, name = function.partition(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return resolved


def print_to(log_path: str) -> None:
    """Append this process's standard output and standard error to a file."""
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Python has no stream for a descriptor that was closed when the server started.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", 1, closefd=False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text file, not a test's capture


def _send_result(connection: Connection, log_path: str, function: str, args: tuple[Any, ...]) -> None:
    global _caller
    _caller = connection
    obey_sigterm()
    print_to(log_path)
    try:
        result: tuple[Any, LauncherError | None] = (resolve(function)(*args), None)
    except LauncherError as error:
        result = (None, error)
    except Exception as error:  # the outermost border of the process; ``call`` raises it again
        what = f"{type(error).__name__}: {one_line(error)}"
        result = (None, TrainingError(what, storable(traceback.format_exc())))
    connection.send(result)


def _end_of(process: "ChildProcess") -> str:
    """Return the predicate of a sentence about how the process ended."""
    if process.is_alive():
        return f"answers no more and does not end, {' '.join(state_of(process.pid).split())}"
    code = process.exitcode or 0
    if process.is_server_lost:
        return "was lost with its fork server"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _check_temporary_folder() -> None:
    """Check that the server's socket, and those of loader processes, can be made in the temporary folder."""
    with in_temporary_folder():
        parent, name = os.path.split(get_temp_dir())
    check_socket_path(parent, f"{name}/listener-12345678")


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keep interpreters that start in this context from looking for ``random``, say, in the working directory first."""
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
    """Keep a forked process from importing this process's main module again, such as Ray's worker script."""
    main = sys.modules["__main__"]
    path = main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        if path is not None:
            main.__file__ = path


class ChildProcess(ForkServerProcess):
    """A process that the kernel kills when its parent ends, however that ends; the server, whose child it is, goes on.

    A stopped process, or one that hangs in C, cannot notice the end of its parent by itself; it would keep its memory
    and its GPU. This works on Linux; on other systems, such a process has to be killed by hand.
    """

    _popen: Popen  # set by ``start``
    _lifeline: Connection
    """The process's end of a pipe that carries no data."""
    _held: Connection
    """The parent's end, which the kernel closes when the parent ends."""

    def start(self) -> None:
        self._lifeline, self._held = multiprocessing.Pipe(duplex=False)
        with self._lifeline, ExitStack() as on_failure:
            on_failure.enter_context(self._held)  # closes the pipe, which ends a process that was forked all the same
            super().start()
            on_failure.pop_all()

    def kill_within(self, limit_s: float) -> bool:
        """Kill the process, and wait for its end at most ``limit_s`` seconds; return whether it has ended.

        A process that hangs in the kernel, for example in the driver of a GPU, cannot be killed. No one waits for such
        a process then: at the end of the interpreter, ``multiprocessing`` would do so without a limit.
        """
        self.kill()
        self.join(limit_s)
        if self.is_alive():
            multiprocessing.process._children.discard(self)  # type: ignore[attr-defined]
            return False
        return True

    @property
    def is_server_lost(self) -> bool:
        """Whether the server died before it reported the end of this process; nobody else knows its exit code."""
        return self._popen.is_server_lost

    def environment(self) -> Mapping[str, str]:
        """Return the environment variables of the process: those that its parent has when it starts the process."""
        return dict(os.environ)

    def __reduce__(self) -> tuple[Any, ...]:
        # These two are unpickled first: the rest, such as a dataset, imports the user's code, which may hang.
        state = {name: value for name, value in vars(self).items() if name != "_held"}
        return _tied_process, (self._lifeline, self.environment()), state

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:  # noqa: N802  # the name that the standard library uses
        return Popen(process_obj)


def _tied_process(lifeline: Connection, environment: Mapping[str, str]) -> ChildProcess:
    """Have the kernel kill the calling process when its parent ends; set its environment; return its process object.

    The forked process calls it when it unpickles its ``ChildProcess``, before anything else of its parent's.

    Source: fcntl(2), F_SETSIG.
    """
    gc.freeze()  # what the server imported: to look through it takes 0.3 s, and writes to 90 MB that are shared
    take_environment(environment)
    if os.environ.get(_SAFE_PATH) == _OURS:
        del os.environ[_SAFE_PATH]
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        if lifeline.poll():  # the parent has already ended
            os.kill(os.getpid(), signal.SIGKILL)
    return ChildProcess.__new__(ChildProcess)


def _started(target: Callable[..., None], args: tuple[Any, ...], name: str) -> ChildProcess:
    process = ChildProcess(target=target, args=args, name=name)
    process.start()
    return process


def _fork_from(server: ForkServer) -> None:
    multiprocessing.forkserver._forkserver = server
    multiprocessing.forkserver.connect_to_new_process = server.connect_to_new_process


def _replace_server() -> None:
    """Start this process's own server in place of the one that does not answer."""
    stop()
    start(_own._preload_modules)


class _SharedServer(ForkServer):
    """Client of a server that another process started and will end."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._forkserver_address = address
        # Every request sends a descriptor that keeps the server alive; /dev/null keeps nothing alive.
        self._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)

    def ensure_running(self) -> None:
        with kept_from_children(), _safe_path():
            ensure_tracker_running()
