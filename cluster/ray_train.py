"""Ray: the only module that imports it. Starts or joins a cluster, and runs one agent per worker with Ray Train.

Ray Train places, starts, watches and replaces the agents; how many there are, and when they are replaced, is for
the driver to say, and Ray Train's controller asks it. It is told nothing of checkpoints and steps: its reports are
a barrier of all workers, and its own bookkeeping of checkpoints can make a run unstartable.
"""

import importlib
import logging
import math
import os
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from cluster import fork_server
from cluster.agent import Agent, Orders, Task, modules_of
from cluster.errors import ClusterError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

# Set before Ray is imported, for it reads them then. Ray Train passes its own on to its actors.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the default of 2 s adds 8 s to the shortest run
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process, and the driver looks for itself
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # then the driver is asked again: what was free may be taken
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences advice about a default that will change
}
_OBJECT_STORE_BYTES = 100 * 2**20
_ORDERS_WAIT_S = 30.0
_CONTROLLER_WAIT_S = 0.5
_CONNECT_TIMEOUT_S = 10.0
_ROUNDING = 1e-6
_joined = threading.Event()


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResources:
    """What each worker reserves."""

    cpus: float
    gpus: int
    accelerator: str | None

    def __str__(self) -> str:
        return ", ".join(f"{each:g} {name}" for name, each in self.as_ray_names_them().items())

    def as_ray_names_them(self) -> dict[str, float]:
        gpus = {"GPU": float(self.gpus)} if self.gpus else {}
        # Ray makes a little of this resource on each node that has the accelerator.
        return {
            "CPU": self.cpus,
            **gpus,
            **({f"accelerator_type:{self.accelerator}": 0.001} if self.accelerator else {}),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    address: str
    resources: Mapping[str, float]
    """What it has, by Ray's names."""
    free: Mapping[str, float]
    """What nobody has reserved; a moment old."""
    drains_at: float | None
    """The Unix time at which it will be gone, if that is known; infinity: it will, and nobody knows when."""
    is_here: bool
    """This process runs on it."""

    def most(self, worker: WorkerResources) -> int:
        """The workers that it could hold if nobody else used it."""
        return _fitting(worker, self.resources)

    def room(self, worker: WorkerResources, own: int) -> int:
        """The workers that it can hold now, ``own`` of which it holds already."""
        return min(self.most(worker), own + _fitting(worker, self.free))


def _fitting(worker: WorkerResources, resources: Mapping[str, float]) -> int:
    need = worker.as_ray_names_them()
    return int(min(max(0.0, resources.get(name, 0.0)) / each for name, each in need.items()) + _ROUNDING)


def import_ahead() -> None:
    """Begins to import Ray in the background, for a process that has something else to wait for."""
    _set_environment()
    # No daemon: an interpreter that exits in the middle of the import of a C++ library can crash.
    threading.Thread(target=importlib.import_module, args=("ray.train",), name="import-ray").start()


def _set_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def local_cluster(num_cpus: int) -> "Iterator[None]":
    """A cluster of this machine alone, for as long as the context lasts; it listens on loopback.

    Raises:
        ClusterError: Ray did not start.
    """
    _set_environment()
    import ray

    try:
        # An explicit address: without one, Ray joins whatever cluster it finds on the machine.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
    except (RuntimeError, OSError, ConnectionError) as error:
        what = str(error).strip().partition("\n")[0]
        raise ClusterError(f"Ray did not start on this machine: {what}; see /tmp/ray/session_latest/logs") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def joined_cluster(address: str) -> "Iterator[None]":
    """The cluster whose head listens at ``HOST:PORT``, which this host is a node of.

    Raises:
        ClusterError: There is none, or it does not let this process in.
    """
    _set_environment()
    _check_listens(address)  # Ray itself would try for minutes
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, OSError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"--cluster {address}: {one_line(error)[:300]}; give the HOST:PORT that `ray start --head` printed, on a "
            "host of the cluster, with the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    _joined.set()
    try:
        yield
    finally:
        _joined.clear()
        ray.shutdown()


def _check_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ClusterError(f"--cluster must be HOST:PORT, got {address!r}; `ray start --head` printed it")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"--cluster {address}: no Ray head answers there: {error}; is it up, and the port its own?"
        ) from error


def is_joined() -> bool:
    """Whether this process is in a ``joined_cluster``; does not import Ray."""
    return _joined.is_set()


def nodes() -> list[Node]:
    """The nodes of the cluster that are alive.

    Raises:
        ClusterError: Ray is gone.
    """
    import ray
    from ray._private.state import available_resources_per_node, state

    here = ray.get_runtime_context().get_node_id()
    try:
        free = available_resources_per_node()
        draining = state.get_draining_nodes()
        table = ray.nodes()
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise ClusterError(f"Ray is gone: {_last_line(error)}; see /tmp/ray/session_latest/logs") from error
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            free=free.get(node["NodeID"], {}),
            # Ray counts in milliseconds, and means by 0 that there is no deadline.
            drains_at=(draining[node["NodeID"]] / 1000 or math.inf) if node["NodeID"] in draining else None,
            is_here=node["NodeID"] == here,
        )
        for node in table
        if node["Alive"]
    ]


class WorkerGroup:
    """The agents of a run and the way to them, as the driver sees it.

    Every method is for the driver's thread alone.
    """

    def __init__(self, task: Task, resources: WorkerResources, most: int) -> None:
        """Starts Ray Train's controller, which waits to be told how many agents to start.

        Args:
            task: What each worker is told; rank and world size are filled in.
            resources: What each reserves.
            most: The most agents there will be; an autoscaler is asked for room for them.
        """
        import ray
        from ray.train import RunConfig, ScalingConfig

        self.resources = resources
        self._task = task
        self._hosts: dict[str, Any] = {}
        """By node, so that Ray lets them live as long as this group."""
        self._here = here = ray.get_runtime_context().get_node_id()
        # Where the driver lives: it must not be lost with a node that only works.
        self._switchboard: Any = _actor_on(here, _Switchboard).remote()
        self._orders = Orders()
        self._wanted = _Wanted()
        self._error: BaseException | None = None
        self._bookkeeping = tempfile.TemporaryDirectory(prefix="launcher-ray-train-")
        trainer = _steered_trainer(self._switchboard)(
            _run_agent,
            train_loop_config={"task": task, "switchboard": self._switchboard, "driver_node": here},
            scaling_config=ScalingConfig(
                num_workers=most,  # how many there are at a time is told by the steering policy
                use_gpu=resources.gpus > 0,
                resources_per_worker=resources.as_ray_names_them(),
            ),
            run_config=RunConfig(name="agents", storage_path=self._bookkeeping.name),
        )
        self._fit = threading.Thread(target=self._run_fit, args=(trainer,), name="ray-train", daemon=True)
        self._fit.start()

    def prepare(self, nodes: Sequence[Node]) -> None:
        """Has nodes import ahead what training processes need; to be told of every node as soon as it is known."""
        for node in nodes:
            if node.id not in self._hosts and node.id != self._here:
                name = _host_name(node.id)
                self._hosts[node.id] = _actor_on(node.id, _Host, name=name).remote(modules_of(self._task.entry))

    def start(self, num_workers: int) -> None:
        """Starts so many agents in place of those there are; they say ``hello`` when they are there.

        Raises:
            ClusterError: Ray is gone.
        """
        self._orders = replace(self._orders, version=self._orders.version + 1, attempt=None, meeting_port=None)
        self._ask(self._switchboard.set_orders, self._orders)
        self._wanted = _Wanted(self._wanted.generation + 1, num_workers)
        self._ask(self._switchboard.set_wanted, self._wanted)

    def messages(self, timeout_s: float) -> list[dict[str, Any]]:
        """The agents' messages since the last call, in order for each agent; waits up to ``timeout_s`` for one.

        Among them are Ray Train's: ``agents_lost``, with what Ray says of each of those that it lost, by rank; the
        others are there still, until the next ``start``. And ``agents_placed``: the nodes that hold one, for each.

        Raises:
            ClusterError: Ray Train has given up on the agents.
        """
        messages = self._ask(self._switchboard.take, timeout_s)
        if not messages and self._error is not None:
            raise ClusterError(f"Ray lost the workers: {_last_line(self._error)}") from self._error
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

    def _ask(self, method: Any, argument: Any) -> Any:
        import ray

        try:
            return ray.get(method.remote(argument))
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray is gone: {_last_line(error)}; see /tmp/ray/session_latest/logs") from error

    def _run_fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except Exception as error:  # the driver's thread raises it as its own, in one line
            self._error = error


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The agents that the driver wants.

    Attributes:
        generation: Another number means other agents, even if they are as many.
        num_workers: How many.
        is_over: None any more.
    """

    generation: int = 0
    num_workers: int = 0
    is_over: bool = False


def _steered_trainer(switchboard: Any) -> type:
    """Ray Train's trainer without torch and without helpers that we have no use for, its policies asking the driver.

    Ray Train has no public way to say how many workers there shall be, and when; its policies are made for that.
    """
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"}

    can_grow = is_joined()

    class Steering(FixedScalingPolicy):
        """Starts the agents that the driver wants, when it wants others than there are."""

        generation = 0

        def after_controller_start(self, train_run_context: Any) -> None:
            if can_grow:  # a machine alone has no autoscaler, and asking takes a process of its own
                super().after_controller_start(train_run_context)

        def make_decision_for_non_running_worker_group(self) -> Any:
            return self._decide(_CONTROLLER_WAIT_S)

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:  # noqa: ARG002  # by their names
            return self._decide(0.0)

        def _decide(self, wait_s: float) -> Any:
            wanted = ray.get(switchboard.wanted_after.remote(self.generation, wait_s))
            if wanted.is_over and wait_s:
                raise RuntimeError("the run is over, and no agents are there to end with it")
            if wanted.is_over or wanted.generation == self.generation:
                return NoopDecision()
            self.generation = wanted.generation
            if can_grow:
                self._maybe_send_resource_request()
            return ResizeDecision(wanted.num_workers, self.scaling_config._resources_per_worker_not_none)

    class Telling(FailurePolicy):
        """Tells the driver which agents were lost, and leaves the rest to it."""

        def make_decision(self, training_failed_error: BaseException) -> Any:
            failures = getattr(training_failed_error, "worker_failures", {})
            lost = {rank: _reason(error) for rank, error in failures.items()}
            what = "" if isinstance(training_failed_error, WorkerGroupError) else one_line(training_failed_error)
            told = {"kind": "agents_lost", "lost": lost, "what": what}
            is_over = ray.get(switchboard.post_of_controller.remote([told]))
            return FailureDecision.RAISE if is_over else FailureDecision.RETRY

    class Census(ControllerCallback, WorkerGroupCallback):
        """Tells the driver on which nodes room is held for agents: from before they speak until they are gone."""

        room: Any = None

        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:  # noqa: ARG002  # by its name
            # Ray Train lets go of the other agents' room when it starts new ones, and for them the driver waits for
            # room. Until then Ray would hold a place for a lost agent wherever it finds one.
            if self.room is not None:
                self.room.shutdown()
                self._tell([])

        def after_worker_group_start(self, worker_group: Any) -> None:
            self.room = worker_group.get_worker_group_state().placement_group_handle
            self._tell([worker.metadata.node_id for worker in worker_group.get_workers()])

        def after_worker_group_shutdown(self, worker_group_context: Any) -> None:  # noqa: ARG002  # by its name
            self.room = None
            self._tell([])

        def _tell(self, nodes: list[str]) -> None:
            ray.get(switchboard.post.remote([{"kind": "agents_placed", "nodes": nodes}]))

    class SteeredTrainer(DataParallelTrainer):
        # Should Ray drop this hook, nobody calls it, and the helpers are back.
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [Census(), *(callback for callback in callbacks if type(callback).__name__ not in unused)]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            steering = Steering(parts["scaling_policy"].scaling_config)
            policies = {"scaling_policy": steering, "failure_policy": Telling(FailureConfig())}
            return super()._initialize_and_run_controller(**(parts | policies))

    return SteeredTrainer


def _actor_on(node: str, actor: type, **options: Any) -> Any:
    """An actor class whose actors live on a node and take no worker's place."""
    import ray

    return ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node}, **options)(actor)


def _host_name(node: str) -> str:
    return f"launcher-host-{node}"


class _Host:
    """An actor on each node but the driver's: keeps a server from which training processes are forked, imports done.

    It outlives the agents, so that the next ones find it warm.
    """

    def __init__(self, modules: list[str]) -> None:
        fork_server.start(modules)

    def address(self) -> str | None:
        return fork_server.own_address()


class _Switchboard:
    """An actor between driver, agents and Ray Train's controller: messages one way, the newest wishes the other."""

    def __init__(self) -> None:
        import asyncio

        self._messages: list[dict[str, Any]] = []
        self._orders = Orders()
        self._wanted = _Wanted()
        self._changed = asyncio.Condition()

    async def post(self, messages: list[dict[str, Any]]) -> None:
        async with self._changed:
            self._messages += messages
            self._changed.notify_all()

    async def post_of_controller(self, messages: list[dict[str, Any]]) -> bool:
        """Returns whether the run is over."""
        await self.post(messages)
        return self._wanted.is_over

    async def take(self, timeout_s: float) -> list[dict[str, Any]]:
        await self._wait(lambda: bool(self._messages), timeout_s)
        messages, self._messages = self._messages, []
        return messages

    async def set_orders(self, orders: Orders) -> None:
        async with self._changed:
            self._orders = orders
            self._changed.notify_all()

    async def orders_after(self, version: int, timeout_s: float) -> Orders:
        await self._wait(lambda: self._orders.version > version, timeout_s)
        return self._orders

    async def set_wanted(self, wanted: _Wanted) -> None:
        async with self._changed:
            self._wanted = wanted
            self._changed.notify_all()

    async def wanted_after(self, generation: int, timeout_s: float) -> _Wanted:
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

    def post(self, messages: list[dict[str, Any]]) -> None:
        import ray

        ray.get(self._switchboard.post.remote(messages))

    def orders_after(self, version: int) -> Orders:
        import ray

        while True:
            orders = ray.get(self._switchboard.orders_after.remote(version, _ORDERS_WAIT_S))
            if orders.version > version:
                return orders


def _run_agent(config: Mapping[str, Any]) -> None:
    """Ray Train's training function."""
    import ray
    import ray.train

    here, worker = ray.train.get_context(), ray.get_runtime_context()
    task: Task = replace(
        config["task"],
        rank=here.get_world_rank(),
        world_size=here.get_world_size(),
        on_gpu=bool(ray.get_gpu_ids()),
        fork_server=_fork_server(config["task"], worker.get_node_id() == config["driver_node"]),
    )
    identity = {
        "world_size": task.world_size,
        "node": worker.get_node_id(),
        "address": ray.util.get_node_ip_address(),
        "pid": os.getpid(),
    }
    Agent(_RayChannel(config["switchboard"]), task, identity).run()


def _fork_server(task: Task, is_with_driver: bool) -> str | None:
    """The address of the server of this node: the driver's own, or its host actor's; none yet on a node that is new."""
    import ray

    if is_with_driver:
        return task.fork_server
    try:
        host: Any = ray.get_actor(_host_name(ray.get_runtime_context().get_node_id()))
    except ValueError:  # there is no such actor
        return None
    return cast("str | None", ray.get(host.address.remote()))


def _reason(error: BaseException) -> str:
    """What Ray says of an agent that it lost, in a line, without the advice that follows."""
    reason = _last_line(error).partition(" Some common causes")[0].partition("Worker exit detail: ")
    return (reason[2] or reason[0]).rstrip(".")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
