"""Ray Train: runs one agent per worker, and carries messages between agents and driver.

Ray Train places, starts, watches and replaces the agents. It is told nothing of checkpoints and steps: its reports
are a barrier of all workers, and its own bookkeeping of checkpoints can make a run unstartable.
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
from cluster.process import fork_server
from cluster.process.agent import Agent, modules_of
from cluster.process.messages import ToDriver
from cluster.process.orders import Orders, Task
from cluster.ray.cluster import actor_on, last_line
from cluster.ray.fork_servers import host_on, server_here
from cluster.ray.policies import Wanted, own_generation, steered_trainer

_ORDERS_WAIT_S = 30.0
_RETRY_INTERVAL_S = 1.0


class WorkerGroup:
    """The agents of a run and the way to them, as the driver sees it.

    Every method is for the driver's thread alone.
    """

    def __init__(self, entry: str, places: Places, hosts: dict[str, Any], *, is_shared: bool, may_grow: bool) -> None:
        """Starts Ray Train's controller, which waits to be told how many agents to start.

        Args:
            entry: What each worker will run, see ``Task``.
            places: What they may have. Ray places agents all together or not at all, and takes the placement as a wish:
                strictly spread agents that have too few nodes would be waited for without end. Nodes that are to hold
                none are kept free of them by a label, whatever is wished.
            hosts: What keeps fork servers on nodes, by their ids: they live as long as it is in there.
            is_shared: Others may use the cluster too, and it may have an autoscaler.
            may_grow: It is known to have one.
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
        """Agents may live beside the driver, and fork from the server of this process."""
        # Where the driver lives: it must not be lost with a node that only works.
        self._switchboard: Any = actor_on(here, _Switchboard).remote()
        self._orders = Orders()
        self._wanted = Wanted()
        self._error: BaseException | None = None
        self._bookkeeping = tempfile.TemporaryDirectory(prefix="launcher-ray-train-", ignore_cleanup_errors=True)
        trainer = steered_trainer(self._switchboard)(
            _run_agent,
            train_loop_config={"switchboard": self._switchboard, "driver_node": here},
            scaling_config=ScalingConfig(
                num_workers=places.most,  # how many there are at a time is told by the steering policy
                use_gpu=places.resources.gpus > 0,
                resources_per_worker=places.resources.amounts(),
                placement_strategy=places.placement.upper(),
            ),
            run_config=RunConfig(name="agents", storage_path=self._bookkeeping.name),
        )
        self._fit = threading.Thread(target=self._run_fit, args=(trainer,), name="ray-train", daemon=True)
        self._fit.start()

    def assign(self, task: Task) -> None:
        """Says what each agent is told; from now on an autoscaler is asked for room. Must be called before ``start``.

        Args:
            task: Rank, world size and fork server are filled in.

        Raises:
            ClusterError: Ray is gone.
        """
        self._task = task
        if self.is_shared:
            self._wanted = replace(self._wanted, is_asked_for=True)
            self._ask(self._switchboard.set_wanted, self._wanted)

    def prepare(self, nodes: Sequence[Node]) -> None:
        """Has nodes import ahead what training processes need; to be told of a node as soon as it may hold an agent.

        No autoscaler takes such a node away, until the run ends or the node is released.
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
        """Keeps nothing on nodes that an autoscaler may take away, other than these, by id."""
        if self.may_grow:
            for node in self._hosts.keys() - others_than:
                del self._hosts[node]

    def start(self, num_workers: int, without: frozenset[str]) -> int:
        """Starts so many agents in place of those there are; they say ``hello`` when they are there.

        Args:
            num_workers: How many; 0: those there are end, and let go of their room.
            without: The nodes, by id, that are to hold none.

        Returns:
            Their generation, which they say with ``hello``, and Ray Train with all that it says of them.

        Raises:
            ClusterError: Ray is gone.
        """
        self._orders = replace(self._orders, version=self._orders.version + 1, attempt=None, meeting_port=None)
        self._ask(self._switchboard.set_orders, self._orders)
        # Not with the training function: Ray shows what that is given, and a description may have taken secrets
        # from the environment. And not once for all: the server to fork from may be another by now.
        self._ask(self._switchboard.set_task, replace(self._task, fork_server=self._server_here()))
        generation = self._wanted.generation + 1
        self._wanted = replace(self._wanted, generation=generation, num_workers=num_workers, without=without)
        self._ask(self._switchboard.set_wanted, self._wanted)
        return self._wanted.generation

    def messages(self, timeout_s: float) -> list[ToDriver]:
        """The agents' messages since the last call, in order for each agent; waits up to ``timeout_s`` for one.

        Among them are those of Ray Train's controller.

        Raises:
            ClusterError: Ray Train has given up on the agents.
        """
        messages = self._ask(self._switchboard.take, timeout_s)
        if not messages and self._error is not None:
            raise ClusterError(f"Ray lost the workers: {last_line(self._error)}") from self._error
        return messages

    def order(self, **changes: Any) -> None:
        """Changes the orders of all agents.

        Raises:
            ClusterError: Ray is gone.
        """
        self._orders = replace(self._orders, version=self._orders.version + 1, **changes)
        self._ask(self._switchboard.set_orders, self._orders)

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends the agents and their processes, and waits for that."""
        with suppress(ClusterError):  # they end with Ray
            self.order(end=True)
            self._ask(self._switchboard.set_wanted, replace(self._wanted, is_over=True))
        self._fit.join(timeout_s)
        self._bookkeeping.cleanup()

    def _server_here(self) -> str | None:
        """The address of this process's server; None: no agents live here, or others cannot use it."""
        if not self._forks_here:
            return None
        fork_server.start(self._modules)  # another one, if it has died
        return fork_server.own_address()

    def _ask(self, method: Any, argument: Any) -> Any:
        import ray

        try:
            return ray.get(method.remote(argument))
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray is gone: {last_line(error)}; see /tmp/ray/session_latest/logs") from error

    def _run_fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except Exception as error:  # the driver's thread raises it as its own, in one line
            self._error = error


class _Switchboard:
    """An actor between driver, agents and Ray Train's controller: messages one way, the newest wishes the other."""

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
        """Returns whether the run is over."""
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
    """The agent's channel: each message is acknowledged before the next leaves, which keeps their order."""

    def __init__(self, switchboard: Any) -> None:
        self._switchboard = switchboard

    def post(self, messages: Sequence[ToDriver]) -> None:
        import ray

        ray.get(self._switchboard.post.remote(messages))

    def orders_after(self, version: int) -> Orders:
        import ray

        while True:
            try:
                orders = ray.get(self._switchboard.orders_after.remote(version, _ORDERS_WAIT_S))
            except ray.exceptions.ActorUnavailableError:  # a connection was reset; if the actor is dead, that is told
                time.sleep(_RETRY_INTERVAL_S)
                continue
            if orders.version > version:
                return orders


def _run_agent(config: Mapping[str, Any]) -> None:
    """Ray Train's training function."""
    import ray
    import ray.train

    here, worker = ray.train.get_context(), ray.get_runtime_context()
    task: Task = ray.get(config["switchboard"].task.remote())
    task = replace(
        task,
        rank=here.get_world_rank(),
        world_size=here.get_world_size(),
        on_gpu=bool(ray.get_gpu_ids()),
        # None on a node that is new, and has no host yet.
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
