"""The Ray cluster: start one or join one, and read what its nodes have."""

import importlib
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.capacity import Capacity, Node
from cluster.errors import ClusterError, one_line
from cluster.host.signals import kept_from_children
from cluster.ray.session_folder import logs_path
from cluster.ray.token import find_token

PLACEMENT_TIMEOUT_S = 15.0
"""How long Ray Train waits for room for a group of agents before it gives up."""
# Ray reads these when it is imported. Ray Train passes its own on to its actors.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # the default of 2 s adds 8 s to the shortest run
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it is one more process, and the driver looks itself
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{PLACEMENT_TIMEOUT_S:g}",  # others may have taken what was free
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences advice about a default that will change
}
_OBJECT_STORE_BYTES = 100 * 2**20
_CONNECT_TIMEOUT_S = 10.0


def import_ahead(*, joins: bool) -> None:
    """Start to import Ray in the background, while the process waits for something else.

    Args:
        joins: The process will join a running cluster; False: it will start one.
    """
    _set_environment(joins=joins)
    # Not a daemon thread: an interpreter that exits while it imports a C++ library can crash.
    threading.Thread(target=importlib.import_module, args=("ray.train",), name="import-ray").start()


def _set_environment(*, joins: bool) -> None:
    # A running cluster may have no token. Ray reads the mode once, and sends no token without it.
    token = {} if joins and find_token() is None else {"RAY_AUTH_MODE": "token"}
    for name, value in {**_ENVIRONMENT, **token}.items():
        os.environ.setdefault(name, value)


@contextmanager
def local_cluster(num_cpus: int) -> Iterator[None]:
    """Start a cluster of this machine alone, which listens on loopback; it ends with the context.

    Raises:
        ClusterError: Ray did not start.
    """
    _set_environment(joins=False)
    import ray

    from cluster.ray.private_core import without_signal_handlers, without_working_directory

    try:
        # An explicit address: without one, Ray joins whatever cluster it finds on the machine.
        with kept_from_children(), without_signal_handlers():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                job_config=without_working_directory(),
            )
    except (RuntimeError, OSError, ConnectionError) as error:
        what = str(error).strip().partition("\n")[0]
        raise ClusterError(f"Ray did not start on this machine: {what}; see {logs_path()}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def joined_cluster(address: str) -> Iterator[None]:
    """Join the cluster whose head listens at ``HOST:PORT``, of which this host is a node; leave it with the context.

    Raises:
        ClusterError: No cluster listens there, or it refuses this process.
    """
    _set_environment(joins=True)
    _check_listens(address)  # Ray itself would retry for minutes
    import ray

    from cluster.ray.private_core import without_signal_handlers, without_working_directory

    try:
        with without_signal_handlers():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=without_working_directory(),
            )
    except (RuntimeError, OSError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"--cluster {address}: {one_line(error)[:300]}; give the HOST:PORT that `ray start --head` printed, on a "
            "host of the cluster, with the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"--cluster {address}: no Ray head answers there: {error}; is it up, and the port its own?"
        ) from error


def nodes() -> list[Node]:
    """Return the nodes of the cluster that are alive.

    Raises:
        ClusterError: Ray is gone.
    """
    import ray

    from cluster.ray.private_core import drain_deadlines_ms, free_resources

    here = ray.get_runtime_context().get_node_id()
    with _named_errors():
        free = free_resources()
        draining = drain_deadlines_ms()
        table = ray.nodes()
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            free=free.get(node["NodeID"], {}),
            drains_at=(draining[node["NodeID"]] / 1000 or math.inf) if node["NodeID"] in draining else None,
            is_here=node["NodeID"] == here,
        )
        for node in table
        if node["Alive"]
    ]


def capacity() -> Capacity:
    """Return what the cluster has, and what its autoscaler may add.

    Raises:
        ClusterError: Ray is gone.
    """
    from cluster.ray.private_core import largest_resources

    with _named_errors():
        limits = largest_resources()
    return Capacity(nodes=tuple(nodes()), limits=limits)


@contextmanager
def _named_errors() -> Iterator[None]:
    import ray

    try:
        yield
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise ClusterError(f"Ray is gone: {last_line(error)}; see {logs_path()}") from error


def actor_on(node: str, actor: type, **options: Any) -> Any:
    """Return an actor class whose actors live on a node and reserve none of its resources."""
    import ray

    return ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node}, **options)(actor)


def last_line(error: BaseException) -> str:
    """Return the last line of an error of Ray's, which comes after the tracebacks of other processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
