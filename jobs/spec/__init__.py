"""The job language: what a person may write, as frozen dataclasses.

Imports nothing but the standard library, so that a mistake is found before torch or Ray is. A value that can
be judged alone is judged here; what needs the data, the model or the machine is judged by the plan.
The docstring under a field is its reference text: ``launcher schema`` prints it.
"""

from jobs.spec.checks import NUMBER_FROM_TEXT
from jobs.spec.components import GroupSpec, InitSpec, LossSpec, OptimizerSpec, SchedulerSpec
from jobs.spec.job import BestSpec, CheckpointSpec, DataSpec, JobSpec, TrackingSpec, watched_metrics
from jobs.spec.resources import MaxFailuresSpec, WorkersSpec
from jobs.spec.target import PlanValue, Target
from jobs.spec.training import EarlyStopSpec, TrainSpec

__all__ = [
    "NUMBER_FROM_TEXT",
    "BestSpec",
    "CheckpointSpec",
    "DataSpec",
    "EarlyStopSpec",
    "GroupSpec",
    "InitSpec",
    "JobSpec",
    "LossSpec",
    "MaxFailuresSpec",
    "OptimizerSpec",
    "PlanValue",
    "SchedulerSpec",
    "Target",
    "TrackingSpec",
    "TrainSpec",
    "WorkersSpec",
    "watched_metrics",
]
