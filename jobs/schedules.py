"""From ``scheduler`` to a torch learning-rate schedule, and when it advances."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cluster.errors import DescriptionError
from jobs.order import StepPlan
from jobs.spec import PlanValue, SchedulerSpec, Target
from jobs.targets import Builder, resolve


def plan_value(steps: StepPlan, value: PlanValue) -> int:
    """The number behind ``${plan.total_steps}``, ``${plan.steps_per_epoch}`` and ``${plan.steps:EPOCHS}``."""
    if value.name == "total_steps":
        return steps.total_steps
    if value.name == "steps_per_epoch":
        return steps.steps_per_epoch
    assert value.epochs is not None, value
    return round(value.epochs * steps.steps_per_epoch)


class Schedule:
    """A learning-rate schedule, or none, advanced at the end of steps.

    Collective: every rank advances it alike; a monitored metric is the same number on every rank.
    """

    def __init__(self, spec: SchedulerSpec | None, scheduler: LRScheduler | ReduceLROnPlateau | None) -> None:
        self._spec = spec
        self._scheduler = scheduler

    def step_done(self) -> None:
        """After every optimizer step."""
        if self._scheduler is not None and self._spec is not None and self._spec.interval == "step":
            self._scheduler.step()

    def epoch_done(self, metrics: Mapping[str, float]) -> None:
        """After every epoch, with the validation metrics that were measured at its end."""
        if self._scheduler is None or self._spec is None or self._spec.interval != "epoch":
            return
        if isinstance(self._scheduler, ReduceLROnPlateau):
            assert self._spec.monitor is not None, "the plan asks for it"
            if self._spec.monitor in metrics:
                self._scheduler.step(metrics[self._spec.monitor])
        else:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state)


def build_schedule(
    spec: SchedulerSpec | None, optimizer: torch.optim.Optimizer, builder: Builder, *, validates: bool
) -> Schedule:
    """Builds the schedule and those nested in it, each over the same optimizer.

    Raises:
        DescriptionError: The name, an argument or its value is wrong, or ``monitor`` does not fit.
    """
    if spec is None:
        return Schedule(None, None)

    def build(target: Target, key: str) -> Any:
        function = resolve(target.path, key, [lr_scheduler])
        takes_optimizer = inspect.isclass(function) and issubclass(function, (LRScheduler, ReduceLROnPlateau))
        if takes_optimizer and function is lr_scheduler.ChainedScheduler:
            takes_optimizer = False  # it finds the optimizer in the schedules it chains
        arguments = (optimizer,) if takes_optimizer else ()
        return builder.build(target, key, *arguments, bare_names=[lr_scheduler], nested=build)

    scheduler = build(spec.factory, "scheduler")
    if isinstance(scheduler, ReduceLROnPlateau):
        if spec.interval != "epoch":
            raise DescriptionError(
                "scheduler.interval must be epoch for ReduceLROnPlateau, which waits for a validation"
            )
        if spec.monitor not in ("val/loss", "val/accuracy"):
            raise DescriptionError(
                f"scheduler.monitor must be val/loss or val/accuracy for ReduceLROnPlateau, got {spec.monitor!r}"
            )
        if not validates:
            raise DescriptionError(f"scheduler.monitor needs data.val to measure {spec.monitor!r}; declare data.val")
    elif spec.monitor is not None:
        raise DescriptionError(f"scheduler.monitor is read by ReduceLROnPlateau alone, got {spec.monitor!r}; remove it")
    return Schedule(spec, scheduler)
