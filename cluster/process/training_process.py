"""The training process: as its agent sees it, and its own first lines.

It is forked from a server that has torch imported and has touched no GPU, so it is there in a fraction of a second.
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
from pathlib import Path

from cluster.errors import ClusterError, LauncherError, one_line
from cluster.host.oom import OomKills, be_taken_first
from cluster.host.scratch import make_own_folder, sweep_own_folders
from cluster.process import fork_server
from cluster.process.activity import Activity
from cluster.process.agent_link import AgentLink
from cluster.process.messages import DOING, Beat, Exited, Failed, GoesOn, Hung, Report, TimeSpent
from cluster.process.orders import Meet, Order, Stop, Task
from cluster.process.workplace import take_environment, take_place

ACTIVITY_VARIABLE = "LAUNCHER_ACTIVITY"
"""The one hook for fault drills: an environment variable that holds ``module:function``.

If it is set, each training process calls the function with its connection to the agent, its rank and its attempt, and
uses the ``Activity`` that it returns. The call comes before the user's folders are added to the import path.
"""
_TIME_INTERVAL_S = 5.0
_STACK_WAIT_S = 0.5
_LOG_LIMIT_BYTES = 16 * 2**20
_TAIL_LINES = 20
_AT_STORE = ("restore", "storage")
"""What a process does that lasts as long as its store takes."""
_FAULT = "Fatal Python error:"
"""How the stack begins that ``faulthandler`` prints of a process that crashes."""
_NOISE = ("frame #", "Extension modules:")
"""Lines about C++ that crashes print, and people do not read."""


def standstill_s(beat: Beat) -> float:
    """The seconds without progress that a beat tells of.

    Until its own first step is done, wherever the run stands, a process may be long about building, reading, compiling
    and tuning, so all of that is one. What reads or writes a checkpoint is as slow as its store, which has limits of
    its own, and does not count.
    """
    if beat.is_first_step:
        return sum(seconds for doing, seconds in beat.spent.items() if doing not in _AT_STORE)
    return 0.0 if beat.doing in _AT_STORE else beat.for_s


class TrainingProcess:
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
        self._heard_at = self._time_told_at = time.monotonic()
        self._process = fork_server.fork(
            run_training,
            (theirs, task, str(self._log_path), dict(os.environ)),
            f"worker-{task.rank}",
        )
        theirs.close()
        self._open = True
        assert self._process.pid is not None
        self.oom_kills = OomKills(self._process.pid)

    def sources(self) -> list[Connection | int]:
        """What to wait on for news of the process."""
        return ([self._connection] if self._open else []) + ([] if self.end_reported else [self._process.sentinel])

    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def end(self) -> Exited:
        """How the process ended, for one that has."""
        return Exited(
            exit_code=None if self._process.is_server_lost else self._process.exitcode,
            oom_kill=self.oom_kills.any_lately(),
            step=self._beat.step,
            log_tail=self.log_tail(),
        )

    def reports(self) -> list[Report]:
        """What the process has sent since the last call; does not wait."""
        reports: list[Report] = []
        try:
            while self._open and self._connection.poll():
                self._heard_at = time.monotonic()
                batch: list[Beat | Report] = self._connection.recv()
                for sent in batch:
                    if isinstance(sent, Beat):
                        self._beat = sent
                    else:
                        reports.append(sent)
        except (EOFError, OSError):  # it has ended; how is told by its exit code
            self._open = False
        return reports

    def news_of_time(self) -> list[TimeSpent]:
        """Every few seconds, what the time of the process has gone into."""
        beat, now = self._beat, time.monotonic()
        if beat.is_first_step or now - self._time_told_at < _TIME_INTERVAL_S:
            return []
        self._time_told_at = now
        return [TimeSpent(step=beat.step, spent=beat.spent)]

    def news_of_progress(self) -> Hung | GoesOn | None:
        """A report when the process has made no progress for too long, where it stands; and when it goes on again."""
        beat, silent_s = self._beat, time.monotonic() - self._heard_at
        for_s, hang_timeout_s = silent_s + standstill_s(beat), self.task.hang_timeout_s
        limit_s = self.task.first_step_timeout_s if beat.is_first_step else hang_timeout_s
        is_hung = for_s >= limit_s
        if is_hung == self._is_hung:
            return None
        self._is_hung = is_hung
        if not is_hung:
            return GoesOn()
        is_silent = silent_s >= min(limit_s, hang_timeout_s) / 2  # not even its link's thread says anything
        return Hung(
            step=beat.step,
            doing=beat.doing,
            is_first_step=beat.is_first_step,
            for_s=round(for_s, 1),
            is_silent=is_silent,
            stack=_state_of(self._process.pid) if is_silent else self._stack(),
        )

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
            self._tell(Meet(host, port))

    def tell_stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._tell(Stop())

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

    def _tell(self, order: Order) -> None:
        try:
            self._connection.send(order)
        except OSError:  # it has just ended, which its sentinel tells
            self._open = False


def run_training(connection: Connection, task: Task, log_path: str, environment: dict[str, str]) -> None:
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
    link = AgentLink(connection, _make_activity(connection, task))
    try:
        task = take_place(task)
        fork_server.resolve(task.entry)(link, task)
    except Exception as error:  # the last door of the process: whatever is not told here, nobody hears of
        traceback.print_exc()
        link.send(_last_words(error))
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


def _last_words(error: Exception) -> Failed:
    """What the driver is told of the exception that ends a training process."""
    if not isinstance(error, LauncherError):  # the entry lets no other out: it is what it needs of its host
        what = f"cannot train on this host: {type(error).__name__}: {one_line(error)}"
        error = ClusterError(what, cause="environment", step=0)
    return Failed(
        error=type(error).__name__,
        cause=error.cause,
        message=str(error),
        step=error.step,
        place=error.place,
        traceback=error.traceback,
    )


def _state_of(pid: int | None) -> str:
    """What Linux says of a process that says nothing itself, such as ``State: T (stopped)``."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # no Linux, or just ended
        return ""
    return next((line for line in lines if line.startswith("State")), "")
