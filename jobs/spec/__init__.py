"""The job language: what a description may contain, as frozen dataclasses.

This room imports neither torch nor Ray, so that a mistake is reported before they are loaded. It checks each value by
itself and against others; the plan checks what needs the data, the model or the machine. The docstring below a field is
its reference text, which ``launcher schema`` prints.
"""

from jobs.spec.checks import DECODE, NUMBER, NUMBER_FROM_TEXT
from jobs.spec.components import GroupSpec, InitSpec, LossSpec, OptimizerSpec, SchedulerSpec
from jobs.spec.job import BestSpec, CheckpointSpec, DataSpec, JobSpec, ShuffleSpec, TrackingSpec, watched_metrics
from jobs.spec.literals import list_in
from jobs.spec.resources import MaxFailuresSpec, WorkersSpec
from jobs.spec.target import PlanValue, Target
from jobs.spec.training import EarlyStopSpec, TrainSpec

__all__ = [
    "DECODE",
    "NUMBER",
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
    "ShuffleSpec",
    "Target",
    "TrackingSpec",
    "TrainSpec",
    "WorkersSpec",
    "list_in",
    "watched_metrics",
]
