"""The private parts of Ray Train that the program uses, each with the behaviour that it relies on.

Only this module and ``cluster.ray.private_core``, which has those of Ray itself, import private parts. Ray may change
them in any minor version, so ``cluster.versions`` refuses the versions with which the tests have not passed.
"""

# First, because the modules below import each other in a circle, and another thread may be importing them.
import ray.train  # noqa: F401

# Raised when the workers' placement group was not ready within RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S; the group is
# removed. The failure policy gets this error as the ``controller_failure`` of a ControllerError.
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError as WorkerGroupStartupTimeoutError

# The policies and callbacks with which the driver steers Ray Train. The controller calls their methods by these names
# and with these arguments; a class without a method uses the default of its base class.
from ray.train.v2._internal.execution.callback import ControllerCallback as ControllerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback as WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision as FailureDecision
from ray.train.v2._internal.execution.failure_handling import FailurePolicy as FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision as NoopDecision
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision as ResizeDecision

# It asks the autoscaler for room for ``num_workers`` in ``after_controller_start`` and in ``_send_resource_request``,
# and withdraws the request in ``before_controller_shutdown`` and in ``_cancel_resource_request``, which may be called
# twice. In Ray 2.55, an error in a policy ends the controller without a shutdown. A request expires after
# AUTOSCALING_REQUESTS_EXPIRE_TIME_S.
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy as FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig as FailureConfig

# It makes its callbacks in ``_create_default_callbacks``, and receives its policies as keyword arguments of
# ``_initialize_and_run_controller``.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError as ControllerError
from ray.train.v2.api.exceptions import WorkerGroupError as WorkerGroupError
