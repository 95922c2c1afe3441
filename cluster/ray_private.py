"""The private parts of Ray that the program uses: what it relies on in each is said here, and nothing else imports one.

Ray may change them with any minor version. ``cluster.versions`` therefore refuses the versions with which the tests
have not passed.
"""

from collections.abc import Mapping

from ray._private import state as _ray_state

# The policies and callbacks by which the driver steers Ray Train. Ray Train's controller calls their methods, by these
# names and with these arguments; a class that lacks one has the default of its base class.
from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback as WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision as FailureDecision
from ray.train.v2._internal.execution.failure_handling import FailurePolicy as FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision as NoopDecision
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision as ResizeDecision

# It asks the autoscaler for room when its controller starts, and again in ``_maybe_send_resource_request``.
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy as FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig as FailureConfig

# It makes its callbacks in ``_create_default_callbacks``, and is given its policies by name in
# ``_initialize_and_run_controller``.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError as WorkerGroupError


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
