"""The private parts of Ray Train that the program uses: what it relies on in each is said here.

With ``cluster.ray.private_core``, which has those of Ray itself, this is the one place that imports any. Ray may change
them with any minor version; ``cluster.versions`` therefore refuses the versions with which the tests have not passed.
"""

# First: what follows imports itself in a circle, and another thread may be importing it.
import ray.train  # noqa: F401

# The placement group of the workers was not ready within RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, and is removed; the
# failure policy gets it as the ``controller_failure`` of a ControllerError.
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError as WorkerGroupStartupTimeoutError

# The policies and callbacks by which the driver steers Ray Train. Ray Train's controller calls their methods, by these
# names and with these arguments; a class that lacks one has the default of its base class.
from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback as WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision as FailureDecision
from ray.train.v2._internal.execution.failure_handling import FailurePolicy as FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision as NoopDecision
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision as ResizeDecision

# It asks the autoscaler for room for ``num_workers`` in ``after_controller_start`` and in ``_send_resource_request``,
# and takes that back in ``before_controller_shutdown`` and in ``_cancel_resource_request``, also if it is asked of it
# twice. In Ray 2.55 an error of a policy ends the controller without a shutdown. A request expires after
# AUTOSCALING_REQUESTS_EXPIRE_TIME_S.
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy as FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig as FailureConfig

# It makes its callbacks in ``_create_default_callbacks``, and is given its policies by name in
# ``_initialize_and_run_controller``.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError as ControllerError
from ray.train.v2.api.exceptions import WorkerGroupError as WorkerGroupError
