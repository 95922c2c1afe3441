"""The agent: what runs inside a Ray Train worker. It trains nothing; it starts and watches the process that does.

It passes the training process's reports to the driver and the driver's orders to the training process, keeps what that
printed, and starts another one when the driver says so.
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
"""How often an agent says that it is there."""
_WATCH_INTERVAL_S = 1.0
_LOG_INTERVAL_S = 20.0
_LAST_LOG_S = 10.0
"""How long the end of a run waits for the last log to be kept."""


class Channel(Protocol):
    """The way between agents and the driver."""

    def post(self, messages: Sequence[ToDriver]) -> None:
        """Sends messages to the driver; they arrive in order."""

    def orders_after(self, version: int) -> Orders:
        """Waits for orders newer than ``version``."""


class Agent:
    """Keeps one training process going, as the driver orders."""

    def __init__(self, channel: Channel, task: Task, *, generation: int, node: str, address: str) -> None:
        """Only assigns.

        Args:
            channel: The way to the driver.
            task: What the training processes are to do; attempt, host and address follow from the orders.
            generation: Of the agents that were started together with this one.
            node: The id of this agent's node.
            address: The address of its node.
        """
        self._channel = channel
        self._task = task
        self._hello = Hello(
            rank=task.rank, id=uuid.uuid4().hex, generation=generation, node=node, address=address, pid=os.getpid()
        )
        self._run = RunDirectory(task.run_url)
        self._orders = Orders()
        self._deaf: Exception | None = None
        self._child: TrainingProcess | None = None
        self._logs = ThreadPoolExecutor(1, thread_name_prefix="logs")  # a store that hangs must not silence the agent
        self._keeps_logs = True
        self._keeping: Future[None] | None = None

    def run(self) -> None:
        """Follows orders until they say that the run is over."""
        fork_from(self._task.fork_server, modules_of(self._task.entry))
        self._channel.post([self._hello])
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
                    self._channel.post([StillHere(self._hello.rank, self._hello.id)])
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
        if orders.attempt is None or self._hello.id not in orders.agents:  # other agents take over
            self._end_child()
            return
        if self._child is None or self._child.task.attempt != orders.attempt:
            self._end_child()
            address = LOOPBACK if orders.host == LOOPBACK else self._hello.address
            task = replace(self._task, attempt=orders.attempt, host=orders.host, address=address)
            self._child = TrainingProcess(task)
        if orders.meeting_port is not None:
            self._child.tell_meeting_place(orders.host, orders.meeting_port)
        if orders.stop:
            self._child.tell_stop()

    def _attend(self, child: TrainingProcess) -> None:
        """Passes on what the process said, keeps its log, and reports its end, once."""
        reports: list[Report] = [*child.reports(), *child.news_of_time()]
        child.oom_kills.look()
        if child.has_ended() and not child.end_reported:
            reports += child.reports()
            self._keep_log(child)
            reports.append(child.end())
            child.end_reported = True
        elif (news := child.news_of_progress()) is not None:
            reports.append(news)
        elif time.monotonic() - child.log_kept_at > _LOG_INTERVAL_S and (not self._keeping or self._keeping.done()):
            self._keep_log(child)
        if reports:
            self._channel.post([FromWorker(child.task.rank, child.task.attempt, report) for report in reports])

    def _keep_log(self, child: TrainingProcess) -> None:
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
                self._channel.post([LogNotKept(rank, str(error))])
            self._keeps_logs = False
        else:
            self._keeps_logs = True


def modules_of(entry: str) -> list[str]:
    """What a fork server should import ahead for training processes with this entry."""
    return [entry.partition(":")[0], __name__]
