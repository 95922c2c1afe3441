"""The private parts of Ray that the program uses, each with the behaviour that it relies on.

``cluster.ray.private_train`` has those of Ray Train, whose import takes a second; these cost nothing to import.
"""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray._private import state as _ray_state
from ray._private import utils as _ray_utils
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.parameter import RayParams
from ray.job_config import JobConfig


def without_working_directory() -> JobConfig:
    """Return the job configuration with which workers do not get the driver's working directory in ``sys.path``.

    Ray puts that directory first, before the standard library, unless ``_client_job`` marks the job as one of Ray
    Client. The flag changes nothing else for a job without a runtime environment of local files.
    """
    return JobConfig(_client_job=True)


def without_client_server(parameters: RayParams, _is_head: bool) -> None:
    """Keep a head that ``ray start`` starts from serving Ray Client, whose port must be a fixed one.

    ``ray start`` calls what RAY_START_HOOK names before it starts anything. (Ray 2.60)
    """
    parameters.ray_client_server_port = None


@contextmanager
def without_signal_handlers() -> Iterator[None]:
    """Keep this process's handler of SIGTERM while Ray starts in this context.

    ``ray.init`` sets one that ends the process, and those of the node that it starts, at once; it does so through
    ``set_sigterm_handler`` alone. Its C++ core then sets another, below Python's, that prints a stack; setting Python's
    again removes that. (Ray 2.60)

    Thread: the main thread, as for every change of a signal handler.
    """
    handler, set_handler = signal.getsignal(signal.SIGTERM), _ray_utils.set_sigterm_handler
    _ray_utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        _ray_utils.set_sigterm_handler = set_handler
        signal.signal(signal.SIGTERM, handler)


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Return the unreserved resources by node id; they may be one heartbeat old."""
    free: Mapping[str, Mapping[str, float]] = _ray_state.available_resources_per_node()
    return free


def drain_deadlines_ms() -> Mapping[str, int]:
    """Return the draining nodes, by id, with the Unix time in milliseconds at which each ends; 0: unknown."""
    deadlines: Mapping[str, int] = _ray_state.state.get_draining_nodes()
    return deadlines


def largest_resources() -> Mapping[str, float] | None:
    """Return the largest resources that the cluster may grow to; None: it has no autoscaler.

    It is the sum over the node groups that the autoscaler has reported. A group or resource without a limit counts as
    ``sys.maxsize``.
    """
    largest: Mapping[str, float] | None = _ray_state.state.get_max_resources_from_cluster_config()
    return largest


def accelerator_here() -> str | None:
    """Return the type of this machine's GPUs; None: it has no GPU.

    A Ray node that is started here has the resource ``accelerator_type:`` with this name.
    """
    manager = get_accelerator_manager_for_resource("GPU")
    return None if manager is None else manager.get_current_node_accelerator_type()
