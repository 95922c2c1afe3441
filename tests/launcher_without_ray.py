"""The command line without Ray: ``python -m tests.launcher_without_ray run JOB ...`` is ``launcher run JOB ...``.

Agents are processes that the driver starts and not workers of Ray Train, and all commands of a test process fork from
one server, which has torch and matplotlib imported; it draws their pictures. Nothing else is replaced: driver, agents,
training processes, store and tracker are the product's own, so a run takes seconds and can be killed, stopped, cut off
from its store and resumed like any other. Importing Ray into the driver is an error, and so is torch, which costs it
seconds and 350 MB. What is submitted goes to the processes of ``tests.schedulers``.
"""

import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cluster.capacity import Node, Places, WorkerResources
from cluster.errors import StorageError
from cluster.kinds.cluster import Cluster
from cluster.process import fork_server
from cluster.process.agent import Agent, modules_of
from cluster.process.messages import ToDriver
from cluster.process.orders import Orders, Task
from cluster.process.placement_messages import AgentsLost, AgentsPlaced
from cluster.process.workplace import Call, call_here
from cluster.scheduler import ClusterReport, Needs
from tests.schedulers import FOLDER_VARIABLE, LocalScheduler, a_cluster, answered

_ADDRESS = "127.0.0.1"
_SERVER = "LAUNCHER_TEST_FORK_SERVER"
_HAS_TORCH = 70
"""The exit code of a driver that has imported torch; nothing else ends with it."""


def environment() -> dict[str, str]:
    """What this command line needs in its environment; starts the server to fork from, once in a process."""
    fork_server.start([__name__])
    address = fork_server.own_address()
    return {} if address is None else {_SERVER: address}


class Machine(Cluster):
    """This machine as a cluster of one node, in place of ``LocalRay``."""

    is_this_machine = True

    def __init__(self, num_cpus: int) -> None:
        self._num_cpus = num_cpus
        self._group: ProcessGroup | None = None

    def joined(self) -> AbstractContextManager[None]:
        return nullcontext()

    def import_ahead(self) -> None:
        pass

    def capacity(self) -> None:
        return None

    def inspect(self, needs: Needs) -> ClusterReport:
        with suppress(StorageError):  # of a job that was held, whose submitter waits for no report
            answered(a_cluster(), needs)
        return a_cluster()

    def call(self, call: Call, tell: Callable[[str], None]) -> Any:
        return call_here(call, tell)

    def started(self) -> AbstractContextManager[None]:
        return nullcontext()

    def nodes(self) -> list[Node]:
        reserved = self._group.num_placed * self._group.resources.cpus if self._group else 0.0
        return [
            Node(
                id=_ADDRESS,
                address=_ADDRESS,
                resources={"CPU": self._num_cpus},
                free={"CPU": self._num_cpus - reserved},
                drains_at=None,
                is_here=True,
            )
        ]

    def prepare_group(self, entry: str, places: Places) -> None:
        pass

    def group(self, task: Task, places: Places) -> Any:
        self._group = ProcessGroup(task, places.resources)
        return self._group


@dataclass
class _Worker:
    """An agent, as the driver's process holds it."""

    process: BaseProcess
    messages: Connection
    orders: Connection
    is_wanted: bool = True


class ProcessGroup:
    """Stands in for ``WorkerGroup``: the same methods with the same meaning, and the same messages of lost agents."""

    is_shared = may_grow = False

    def __init__(self, task: Task, resources: WorkerResources) -> None:
        self.resources = resources
        self.num_placed = 0
        """The agents that hold a place."""
        self._task = task
        self._generation = 0
        self._orders = Orders()
        self._workers: list[_Worker] = []
        self._inbox: queue.SimpleQueue[list[ToDriver]] = queue.SimpleQueue()
        self._changing = threading.Lock()  # whether workers are wanted

    def prepare(self, nodes: Sequence[Node]) -> None:
        """The only node is the driver's, whose fork server is the driver's own."""

    def release(self, others_than: frozenset[str]) -> None:
        """No node is taken away."""

    def start(self, num_workers: int, without: frozenset[str]) -> int:  # noqa: ARG002  # as WorkerGroup
        self._orders = replace(self._orders, version=self._orders.version + 1, attempt=None, meeting_port=None)
        self._end_all()
        self._generation += 1  # nothing is said any more of the one before
        fork_server.start(modules_of(self._task.entry))  # another server, if that of this process has died
        self._task = replace(self._task, fork_server=fork_server.own_address())
        self._workers = [self._started(rank, num_workers) for rank in range(num_workers)]
        self._place(num_workers)
        for rank, worker in enumerate(self._workers):
            threading.Thread(target=self._hear, args=(rank, worker), daemon=True).start()
        return self._generation

    def messages(self, timeout_s: float) -> list[ToDriver]:
        try:
            messages = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return []
        while not self._inbox.empty():
            messages += self._inbox.get()
        return messages

    def order(self, **changes: Any) -> None:
        self._orders = replace(self._orders, version=self._orders.version + 1, **changes)
        for worker in self._workers:
            with suppress(OSError):  # it has just died
                worker.orders.send(self._orders)

    def close(self, timeout_s: float = 30.0) -> None:
        for worker in self._workers:
            worker.is_wanted = False
        self.order(end=True)
        for worker in self._workers:
            worker.process.join(timeout_s)
        self._end_all()

    def _started(self, rank: int, num_workers: int) -> _Worker:
        messages, their_messages = multiprocessing.Pipe(duplex=False)
        their_orders, orders = multiprocessing.Pipe(duplex=False)
        orders.send(self._orders)
        task = replace(self._task, rank=rank, world_size=num_workers)
        process = fork_server.fork(_run_agent, (their_messages, their_orders, task, self._generation), f"agent-{rank}")
        their_messages.close()
        their_orders.close()
        return _Worker(process, messages, orders)

    def _hear(self, rank: int, worker: _Worker) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._inbox.put(worker.messages.recv())
        worker.process.join()
        with self._changing:
            if worker.is_wanted:
                self._place(0)
                what = f"its process ended with exit code {worker.process.exitcode}"
                self._inbox.put([AgentsLost(generation=self._generation, lost={rank: what}, reason="")])

    def _place(self, num_workers: int) -> None:
        self.num_placed = num_workers
        self._inbox.put([AgentsPlaced(generation=self._generation, nodes=[_ADDRESS] * num_workers)])

    def _end_all(self) -> None:
        with self._changing:
            for worker in self._workers:
                worker.is_wanted = False
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.orders.close()
        self._workers = []


class _PipeChannel:
    """The agent's channel."""

    def __init__(self, messages: Connection, orders: Connection) -> None:
        self._messages = messages
        self._orders = orders
        self._sending = threading.Lock()

    def post(self, messages: Sequence[ToDriver]) -> None:
        with self._sending:
            self._messages.send(messages)

    def orders_after(self, version: int) -> Orders:
        while True:
            orders = self._orders.recv()
            if orders.version > version:
                return orders


def _run_agent(messages: Connection, orders: Connection, task: Task, generation: int) -> None:
    channel = _PipeChannel(messages, orders)
    Agent(channel, task, generation=generation, node=_ADDRESS, address=_ADDRESS).run()


def _use_server(address: str) -> None:
    """Forks from a server that is there already, in this process and in those that are forked."""
    fork = fork_server.fork

    def fork_with_server(target: Callable[..., None], args: tuple[Any, ...], name: str) -> BaseProcess:
        return fork(_call_with_server, (address, target, args), name)

    replaced: Any = fork_server
    replaced.start = lambda modules: fork_server.use(address, modules)
    replaced.fork = fork_with_server


def _call_with_server(address: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    _use_server(address)
    target(*args)


def main() -> None:
    if _SERVER in os.environ:
        _use_server(os.environ[_SERVER])
    sys.modules["ray"] = None  # type: ignore[assignment]  # whoever imports it gets an ImportError
    from launcher.cli import main as launcher
    from launcher.config import clusters
    from launcher.runs import driving
    from launcher.submission import standby_handover

    replaced: Any = clusters
    replaced.LocalRay = Machine
    if FOLDER_VARIABLE in os.environ:
        scheduler = LocalScheduler(Path(os.environ[FOLDER_VARIABLE]))
        replaced.open_scheduler = lambda _: scheduler
        if scheduler.is_held:  # then no job tells that it has found its submission
            replaced = standby_handover
            replaced._TAKE_UP_S = 0.0
    replaced = driving
    replaced.draw = partial(fork_server.call, "launcher.display.plots:draw")
    try:
        launcher()
    finally:
        if "torch" in sys.modules:
            print("error: the driver has imported torch", file=sys.stderr, flush=True)
            os._exit(_HAS_TORCH)


if __name__ == "__main__":
    main()
