"""The private parts of Ray that the program uses: what it relies on in each is said here.

Those of Ray Train are in ``cluster.ray.private_train``; they take a second to import, and these take no time.
"""

from collections.abc import Mapping

from ray._private import state as _ray_state
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray.job_config import JobConfig


def without_working_directory() -> JobConfig:
    """What has ``ray.init`` leave the driver's working directory out of its workers' import paths.

    Ray puts it first in their ``sys.path``, before the standard library, unless this argument says that the job is one
    of Ray Client. The argument changes nothing else for a job without a runtime environment of local files.
    """
    return JobConfig(_client_job=True)


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """What nothing reserves, by the id of the node; up to a heartbeat old."""
    free: Mapping[str, Mapping[str, float]] = _ray_state.available_resources_per_node()
    return free


def drain_deadlines_ms() -> Mapping[str, int]:
    """The nodes that are being drained, by id, and when they end, in Unix milliseconds; 0: that is not known."""
    deadlines: Mapping[str, int] = _ray_state.state.get_draining_nodes()
    return deadlines


def largest_resources() -> Mapping[str, float] | None:
    """The most that the cluster may come to have; none: it has no autoscaler.

    The sum of what the autoscaler has reported of its node groups. A group, or a resource, without a limit counts as
    ``sys.maxsize``.
    """
    largest: Mapping[str, float] | None = _ray_state.state.get_max_resources_from_cluster_config()
    return largest


def accelerator_here() -> str | None:
    """The type of this machine's GPUs; none: it has none.

    A node that is started here has the resource ``accelerator_type:`` with this name.
    """
    manager = get_accelerator_manager_for_resource("GPU")
    return None if manager is None else manager.get_current_node_accelerator_type()
