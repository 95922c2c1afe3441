"""The training process: its handle in the agent, and the first function that it runs.

It is forked from a server that has torch imported and has used no GPU, so it starts in a fraction of a second.
"""

import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import time
import traceback
from datetime import UTC, datetime
from multiprocessing.connection import Connection

from cluster.errors import MAX_CHARACTERS, ClusterError, LauncherError, class_in_tree, one_line, storable
from cluster.gpu_errors import SIGNS
from cluster.host.oom import OomKills, be_taken_first
from cluster.host.processes import state_of
from cluster.host.scratch import make_own_folder, sweep_own_folders
from cluster.host.signals import ignore_stops
from cluster.process import fork_server
from cluster.process.activity import Activity
from cluster.process.agent_link import AgentLink
from cluster.process.data_messages import DataDelayed
from cluster.process.messages import (
    DOING,
    Beat,
    Exited,
    Failed,
    GoesOn,
    Hello,
    Hung,
    Report,
    TimeSpent,
    Unkillable,
)
from cluster.process.orders import Meet, Order, Stop, Task
from cluster.process.workplace import fork_from_own_server, take_place

ACTIVITY_VARIABLE = "LAUNCHER_ACTIVITY"
"""The one hook for fault drills: an environment variable that holds ``module:function``.

If it is set, each training process calls the function with its connection to the agent, its rank and its attempt, and
uses the ``Activity`` that it returns. The call comes before the user's folders are added to the import path.
"""
_SHOW_STACK = signal.SIGQUIT
"""The signal by which the agent has a training process print its stack; no scheduler sends it, unlike SIGUSR1."""
_TIME_INTERVAL_S = 5.0
_STACK_LIMIT_S = 5.0
"""How long a process may take to print its stack: less than an agent may be silent, which sends no heartbeat then."""
_STACK_LOOK_INTERVAL_S = 0.25
_LOG_LIMIT_BYTES = 16 * 2**20
_TAIL_LINES = 20
_READING = ("start", "data", "validation")
"""Phases that read data."""
_DELAY_LASTS_S = 60.0
"""How long before a phase a loader process may have said that it waits for a store, which it says once a minute."""
_AT_STORE = ("restore", "storage")
"""Phases that last as long as the store takes."""
_CRASH = "Fatal Python error:"
"""First words of what ``faulthandler`` prints when a process crashes."""
_NOISE = ("frame #", "Extension modules:")
"""How lines about C++ begin that a crash prints and that help nobody."""


def standstill_s(beat: Beat) -> float:
    """Return the seconds without progress according to a heartbeat.

    Before its first step, at whatever step of the run, a process may take long to build, read, compile and tune, so all
    phases up to the end of that step count together. Reading and writing checkpoints never counts: it is as slow as the
    store, which has time limits of its own.
    """
    if beat.is_first_step:
        return sum(seconds for doing, seconds in beat.spent.items() if doing not in _AT_STORE)
    return 0.0 if beat.doing in _AT_STORE else beat.for_s


class TrainingProcess:
    """An agent's handle of a training process, which it forks."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.end_reported = False
        self.killed_at: float | None = None
        """When the process was killed; None: it was not."""
        self.log_kept_at = time.monotonic()
        self._folder = make_own_folder()
        self._log_path = self._folder / f"worker-{task.rank}.log"
        self._log_path.touch()
        self._connection, theirs = multiprocessing.Pipe()
        self._meeting_place_sent = self._stop_sent = self._is_hung = False
        self._beat = Beat(DOING[0], 0, is_first_step=True, for_s=0.0, spent={})  # until its first heartbeat
        self._received_at = self._time_reported_at = time.monotonic()
        self._delay, self._delayed_at = "", self._received_at
        self._process = fork_server.fork(run_training, (theirs, task, str(self._log_path)), f"worker-{task.rank}")
        theirs.close()
        self._open = True
        assert self._process.pid is not None
        self.oom_kills = OomKills(self._process.pid)

    def sources(self) -> list[Connection | int]:
        """Return what ``multiprocessing.connection.wait`` waits on for messages and for the end of the process."""
        return ([self._connection] if self._open else []) + ([] if self.end_reported else [self._process.sentinel])

    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def end(self) -> Exited:
        """Return how the process ended; call it only when the process has ended."""
        return Exited(
            exit_code=None if self._process.is_server_lost else self._process.exitcode,
            oom_kill=self.oom_kills.any_lately(),
            step=self._beat.step,
            log_tail=self.log_tail(),
        )

    def reports(self) -> list[Report]:
        """Return the reports that have arrived since the last call, without waiting; keep the newest heartbeat."""
        reports: list[Report] = []
        try:
            while self._open and self._connection.poll():
                self._received_at = time.monotonic()
                batch: list[Beat | Report] = self._connection.recv()
                for sent in batch:
                    if isinstance(sent, Beat):
                        self._beat = sent
                    else:
                        reports.append(sent)
                    if isinstance(sent, DataDelayed):
                        self._delay, self._delayed_at = sent.reason, self._received_at
        except (EOFError, OSError):  # it has ended; its exit code says how
            self._open = False
        return reports

    def time_reports(self) -> list[TimeSpent]:
        """Return a report of the seconds by phase every few seconds, after the first step."""
        beat, now = self._beat, time.monotonic()
        if beat.is_first_step or now - self._time_reported_at < _TIME_INTERVAL_S:
            return []
        self._time_reported_at = now
        return [TimeSpent(step=beat.step, spent=beat.spent)]

    def progress_report(self) -> Hung | GoesOn | None:
        """Return a report when the process begins to count as hung, and when it makes progress again; else None."""
        beat, silent_s = self._beat, time.monotonic() - self._received_at
        for_s, hang_timeout_s = silent_s + standstill_s(beat), self.task.hang_timeout_s
        limit_s = self.task.first_step_timeout_s if beat.is_first_step else hang_timeout_s
        is_hung = for_s >= limit_s
        if is_hung == self._is_hung:
            return None
        self._is_hung = is_hung
        if not is_hung:
            return GoesOn()
        is_silent = silent_s >= min(limit_s, hang_timeout_s) / 2  # its link's thread sends nothing either
        delayed_s = time.monotonic() - self._delayed_at
        return Hung(
            step=beat.step,
            doing=beat.doing,
            is_first_step=beat.is_first_step,
            for_s=round(for_s, 1),
            is_silent=is_silent,
            data_delay=self._delay if beat.doing in _READING and delayed_s < for_s + _DELAY_LASTS_S else "",
            on_gpu=self.task.on_gpu,
            stack=state_of(self._process.pid) if is_silent else self._stack(),
        )

    def _stack(self) -> str:
        """Have the process print the Python stack of its main thread, and return it, innermost call first.

        It is empty if the process prints nothing in time, for example because it waits in the kernel.
        """
        assert self._process.pid is not None
        before = size = last_size = self._log_path.stat().st_size
        os.kill(self._process.pid, _SHOW_STACK)
        deadline = time.monotonic() + _STACK_LIMIT_S
        # Nothing marks the end of a stack, so it is complete once the log has grown and does not grow further.
        while not before < size == last_size and not self.has_ended() and time.monotonic() < deadline:
            time.sleep(_STACK_LOOK_INTERVAL_S)
            last_size, size = size, self._log_path.stat().st_size
        with open(self._log_path, "rb") as log:
            log.seek(before)
            return log.read(_LOG_LIMIT_BYTES).decode(errors="replace").strip()

    def tell_meeting_place(self, host: str, port: int) -> None:
        """Send the address of rank 0's store, once."""
        if not self._meeting_place_sent:
            self._meeting_place_sent = True
            self._send(Meet(host, port))

    def tell_stop(self) -> None:
        """Send the order to save and end, once."""
        if not self._stop_sent:
            self._stop_sent = True
            self._send(Stop())

    def kill(self, limit_s: float) -> bool:
        """Kill the process, and wait for its end at most ``limit_s`` seconds; return whether it has ended."""
        if self.killed_at is None:
            self.killed_at = time.monotonic()
        return self._process.kill_within(limit_s)

    def unkillable(self, hello: Hello) -> Unkillable:
        """Return the report that the process does not end, though it was killed.

        Args:
            hello: The first message of its agent.
        """
        assert self.killed_at is not None
        assert self._process.pid is not None
        return Unkillable(
            rank=self.task.rank,
            id=hello.id,
            generation=hello.generation,
            attempt=self.task.attempt,
            pid=self._process.pid,
            for_s=round(time.monotonic() - self.killed_at, 1),
            state=state_of(self._process.pid),
            on_gpu=self.task.on_gpu,
        )

    def discard_files(self) -> None:
        """Delete the log of the process, and its working directory if that was a copy from a bundle."""
        shutil.rmtree(self._folder, ignore_errors=True)
        sweep_own_folders()

    def log(self) -> bytes:
        """Return what the process printed, at most the last 16 MiB."""
        with open(self._log_path, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _LOG_LIMIT_BYTES))
            return log.read()

    def log_tail(self) -> str:
        """Return the last lines of the log, long ones cut; after a crash, the whole Python stack.

        Lines about a failure of the GPU come first, however much was printed after them.
        """
        lines = [line for line in self.log().decode(errors="replace").splitlines() if not line.startswith(_NOISE)]
        crash = next((number for number, line in enumerate(lines) if line.startswith(_CRASH)), len(lines))
        begin = min(crash, max(0, len(lines) - _TAIL_LINES))
        telling = [next((line for line in reversed(lines[:begin]) if sign in line), None) for sign in SIGNS]
        last = [*(line for line in telling if line is not None), *lines[begin:]]
        return "\n".join(line[:MAX_CHARACTERS] for line in last)

    def _send(self, order: Order) -> None:
        try:
            self._connection.send(order)
        except OSError:  # it has just ended, which its sentinel shows
            self._open = False


def run_training(connection: Connection, task: Task, log_path: str) -> None:
    """Run a training process: redirect its output, set its signals, take its place on the host, call the entry.

    Args:
        connection: The connection to the agent.
        task: What to run.
        log_path: The file that takes what the process prints.
    """
    fork_from_own_server()
    fork_server.print_to(log_path)
    ignore_stops()  # they are for the driver, which then orders a stop
    faulthandler.register(_SHOW_STACK, all_threads=False)
    faulthandler.enable(all_threads=False)  # a crash prints it too
    be_taken_first()
    began = datetime.now(UTC).isoformat(timespec="seconds")
    print(
        f"{began}: worker {task.rank} of {task.world_size}, attempt {task.attempt}, "
        f"process {os.getpid()} on {socket.gethostname()}"
    )
    link = AgentLink(connection, _make_activity(connection, task))
    try:
        task = take_place(task)
        fork_server.resolve(task.entry)(link, task)
    except Exception as error:  # the outermost border of the process: no one else would report it
        traceback.print_exc()
        link.send(_failure_report(error))
        link.close()
        os._exit(1)
    link.close()


def _make_activity(connection: Connection, task: Task) -> Activity:
    """Make the activity of this process, by the function that ``ACTIVITY_VARIABLE`` names if it is set."""
    hook = os.environ.get(ACTIVITY_VARIABLE)
    if hook is None:
        return Activity()
    activity: Activity = fork_server.resolve(hook)(connection, task.rank, task.attempt)
    return activity


def _failure_report(error: Exception) -> Failed:
    """Return the report for the exception that ends a training process."""
    if not isinstance(error, LauncherError):  # the entry raises no others, so the host lacks what its import needs
        what = f"cannot train on this host: {type(error).__name__}: {one_line(error)}"
        error = ClusterError(what, cause="environment", step=0)
    return Failed(
        error=class_in_tree(error),
        cause=error.cause,
        message=storable(str(error)),
        step=error.step,
        place=error.place,
        traceback=storable(error.traceback),
    )
