"""The agent: the process of a Ray Train worker. It forks and watches the training process, and trains nothing itself.

It passes reports from the training process to the driver and orders from the driver to the training process, uploads
the log of the training process, and starts another one when the driver orders it.
"""

import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Protocol

from cluster.errors import ClusterError, StorageError
from cluster.process.messages import FromWorker, Hello, LogNotKept, Report, StillHere, ToDriver
from cluster.process.orders import LOOPBACK, Orders, Task
from cluster.process.training_process import TrainingProcess
from cluster.process.workplace import fork_from
from cluster.run.run_directory import RunDirectory

HERE_INTERVAL_S = 5.0
"""Interval of the heartbeats from an agent to the driver."""
_WATCH_INTERVAL_S = 1.0
_LOG_INTERVAL_S = 20.0
_LAST_LOG_S = 10.0
"""Time limit for the last log upload at the end of a run."""
_LAST_KILL_S = 10.0
"""Time limit for the end of the training process at the end of a run."""
_UNKILLABLE_AFTER_S = 30.0
"""How long a killed process may take to end: a GPU takes 1 to 3 seconds, and much pinned memory some more."""


class Channel(Protocol):
    """The connection of an agent to the driver.

    Thread: any; the agent calls ``post`` from two threads and ``orders_after`` from a third one.
    """

    def post(self, messages: Sequence[ToDriver]) -> None:
        """Send messages to the driver; they arrive in order."""

    def orders_after(self, version: int) -> Orders:
        """Wait for orders newer than ``version``, and return them."""


class Agent:
    """Runs one training process at a time, as the driver orders."""

    def __init__(self, channel: Channel, task: Task, *, generation: int, node: str, address: str) -> None:
        """Only assigns.

        Args:
            channel: The connection to the driver.
            task: What each training process runs; the orders decide its attempt, host and address.
            generation: The generation of agents that this one was started with.
            node: The id of this agent's node.
            address: The address of this agent's node.
        """
        self._channel = channel
        self._task = task
        self._hello = Hello(
            rank=task.rank,
            id=uuid.uuid4().hex,
            generation=generation,
            node=node,
            address=address,
            pid=os.getpid(),
            gpu=os.environ.get("CUDA_VISIBLE_DEVICES", "") if task.on_gpu else "",
        )
        self._run = RunDirectory(task.run_url)
        self._orders = Orders()
        self._listen_error: Exception | None = None
        self._child: TrainingProcess | None = None
        self._unkillable_reported = False
        """Whether the driver knows that the killed child does not end."""
        self._logs = ThreadPoolExecutor(1, thread_name_prefix="logs")  # a store that hangs must not block heartbeats
        self._logs_are_kept = True
        self._log_upload: Future[None] | None = None

    def run(self) -> None:
        """Follow the driver's orders until they end the run.

        Raises:
            ClusterError: The driver's orders no longer arrive.
        """
        fork_from(self._task.fork_server, modules_of(self._task.entry))
        self._channel.post([self._hello])
        heartbeat_at = time.monotonic()
        arrived, sender = multiprocessing.Pipe(duplex=False)
        threading.Thread(target=self._listen, args=(sender,), name="orders", daemon=True).start()
        try:
            while not self._orders.end:
                sources = [arrived, *(self._child.sources() if self._child else [])]
                ready = wait(sources, timeout=_WATCH_INTERVAL_S)
                if self._child is not None and self._child.killed_at is None:
                    self._report_on(self._child)
                if arrived in ready:
                    self._orders = self._next_orders(arrived)
                self._follow(self._orders)
                if time.monotonic() - heartbeat_at > HERE_INTERVAL_S:
                    heartbeat_at = time.monotonic()
                    self._channel.post([StillHere(self._hello.rank, self._hello.id)])
        finally:
            self._end_child(_LAST_KILL_S)
            if self._log_upload is not None:
                wait_for([self._log_upload], _LAST_LOG_S)

    def _end_child(self, limit_s: float) -> bool:
        """Kill the training process if there is one; return whether it has ended, within ``limit_s`` seconds.

        Tell the driver, once, of a process that does not end.
        """
        child = self._child
        if child is None:
            return True
        if not child.kill(limit_s):
            report = child.unkillable(self._hello)
            if report.for_s >= _UNKILLABLE_AFTER_S and not self._unkillable_reported:
                self._unkillable_reported = True
                self._channel.post([report])
            return False
        self._upload_log(child)
        child.discard_files()
        self._child, self._unkillable_reported = None, False
        return True

    def _listen(self, sender: Connection) -> None:
        """Pass each new version of the orders to the main thread. Thread: ``orders``."""
        try:
            orders = self._channel.orders_after(-1)
            while not orders.end:
                sender.send(orders)
                orders = self._channel.orders_after(orders.version)
            sender.send(orders)
        except Exception as error:  # the outermost border of the thread; ``_next_orders`` raises it
            self._listen_error = error
        sender.close()

    def _next_orders(self, arrived: Connection) -> Orders:
        """Return the next orders.

        Raises:
            ClusterError: No more orders will arrive. The agent must end then: with heartbeats but without orders, the
                driver would never replace it.
        """
        try:
            orders: Orders = arrived.recv()
        except EOFError:
            error = self._listen_error
            raise ClusterError(f"the driver's orders do not come any more: {error}") from error
        return orders

    def _follow(self, orders: Orders) -> None:
        """Start, end or message the training process, so that it does what the orders say; repeated until it does.

        No process starts before the one before it has ended, which may hold the GPU.
        """
        if orders.end:
            return
        attempt = orders.attempt if self._hello.id in orders.agents else None  # else other agents run the attempt
        is_current = self._child is not None and self._child.task.attempt == attempt
        if not is_current and not self._end_child(_WATCH_INTERVAL_S):
            return
        if attempt is None:
            return
        if self._child is None:
            address = LOOPBACK if orders.host == LOOPBACK else self._hello.address
            task = replace(self._task, attempt=attempt, host=orders.host, address=address)
            self._child = TrainingProcess(task)
        if orders.meeting_port is not None:
            self._child.tell_meeting_place(orders.host, orders.meeting_port)
        if orders.stop:
            self._child.tell_stop()

    def _report_on(self, child: TrainingProcess) -> None:
        """Forward the process's reports to the driver, upload its log at intervals, and report its end once."""
        reports: list[Report] = [*child.reports(), *child.time_reports()]
        child.oom_kills.look()
        if child.has_ended() and not child.end_reported:
            reports += child.reports()
            self._upload_log(child)
            reports.append(child.end())
            child.end_reported = True
        elif (report := child.progress_report()) is not None:
            reports.append(report)
        elif time.monotonic() - child.log_kept_at > _LOG_INTERVAL_S and (
            self._log_upload is None or self._log_upload.done()
        ):
            self._upload_log(child)
        if reports:
            self._channel.post([FromWorker(child.task.rank, child.task.attempt, report) for report in reports])

    def _upload_log(self, child: TrainingProcess) -> None:
        """Start the upload of the process's log to the run directory; a store that fails here must not end the run."""
        child.log_kept_at = time.monotonic()
        log = child.log()
        if log:
            self._log_upload = self._logs.submit(self._write_log, child.task.attempt, child.task.rank, log)

    def _write_log(self, attempt: int, rank: int, log: bytes) -> None:
        """Write the log, and report the first of several failures in a row. Thread: ``logs``."""
        try:
            self._run.write_log(attempt, rank, log)
        except StorageError as error:
            if self._logs_are_kept:
                self._channel.post([LogNotKept(rank, str(error))])
            self._logs_are_kept = False
        else:
            self._logs_are_kept = True


def modules_of(entry: str) -> list[str]:
    """Return the modules that a fork server preloads for training processes with this entry."""
    return [entry.partition(":")[0], __name__]
