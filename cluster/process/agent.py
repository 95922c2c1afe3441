"""The agent: what runs inside a Ray Train worker. It trains nothing; it starts and watches the process that does.

The training process is forked from a server that has torch imported and has touched no GPU, so a new one
takes a fraction of a second. The agent knows how it ended, keeps what it printed, passes its messages to
the driver and the driver's orders to it, and starts it anew when the driver says so.
"""

import faulthandler
import math
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import ClusterError, LauncherError, StorageError, one_line
from cluster.host.oom import OomKills, be_taken_first
from cluster.host.scratch import make_own_folder, sweep_own_folders
from cluster.process import fork_server
from cluster.process.link import DOING, Activity, Beat, Link
from cluster.process.workplace import fork_from, take_environment, take_place
from cluster.run.run_directory import RunDirectory

FAULTS_VARIABLE = "LAUNCHER_FAULTS"
"""The environment variable that names a plan of faults, see ``cluster.process.faults``."""
HERE_INTERVAL_S = 5.0
"""How often an agent says that it is there."""
_WATCH_INTERVAL_S = 1.0
_PACE_INTERVAL_S = 5.0
_STACK_WAIT_S = 0.5
_LOG_INTERVAL_S = 20.0
_LAST_LOG_S = 10.0
"""How long the end of a run waits for the last log to be kept."""
_LOG_LIMIT_BYTES = 16 * 2**20
_TAIL_LINES = 20
_AT_STORE = ("restore", "storage")
"""What a process does that lasts as long as its store takes."""
_FAULT = "Fatal Python error:"
"""How the stack begins that ``faulthandler`` prints of a process that crashes."""
_NOISE = ("frame #", "Extension modules:")
"""Lines about C++ that crashes print, and people do not read."""
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What the driver wants, as a whole: an agent that comes late, or misses a version, reads the same."""

    version: int = 0
    attempt: int | None = None
    """The attempt to run; none: not yet."""
    agents: frozenset[str] = frozenset()
    """The ids of the agents that run it. One that Ray has lost may live on, and hear of what is no longer its own."""
    host: str = _LOOPBACK
    """The address of rank 0 for the others."""
    meeting_port: int | None = None
    """The port of rank 0's store in this attempt, once it is known."""
    stop: bool = False
    """Save and end."""
    end: bool = False
    """The run is over: end now."""


class Channel(Protocol):
    """The way between agents and the driver."""

    def post(self, messages: list[dict[str, Any]]) -> None:
        """Sends messages to the driver; they arrive in order."""

    def orders_after(self, version: int) -> Orders:
        """Waits for orders newer than ``version``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a training process is told.

    Attributes:
        entry: ``module:function``, called with the link and this task in the training process. A name, for
            the agent must not import what the training process needs.
        run_url: The run directory.
        import_paths: Folders of the user's own modules.
        code: The digest of the bundle of the user's own modules, which come before those in folders; none: there is
            no bundle.
        code_directory: The folder in the bundle of which each training process makes a copy, in which relative paths
            start; none: they start in an empty folder.
        rank, world_size: This worker among all.
        attempt: Counts starts of the worker group's processes, from 0.
        host: The address of rank 0.
        address: This worker's address for the others.
        working_directory: Where relative paths of the user's data start, without a bundle on every host.
        fork_server: The address of a server to fork from, if there is one on the worker's host.
        on_gpu: Whether this worker has a GPU, and it is visible as the only one.
        hang_timeout_s: Seconds without progress after which the training process counts as hung.
        first_step_timeout_s: The same, from its start to the end of its first step.
        data_fingerprint: What the plan found of the data, for every worker to compare; none: it is not compared.
        may_differ: Workers train together even if they differ in what may change bits, such as their GPUs.
        content: The job, which only the entry understands.
    """

    entry: str
    run_url: str
    import_paths: tuple[str, ...]
    working_directory: str
    code: str | None = None
    code_directory: str | None = None
    fork_server: str | None = None
    rank: int = 0
    world_size: int = 1
    attempt: int = 0
    host: str = _LOOPBACK
    address: str = _LOOPBACK
    on_gpu: bool = False
    hang_timeout_s: float = math.inf
    first_step_timeout_s: float = math.inf
    data_fingerprint: str | None = None
    may_differ: bool = False
    content: Any = None


class Agent:
    """Keeps one training process going, as the driver orders."""

    def __init__(self, channel: Channel, task: Task, identity: Mapping[str, Any]) -> None:
        """``identity``: what the driver is told of this worker, such as its node."""
        self._channel = channel
        self._task = task
        self._id = uuid.uuid4().hex
        self._identity = dict(identity)
        self._run = RunDirectory(task.run_url)
        self._orders = Orders()
        self._deaf: Exception | None = None
        self._child: _TrainingProcess | None = None
        self._logs = ThreadPoolExecutor(1, thread_name_prefix="logs")  # a store that hangs must not silence the agent
        self._keeps_logs = True
        self._keeping: Future[None] | None = None

    def run(self) -> None:
        """Follows orders until they say that the run is over."""
        fork_from(self._task.fork_server, modules_of(self._task.entry))
        self._channel.post([{"kind": "hello", "rank": self._task.rank, "id": self._id, **self._identity}])
        said_at = time.monotonic()
        news, wake = multiprocessing.Pipe(duplex=False)
        threading.Thread(target=self._listen, args=(wake,), name="orders", daemon=True).start()
        try:
            while not self._orders.end:
                sources = [news, *(self._child.sources() if self._child else [])]
                ready = wait(sources, timeout=_WATCH_INTERVAL_S)
                if self._child is not None:
                    self._attend(self._child)
                if news in ready:
                    self._obey(self._received(news))
                if time.monotonic() - said_at > HERE_INTERVAL_S:
                    said_at = time.monotonic()
                    self._channel.post([{"kind": "here", "rank": self._task.rank, "id": self._id}])
        finally:
            self._end_child()
            if self._keeping is not None:
                wait_for([self._keeping], _LAST_LOG_S)

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._keep_log(self._child)
            self._child.discard_files()
            self._child = None

    def _listen(self, wake: Connection) -> None:
        try:
            orders = self._channel.orders_after(-1)
            while not orders.end:
                wake.send(orders)
                orders = self._channel.orders_after(orders.version)
            wake.send(orders)
        except Exception as error:  # the border of a thread
            self._deaf = error
        wake.close()

    def _received(self, news: Connection) -> Orders:
        """The next orders. An agent that hears none any more must not say that it is there: it ends, and is replaced.

        Raises:
            ClusterError: There are none.
        """
        try:
            return news.recv()
        except EOFError:
            raise ClusterError(f"the driver's orders do not come any more: {self._deaf}") from self._deaf

    def _obey(self, orders: Orders) -> None:
        self._orders = orders
        if orders.end:
            return
        if orders.attempt is None or self._id not in orders.agents:  # other agents take over
            self._end_child()
            return
        if self._child is None or self._child.task.attempt != orders.attempt:
            self._end_child()
            address = _LOOPBACK if orders.host == _LOOPBACK else self._identity["address"]
            task = replace(self._task, attempt=orders.attempt, host=orders.host, address=address)
            self._child = _TrainingProcess(task)
        if orders.meeting_port is not None:
            self._child.tell_meeting_place(orders.host, orders.meeting_port)
        if orders.stop:
            self._child.tell_stop()

    def _attend(self, child: "_TrainingProcess") -> None:
        """Passes on what the process said, keeps its log, and reports its end, once."""
        messages = child.messages() + child.news_of_pace()
        child.oom_kills.look()
        if child.has_ended() and not child.end_reported:
            messages += child.messages()
            self._keep_log(child)
            messages.append({"kind": "exited", **child.end()})
            child.end_reported = True
        elif (news := child.news_of_progress()) is not None:
            messages.append(news)
        elif time.monotonic() - child.log_kept_at > _LOG_INTERVAL_S and (not self._keeping or self._keeping.done()):
            self._keep_log(child)
        if messages:
            stamp = {"rank": child.task.rank, "attempt": child.task.attempt}
            self._channel.post([{**message, **stamp} for message in messages])

    def _keep_log(self, child: "_TrainingProcess") -> None:
        """Has the log put into the run directory; a store that fails here must not hurt the run."""
        child.log_kept_at = time.monotonic()
        log = child.log()
        if log:
            self._keeping = self._logs.submit(self._write_log, child.task.attempt, child.task.rank, log)

    def _write_log(self, attempt: int, rank: int, log: bytes) -> None:
        """Thread: that of logs."""
        try:
            self._run.write_log(attempt, rank, log)
        except StorageError as error:
            if self._keeps_logs:  # else it has been said
                self._channel.post([{"kind": "warning", "text": f"worker {rank}: log not kept: {error}"}])
            self._keeps_logs = False
        else:
            self._keeps_logs = True


def standstill_s(beat: Beat) -> float:
    """The seconds without progress that a beat tells of.

    Until its own first step is done, wherever the run stands, a process may be long about building, reading, compiling
    and tuning, so all of that is one. What reads or writes a checkpoint is as slow as its store, which has limits of
    its own, and does not count.
    """
    if beat.is_first_step:
        return sum(seconds for doing, seconds in beat.spent.items() if doing not in _AT_STORE)
    return 0.0 if beat.doing in _AT_STORE else beat.for_s


class _TrainingProcess:
    """A forked process that trains, as its agent sees it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.end_reported = False
        self.log_kept_at = time.monotonic()
        self._folder = make_own_folder()
        self._log_path = self._folder / f"worker-{task.rank}.log"
        self._log_path.touch()
        self._connection, theirs = multiprocessing.Pipe()
        self._met = self._stopped = self._is_hung = False
        self._beat = Beat(DOING[0], 0, is_first_step=True, for_s=0.0, spent={})  # until it speaks for itself
        self._heard_at = self._pace_told_at = time.monotonic()
        self._process = fork_server.fork(
            _run_training,
            (theirs, task, str(self._log_path), dict(os.environ)),
            f"worker-{task.rank}",
        )
        theirs.close()
        self._open = True
        assert self._process.pid is not None
        self.oom_kills = OomKills(self._process.pid)

    def sources(self) -> list[Any]:
        """What to wait on for news of the process."""
        return ([self._connection] if self._open else []) + ([] if self.end_reported else [self._process.sentinel])

    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def end(self) -> dict[str, Any]:
        """How the process ended, for one that has.

        A negative exit code is the number of the signal that killed it, none says that its fork server was lost, and
        it with it; ``oom_kill``: the kernel has just killed a process for want of memory; ``step``: the steps completed
        by its last beat.
        """
        return {
            "exit_code": None if self._process.is_server_lost else self._process.exitcode,
            "oom_kill": self.oom_kills.any_lately(),
            "step": self._beat.step,
            "log_tail": self.log_tail(),
        }

    def messages(self) -> list[dict[str, Any]]:
        """What the process has sent since the last call; does not wait."""
        messages: list[dict[str, Any]] = []
        try:
            while self._open and self._connection.poll():
                self._heard_at = time.monotonic()
                for message in self._connection.recv():
                    if isinstance(message, Beat):
                        self._beat = message
                    else:
                        messages.append(message)
        except (EOFError, OSError):  # it has ended; how is told by its exit code
            self._open = False
        return messages

    def news_of_pace(self) -> list[dict[str, Any]]:
        """Now and then, how far it is and what its time has gone into: beside the others, it tells who is slow."""
        beat, now = self._beat, time.monotonic()
        if beat.is_first_step or now - self._pace_told_at < _PACE_INTERVAL_S:
            return []
        self._pace_told_at = now
        return [{"kind": "pace", "step": beat.step, "spent": beat.spent}]

    def news_of_progress(self) -> dict[str, Any] | None:
        """A message when the process has made no progress for too long, where it stands; and when it goes on again."""
        beat, silent_s = self._beat, time.monotonic() - self._heard_at
        for_s, hang_timeout_s = silent_s + standstill_s(beat), self.task.hang_timeout_s
        limit_s = self.task.first_step_timeout_s if beat.is_first_step else hang_timeout_s
        is_hung = for_s >= limit_s
        if is_hung == self._is_hung:
            return None
        self._is_hung = is_hung
        if not is_hung:
            return {"kind": "goes_on"}
        is_silent = silent_s >= min(limit_s, hang_timeout_s) / 2  # not even its link's thread says anything
        return {
            "kind": "hung",
            "step": beat.step,
            "doing": beat.doing,
            "is_first_step": beat.is_first_step,
            "for_s": round(for_s, 1),
            "is_silent": is_silent,
            "stack": _state_of(self._process.pid) if is_silent else self._stack(),
        }

    def _stack(self) -> str:
        """The Python stack of the process's main thread, innermost call first, which it prints at a signal."""
        assert self._process.pid is not None
        before = len(self.log())
        os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(_STACK_WAIT_S)
        return self.log()[before:].decode(errors="replace").strip()

    def tell_meeting_place(self, host: str, port: int) -> None:
        if not self._met:
            self._met = True
            self._tell(("meet", host, port))

    def tell_stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._tell("stop")

    def kill(self) -> None:
        """Ends the process, whatever it is doing, and waits for its end."""
        self._process.kill()
        self._process.join()

    def discard_files(self) -> None:
        """Deletes its log, and the working directory that it had if its host lacks that of the run."""
        shutil.rmtree(self._folder, ignore_errors=True)
        sweep_own_folders()

    def log(self) -> bytes:
        """What the process printed, or the end of it if it is long."""
        with open(self._log_path, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _LOG_LIMIT_BYTES))
            return log.read()

    def log_tail(self) -> str:
        """The last lines of the log; of a crash, the whole Python stack."""
        lines = [line for line in self.log().decode(errors="replace").splitlines() if not line.startswith(_NOISE)]
        fault = next((number for number, line in enumerate(lines) if line.startswith(_FAULT)), len(lines))
        return "\n".join(lines[min(fault, max(0, len(lines) - _TAIL_LINES)) :])

    def _tell(self, order: Any) -> None:
        try:
            self._connection.send(order)
        except OSError:  # it has just ended, which its sentinel tells
            self._open = False


def _run_training(connection: Connection, task: Task, log_path: str, environment: dict[str, str]) -> None:
    """The first lines of a training process: its own log, quiet signals, its place, then the entry.

    ``environment`` is the agent's.
    """
    take_environment(environment)
    fork_server.print_to(log_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which orders a stop
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # prints the stack, when the agent wants to know it
    faulthandler.enable(all_threads=False)  # and when the process crashes
    be_taken_first()
    began = datetime.now(UTC).isoformat(timespec="seconds")
    print(
        f"{began}: worker {task.rank} of {task.world_size}, attempt {task.attempt}, "
        f"process {os.getpid()} on {socket.gethostname()}"
    )
    link = Link(connection, _make_activity(connection, task))
    try:
        task = take_place(task)
        fork_server.resolve(task.entry)(link, task)
    except Exception as error:  # the last door of the process: whatever is not told here, nobody hears of
        traceback.print_exc()
        link.send("failed", **_last_words(error))
        link.close()
        os._exit(1)
    link.close()


def _make_activity(connection: Connection, task: Task) -> Activity:
    """What the process tells of its work; where a plan of faults is given, which no production does, they happen."""
    plan = os.environ.get(FAULTS_VARIABLE)
    if plan is None:
        return Activity()
    from cluster.process.faults import FaultyActivity

    return FaultyActivity(connection, Path(plan), task.rank, task.attempt)


def _last_words(error: Exception) -> dict[str, Any]:
    """What the driver is told of the exception that ends a training process."""
    if not isinstance(error, LauncherError):  # the entry lets no other out: it is what it needs of its host
        what = f"cannot train on this host: {type(error).__name__}: {one_line(error)}"
        error = ClusterError(what, cause="environment", step=0)
    return {
        "error": type(error).__name__,
        "cause": error.cause,
        "message": str(error),
        "step": error.step,
        "place": error.place,
        "traceback": error.traceback,
    }


def _state_of(pid: int | None) -> str:
    """What Linux says of a process that says nothing itself, such as ``State: T (stopped)``."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # no Linux, or just ended
        return ""
    return next((line for line in lines if line.startswith("State")), "")


def modules_of(entry: str) -> list[str]:
    """What a fork server should import ahead for training processes with this entry."""
    return [entry.partition(":")[0], __name__]
