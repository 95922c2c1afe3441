"""Building and advancing the learning-rate schedule, and checking that it lasts as long as the run."""

import functools
import inspect
import math
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from cluster.errors import DescriptionError, one_line
from jobs.components.targets import Builder, check_arguments, resolve
from jobs.sampling import StepPlan
from jobs.spec import PlanValue, SchedulerSpec, Target

_FUNCTIONS = ("lr_lambda", "scale_fn")
"""Arguments that are functions of one number. Text there is an import path; in other arguments it stays text."""
_MOST_PLAYED = 500_000
"""The most rates that a preview computes, over all groups: a few seconds."""
_ROUNDING = 1e-9
"""How far below 0 a rate may be, as a fraction of its group's first rate; torch's LinearLR may miss 0 by 1e-16."""

_Keys = dict[LRScheduler, str]
"""The key in the description of each schedule."""


def plan_value(steps: StepPlan, value: PlanValue) -> int:
    """Returns the steps of ``${plan.total_steps}``, ``${plan.steps_per_epoch}`` or ``${plan.steps:EPOCHS}``."""
    if value.name == "total_steps":
        return steps.total_steps
    if value.name == "steps_per_epoch":
        return steps.steps_per_epoch
    assert value.epochs is not None, value
    return round(value.epochs * steps.steps_per_epoch)


class Schedule:
    """A learning-rate schedule, or a constant rate, that is advanced at the end of steps.

    It exchanges nothing: every rank advances its own copy at the same steps, with the same metrics.
    """

    def __init__(self, spec: SchedulerSpec | None, scheduler: LRScheduler | None) -> None:
        """Only assigns; both None: the rate stays constant."""
        self._spec = spec
        self._scheduler = scheduler

    def step_done(self) -> None:
        """Advances a schedule by step; to be called after every optimizer step, also after a skipped one."""
        if self._spec is None or self._scheduler is None or isinstance(self._scheduler, ReduceLROnPlateau):
            return
        if self._spec.interval == "step":
            self._scheduler.step()

    def measured(self, metrics: Mapping[str, float], *, ends_epoch: bool) -> None:
        """Advances a schedule by epoch, or one that watches a metric; to be called at every pause of the loop.

        Args:
            metrics: What was measured at this step: validation metrics, and at the end of an epoch training metrics.
            ends_epoch: Whether the step ends an epoch.
        """
        if self._spec is None or self._scheduler is None:
            return
        by_epoch = self._spec.interval == "epoch"
        if isinstance(self._scheduler, ReduceLROnPlateau):
            assert self._spec.monitor is not None, "build_schedule asks for it"
            if self._spec.monitor in metrics and (ends_epoch or not by_epoch):
                self._scheduler.step(metrics[self._spec.monitor])
        elif by_epoch and ends_epoch:
            self._scheduler.step()

    def play_to(self, step: int, steps: StepPlan) -> None:
        """Advances a new schedule to its state after ``step`` steps; a ReduceLROnPlateau stays as it is."""
        if self._spec is None or self._scheduler is None or isinstance(self._scheduler, ReduceLROnPlateau):
            return
        _, per_tick = _ticks(self._spec, steps)
        for _ in range(step // per_tick):
            self._scheduler.step()

    def preview(self, steps: StepPlan) -> tuple[tuple[int, float], ...]:
        """Runs the schedule through the whole run without training. It cannot be used afterwards.

        A very long run is cut off after a few seconds. A ReduceLROnPlateau is not run.

        Returns:
            A few steps, counted from 1, each with its learning rate in the last parameter group: every change of the
            rate if there are few, else the first step, the highest rate, a step halfway and the last step.

        Raises:
            DescriptionError: The schedule raises, or a rate is not a number, not finite or below 0.
        """
        if self._spec is None or self._scheduler is None or isinstance(self._scheduler, ReduceLROnPlateau):
            return ()
        groups = self._scheduler.optimizer.param_groups
        first_rates = [group["lr"] for group in groups]
        ticks, per_tick = _ticks(self._spec, steps)
        rates = array("d")
        for tick in range(min(ticks, _MOST_PLAYED // len(groups))):
            step = tick * per_tick + 1
            for number, (group, first) in enumerate(zip(groups, first_rates)):
                rate = group["lr"]
                if not (isinstance(rate, (int, float)) and -_ROUNDING * first <= rate < math.inf):
                    raise DescriptionError(
                        f"scheduler: the rate of group {number} must be a finite number and at least 0, "
                        f"got {rate} at step {step}; look at {self._spec.factory.path} and its arguments"
                    )
            rates.append(groups[-1]["lr"])
            try:
                self._scheduler.step()
            except Exception as error:  # a user's schedule or function may raise anything
                raise DescriptionError(
                    f"scheduler: {self._spec.factory.path} raised {type(error).__name__} "
                    f"after step {step + per_tick - 1}: {one_line(error) or 'it cannot go on from there'}"
                ) from error
        return tuple((position * per_tick + 1, rates[position]) for position in _landmarks(rates))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of torch's schedule; empty for a constant rate."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state)


def build_schedule(
    spec: SchedulerSpec | None, optimizer: torch.optim.Optimizer, builder: Builder, steps: StepPlan
) -> Schedule:
    """Builds the schedule and those nested in it, all over the same optimizer.

    Raises:
        DescriptionError: The name, an argument or its value is wrong, ``monitor`` does not fit, or the run is longer
            than the schedule.
    """
    if spec is None:
        return Schedule(None, None)
    # torch warns if no optimizer step used a rate, as after a skipped step and in a preview.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`")
    keys: _Keys = {}

    def build(target: Target, key: str) -> Any:
        arguments = {
            name: _function(value, f"{key}.{name}", builder) if name in _FUNCTIONS else value
            for name, value in target.args.items()
        }
        positional = (optimizer,) if _takes_optimizer(resolve(target.path, key, [lr_scheduler])) else ()
        built = builder.build(
            replace(target, args=arguments), key, *positional, bare_names=[lr_scheduler], nested=build
        )
        if isinstance(built, LRScheduler):
            keys[built] = key
        return built

    scheduler = build(spec.factory, "scheduler")
    if not isinstance(scheduler, LRScheduler):
        raise DescriptionError(
            f"scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {type(scheduler).__name__} "
            f"from {spec.factory.path}; name a subclass of it, or a function that returns one"
        )
    _check_monitor(spec, scheduler)
    _check_lengths(spec, scheduler, steps, keys)
    return Schedule(spec, scheduler)


def _ticks(spec: SchedulerSpec, steps: StepPlan) -> tuple[int, int]:
    """Returns how often the schedule advances in the whole run, and the number of steps between two advances."""
    return (steps.total_steps, 1) if spec.interval == "step" else (steps.epochs, steps.steps_per_epoch)


def _takes_optimizer(function: Callable[..., Any]) -> bool:
    """Returns whether a callable builds a schedule, rather than an argument of one."""
    if inspect.isclass(function) and issubclass(function, LRScheduler):
        return not issubclass(function, ChainedScheduler)  # it takes the optimizer of the schedules that it chains
    try:
        return next(iter(inspect.signature(function).parameters), None) == "optimizer"
    except (TypeError, ValueError):
        return False  # some C functions have no signature; none of them builds a schedule


def _function(value: Any, key: str, builder: Builder) -> Any:
    """Returns the function that an argument names.

    Args:
        value: An import path, a target that returns a function or binds arguments, or a list with one for each group.
        key: Where it stands in the description, for errors.
        builder: Builds targets.
    """
    if isinstance(value, (list, tuple)):
        return [_function(item, f"{key}[{number}]", builder) for number, item in enumerate(value)]
    if value is None:
        return None
    if isinstance(value, str):
        if not all(part.isidentifier() for part in value.split(".")):
            raise DescriptionError(
                f"{key} must be the import path of a function, got {value!r}; write the function in a module beside "
                "the job file, and its path here, such as mine.decay"
            )
        function = resolve(value, key)
        check_arguments(function, [], key, given=1)
        # torch saves the __dict__ of callables that are not plain functions; a built-in has none.
        return function if hasattr(function, "__dict__") else functools.partial(function)
    if not isinstance(value, Target):
        raise DescriptionError(f"{key} must be a function, got {value!r}; write its import path")
    if value.partial:
        check_arguments(resolve(value.path, key), list(value.args), key, given=1)
    function = builder.build(value, key)
    if not callable(function):
        raise DescriptionError(
            f"{key} must be a function, got {type(function).__name__} from {value.path}; "
            "with _partial_: true the arguments are bound and the function itself is passed on"
        )
    return function


def _check_monitor(spec: SchedulerSpec, scheduler: LRScheduler) -> None:
    if not isinstance(scheduler, ReduceLROnPlateau):
        if spec.monitor is not None:
            raise DescriptionError(
                f"scheduler.monitor is read by ReduceLROnPlateau alone, got {spec.monitor!r}; remove it"
            )
    elif spec.monitor is None:
        raise DescriptionError(
            "scheduler.monitor is missing: ReduceLROnPlateau needs a metric to watch; write for example val/loss"
        )
    elif spec.interval == "step" and not spec.monitor.startswith("val/"):
        raise DescriptionError(
            f"scheduler.monitor must be a validation metric where scheduler.interval is step, got {spec.monitor!r}, "
            "which arrives steps later; write interval: epoch"
        )


_LENGTHS: tuple[tuple[type[LRScheduler], str, str, str], ...] = (
    (OneCycleLR, "total_steps", "after which there is no rate", ""),
    (CosineAnnealingLR, "T_max", "after which the rate rises again", ", or take CosineAnnealingWarmRestarts"),
    (PolynomialLR, "total_iters", "after which the rate stays 0", ""),
)
"""Schedules that end: the attribute with their length, what happens after it, and what else to do."""


def _check_lengths(spec: SchedulerSpec, scheduler: LRScheduler, steps: StepPlan, keys: _Keys) -> None:
    """Raises a DescriptionError if the schedule, or one nested in it, is shorter than its time in the run."""
    run, _ = _ticks(spec, steps)
    for part, key, ticks in _with_ticks(scheduler, "scheduler", run, keys):
        for kind, name, consequence, alternative in _LENGTHS:
            if isinstance(part, kind):
                length = getattr(part, name)
                if not (isinstance(length, (int, float)) and length >= ticks):
                    of_run = "${plan.total_steps}" if spec.interval == "step" else "${train.epochs}"
                    raise DescriptionError(
                        f"{key}.{name} must be at least {ticks}, the {spec.interval}s that it runs for, got "
                        f"{length!r}, {consequence}; write {of_run if ticks == run else ticks}{alternative}"
                    )


def _with_ticks(scheduler: LRScheduler, key: str, ticks: int, keys: _Keys) -> Iterator[tuple[LRScheduler, str, int]]:
    """Yields the schedule and those nested in it, each with its key and how often it advances (never: 0 or less)."""
    yield scheduler, key, ticks
    if isinstance(scheduler, ChainedScheduler):
        for child in scheduler._schedulers:
            yield from _with_ticks(child, keys.get(child, key), ticks, keys)
    elif isinstance(scheduler, SequentialLR):
        begins = [0, *scheduler._milestones]
        if any(type(begin) is not int for begin in begins) or begins != sorted(begins):
            raise DescriptionError(
                f"{key}.milestones must be whole numbers in rising order, got {begins[1:]}; write for example [5, 10]"
            )
        for child, begin, end in zip(scheduler._schedulers, begins, [*begins[1:], ticks]):
            yield from _with_ticks(child, keys.get(child, key), min(end, ticks) - begin, keys)


def _landmarks(rates: Sequence[float]) -> list[int]:
    """Returns the positions of a few rates that show the course of all."""
    last = len(rates) - 1
    changes = [position for position in range(1, last + 1) if rates[position] != rates[position - 1]]
    if len(changes) <= 4:
        return [0, *changes]
    highest = max(range(last + 1), key=rates.__getitem__)
    return sorted({0, highest, last // 2, last})
