"""The worker group: one agent per worker on Ray Train, and the messages between agents and driver.

Ray Train places, starts, watches and replaces the agents. It learns nothing of steps and checkpoints, because
``ray.train.report`` is a barrier of all workers, and a damaged checkpoint record of Ray Train's can keep a run from
starting.
"""

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from cluster.capacity import Node, Places
from cluster.errors import ClusterError
from cluster.host.temporary_folder import in_temporary_folder
from cluster.process import fork_server
from cluster.process.agent import Agent, modules_of
from cluster.process.messages import ToDriver
from cluster.process.orders import Orders, Task
from cluster.ray.cluster import actor_on, last_line
from cluster.ray.fork_servers import host_on, server_here
from cluster.ray.policies import Wanted, own_generation, steered_trainer
from cluster.ray.session_folder import logs_path

_ORDERS_WAIT_S = 30.0
_RETRY_INTERVAL_S = 1.0


class WorkerGroup:
    """The driver's handle of the agents of a run.

    Thread: the driver's alone.
    """

    def __init__(self, entry: str, places: Places, hosts: dict[str, Any], *, is_shared: bool, may_grow: bool) -> None:
        """Start Ray Train's controller, which waits until the driver says how many agents to start.

        Args:
            entry: The entry of each training process, see ``Task``.
            places: What the workers may reserve. Ray places all agents or none, and treats the placement as a
                preference: a strict spread over too few nodes would wait without end. A label keeps agents off the
                nodes that must hold none, whatever the placement.
            hosts: The actors that keep fork servers on nodes, by node id; a server lives as long as its actor is in
                here.
            is_shared: Others may use the cluster too, and it may have an autoscaler.
            may_grow: The cluster is known to have an autoscaler.
        """
        import ray
        from ray.train import RunConfig, ScalingConfig

        self.resources = places.resources
        self.is_shared = is_shared
        self.may_grow = may_grow
        self._task: Task
        self._modules = modules_of(entry)
        self._hosts = hosts
        self._here = here = ray.get_runtime_context().get_node_id()
        self._forks_here = False
        """Agents may live on the driver's node, and fork from the server of this process."""
        # On the driver's node, so that it is not lost with a node that holds only workers.
        self._switchboard: Any = actor_on(here, _Switchboard).remote()
        self._orders = Orders()
        self._wanted = Wanted()
        self._error: BaseException | None = None
        with in_temporary_folder():
            self._bookkeeping = tempfile.TemporaryDirectory(prefix="launcher-ray-train-", ignore_cleanup_errors=True)
        trainer = steered_trainer(self._switchboard)(
            _run_agent,
            train_loop_config={"switchboard": self._switchboard, "driver_node": here},
            scaling_config=ScalingConfig(
                num_workers=places.most,  # the steering policy says how many to start at a time
                use_gpu=places.resources.gpus > 0,
                resources_per_worker=places.resources.amounts(),
                placement_strategy=places.placement.upper(),
            ),
            run_config=RunConfig(name="agents", storage_path=self._bookkeeping.name),
        )
        self._fit = threading.Thread(target=self._run_fit, args=(trainer,), name="ray-train", daemon=True)
        self._fit.start()

    def assign(self, task: Task) -> None:
        """Set the task of all agents, and start to ask an autoscaler for room. Call it before ``start``.

        Args:
            task: The task; each agent fills in rank, world size and fork server.

        Raises:
            ClusterError: Ray is gone.
        """
        self._task = task
        if self.is_shared:
            self._wanted = replace(self._wanted, is_asked_for=True)
            self._ask(self._switchboard.set_wanted, self._wanted)

    def prepare(self, nodes: Sequence[Node]) -> None:
        """Start fork servers on nodes, so that training processes find their modules imported.

        Call it as soon as a node may hold an agent. An autoscaler keeps such a node until the run ends or ``release``
        frees it.
        """
        for node in nodes:
            if not node.most(self.resources):
                continue
            if node.id != self._here and node.id not in self._hosts:
                self._hosts[node.id] = host_on(node.id, self._modules)
            elif node.id == self._here and not self._forks_here:
                self._forks_here = True
                fork_server.start(self._modules)

    def release(self, others_than: frozenset[str]) -> None:
        """End the fork servers on all other nodes than these, by id, so that an autoscaler may remove those nodes."""
        if self.may_grow:
            for node in self._hosts.keys() - others_than:
                del self._hosts[node]

    def start(self, num_workers: int, without: frozenset[str]) -> int:
        """Start new agents in place of the present ones; each sends a ``Hello`` when it has started.

        Args:
            num_workers: The number of agents; 0: the present ones end, and release their resources.
            without: The ids of nodes that must hold no agents.

        Returns:
            The generation of the new agents, which is in each ``Hello`` and in each message of Ray Train about them.

        Raises:
            ClusterError: Ray is gone.
        """
        self._orders = replace(self._orders, version=self._orders.version + 1, attempt=None, meeting_port=None)
        self._ask(self._switchboard.set_orders, self._orders)
        # Not as an argument of the training function: Ray displays those, and a description may hold secrets from the
        # environment. And at every start, because the address of the fork server may have changed.
        self._ask(self._switchboard.set_task, replace(self._task, fork_server=self._server_here()))
        generation = self._wanted.generation + 1
        self._wanted = replace(self._wanted, generation=generation, num_workers=num_workers, without=without)
        self._ask(self._switchboard.set_wanted, self._wanted)
        return self._wanted.generation

    def messages(self, timeout_s: float) -> list[ToDriver]:
        """Return the messages of agents and of Ray Train's controller since the last call, in order for each sender.

        Wait up to ``timeout_s`` for the first one.

        Raises:
            ClusterError: Ray Train's controller has ended, or Ray is gone.
        """
        messages: list[ToDriver] = self._ask(self._switchboard.take, timeout_s)
        if not messages and self._error is not None:
            raise ClusterError(f"Ray lost the workers: {last_line(self._error)}") from self._error
        return messages

    def order(self, **changes: Any) -> None:
        """Change fields of the orders, for all agents.

        Raises:
            ClusterError: Ray is gone.
        """
        self._orders = replace(self._orders, version=self._orders.version + 1, **changes)
        self._ask(self._switchboard.set_orders, self._orders)

    def close(self, timeout_s: float = 30.0) -> None:
        """End the agents and their processes, and wait for that."""
        with suppress(ClusterError):  # Ray is gone, and the agents with it
            self.order(end=True)
            self._ask(self._switchboard.set_wanted, replace(self._wanted, is_over=True))
        self._fit.join(timeout_s)
        self._bookkeeping.cleanup()

    def _server_here(self) -> str | None:
        """Return the address of this process's fork server; None: no agents live here, or others cannot use it."""
        if not self._forks_here:
            return None
        fork_server.start(self._modules)  # replace it if it has died
        return fork_server.own_address()

    def _ask(self, method: Any, argument: Any) -> Any:
        import ray

        try:
            return ray.get(method.remote(argument))
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray is gone: {last_line(error)}; see {logs_path()}") from error

    def _run_fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except Exception as error:  # the outermost border of the thread; ``messages`` raises it in the driver's
            self._error = error


class _Switchboard:
    """Ray actor between driver, agents and Ray Train's controller.

    It queues messages to the driver, and holds the newest task, orders and ``Wanted`` from it.
    """

    def __init__(self) -> None:
        import asyncio

        self._messages: list[ToDriver] = []
        self._task: Task
        self._orders = Orders()
        self._wanted = Wanted()
        self._changed = asyncio.Condition()

    async def post(self, messages: list[ToDriver]) -> None:
        async with self._changed:
            self._messages += messages
            self._changed.notify_all()

    async def post_of_controller(self, messages: list[ToDriver]) -> bool:
        """Queue messages of the controller, and return whether the run is over."""
        await self.post(messages)
        return self._wanted.is_over

    async def take(self, timeout_s: float) -> list[ToDriver]:
        await self._wait(lambda: bool(self._messages), timeout_s)
        messages, self._messages = self._messages, []
        return messages

    async def set_task(self, task: Task) -> None:
        self._task = task

    async def task(self) -> Task:
        return self._task

    async def set_orders(self, orders: Orders) -> None:
        async with self._changed:
            self._orders = orders
            self._changed.notify_all()

    async def orders_after(self, version: int, timeout_s: float) -> Orders:
        await self._wait(lambda: self._orders.version > version, timeout_s)
        return self._orders

    async def set_wanted(self, wanted: Wanted) -> None:
        async with self._changed:
            self._wanted = wanted
            self._changed.notify_all()

    async def wanted_after(self, generation: int, timeout_s: float) -> Wanted:
        await self._wait(lambda: self._wanted.generation > generation or self._wanted.is_over, timeout_s)
        return self._wanted

    async def _wait(self, condition: Any, timeout_s: float) -> None:
        import asyncio

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(condition), timeout_s)
            except TimeoutError:
                return


class _RayChannel:
    """An agent's ``Channel``: each post is acknowledged before the next one is sent, which keeps their order."""

    def __init__(self, switchboard: Any) -> None:
        self._switchboard = switchboard

    def post(self, messages: Sequence[ToDriver]) -> None:
        import ray

        ray.get(self._switchboard.post.remote(messages))

    def orders_after(self, version: int) -> Orders:
        import ray

        while True:
            try:
                orders: Orders = ray.get(self._switchboard.orders_after.remote(version, _ORDERS_WAIT_S))
            except ray.exceptions.ActorUnavailableError:  # the connection was reset; a dead actor is another error
                time.sleep(_RETRY_INTERVAL_S)
                continue
            if orders.version > version:
                return orders


def _run_agent(config: Mapping[str, Any]) -> None:
    """Run one agent; Ray Train calls this in each of its workers."""
    import ray
    import ray.train

    here, worker = ray.train.get_context(), ray.get_runtime_context()
    task: Task = ray.get(config["switchboard"].task.remote())
    task = replace(
        task,
        rank=here.get_world_rank(),
        world_size=here.get_world_size(),
        on_gpu=bool(ray.get_gpu_ids()),
        # ``server_here`` returns None on a new node without a host actor.
        fork_server=task.fork_server if worker.get_node_id() == config["driver_node"] else server_here(),
    )
    agent = Agent(
        _RayChannel(config["switchboard"]),
        task,
        generation=own_generation(),
        node=worker.get_node_id(),
        address=ray.util.get_node_ip_address(),
    )
    agent.run()
