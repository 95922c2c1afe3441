"""Ray: the only module that imports it. Starts or joins a cluster, and runs one agent per worker with Ray Train.

Ray Train places, starts and replaces the agents. It is told nothing of checkpoints and steps: its reports
are a barrier of all workers, and its own bookkeeping of checkpoints can make a run unstartable.
"""

import importlib
import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.agent import Agent, Orders, Task
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Set before Ray is imported, for it reads them then. Ray Train passes its own on to its actors.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the default of 2 s adds 8 s to the shortest run
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process; nobody here listens to it
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences advice about a default that will change
}
_OBJECT_STORE_BYTES = 100 * 2**20
_ORDERS_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResources:
    """What each worker reserves."""

    cpus: float
    gpus: int
    accelerator: str | None


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


class WorkerGroup:
    """The agents of a run and the way to them, as the driver sees it.

    Every method is for the driver's thread alone.
    """

    def __init__(self, task: Task, num_workers: int, resources: WorkerResources, *, max_failures: int) -> None:
        """Starts the agents in the background; they say ``hello`` when they are there.

        Args:
            task: What each worker is told; rank and world size are filled in.
            num_workers: Agents to start.
            resources: What each reserves.
            max_failures: Lost agents that Ray replaces before it gives up.
        """
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        self._switchboard: Any = ray.remote(num_cpus=0)(_Switchboard).remote()
        self._orders = Orders()
        self._error: BaseException | None = None
        self._bookkeeping = tempfile.TemporaryDirectory(prefix="launcher-ray-train-")
        per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
        trainer = _lean_trainer()(
            _run_agent,
            train_loop_config={"task": task, "switchboard": self._switchboard},
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=resources.gpus > 0,
                resources_per_worker=per_worker,
                accelerator_type=resources.accelerator,
            ),
            run_config=RunConfig(
                name="agents",
                storage_path=self._bookkeeping.name,
                failure_config=FailureConfig(max_failures=max_failures),
            ),
        )
        self._fit = threading.Thread(target=self._run_fit, args=(trainer,), name="ray-train", daemon=True)
        self._fit.start()

    def messages(self, timeout_s: float) -> list[dict[str, Any]]:
        """The agents' messages since the last call, in order for each agent; waits up to ``timeout_s`` for one.

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


def _lean_trainer() -> type:
    """Ray Train's trainer without torch, and without the helpers that each start a process we have no use for."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"}

    class LeanTrainer(DataParallelTrainer):
        # Should Ray drop this hook, nobody calls it, and the helpers are back.
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in unused]

    return LeanTrainer


class _Switchboard:
    """An actor between driver and agents: messages one way, the newest orders the other."""

    def __init__(self) -> None:
        import asyncio

        self._messages: list[dict[str, Any]] = []
        self._orders = Orders()
        self._changed = asyncio.Condition()

    async def post(self, messages: list[dict[str, Any]]) -> None:
        async with self._changed:
            self._messages += messages
            self._changed.notify_all()

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

    here = ray.train.get_context()
    task: Task = replace(
        config["task"],
        rank=here.get_world_rank(),
        world_size=here.get_world_size(),
        on_gpu=bool(ray.get_gpu_ids()),
    )
    worker = ray.get_runtime_context()
    identity = {
        "agent": worker.get_worker_id(),
        "node": worker.get_node_id(),
        "address": ray.util.get_node_ip_address(),
        "pid": os.getpid(),
    }
    Agent(_RayChannel(config["switchboard"]), task, identity).run()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
