"""Learning-rate schedules: when they advance, how they nest, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from cluster.errors import DescriptionError
from jobs.order import StepPlan
from jobs.schedules import Schedule, build_schedule, plan_value
from jobs.spec import PlanValue, SchedulerSpec, Target
from jobs.targets import Builder

STEPS = StepPlan(num_samples=50, global_batch=12, shards=4, epochs=3)


def optimizer_of() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)


def build(
    optimizer: torch.optim.Optimizer, name: str, *, interval: Any = "epoch", monitor: str | None = None,
    validates: bool = True, **args: Any,
) -> Schedule:  # fmt: skip
    spec = SchedulerSpec(factory=Target(name, args), interval=interval, monitor=monitor)
    return build_schedule(spec, optimizer, Builder(lambda value: plan_value(STEPS, value)), validates=validates)


def rates(
    optimizer: torch.optim.Optimizer, schedule: Schedule, val_losses: tuple[float | None, ...] = (1.0,) * 3
) -> list[float]:
    """The learning rate of every step of the run."""
    used = []
    for val_loss in val_losses:
        for _ in range(STEPS.steps_per_epoch):
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step_done()
        schedule.epoch_done({} if val_loss is None else {"val/loss": val_loss})
    return pytest.approx(used)


class TestPlanValues:
    @pytest.mark.parametrize(
        ("value", "number"),
        [
            (PlanValue("total_steps"), 12),
            (PlanValue("steps_per_epoch"), 4),
            (PlanValue("steps", 1.0), 4),
            (PlanValue("steps", 0.5), 2),
            (PlanValue("steps", 2.3), 9),
            (PlanValue("steps", 0.0), 0),
        ],
        ids=str,
    )
    def test_they_are_numbers_of_steps(self, value: PlanValue, number: int) -> None:
        result = plan_value(STEPS, value)

        assert (result, type(result)) == (number, int)


class TestIntervals:
    def test_no_schedule_is_a_constant_rate(self) -> None:
        optimizer = optimizer_of()
        schedule = build_schedule(None, optimizer, Builder(), validates=False)

        assert rates(optimizer, schedule) == [1.0] * 12
        assert schedule.state_dict() == {}

    def test_by_step(self) -> None:
        optimizer = optimizer_of()
        schedule = build(optimizer, "StepLR", interval="step", step_size=5, gamma=0.1)

        assert rates(optimizer, schedule) == [1.0] * 5 + [0.1] * 5 + [0.01] * 2

    def test_by_epoch(self) -> None:
        optimizer = optimizer_of()
        schedule = build(optimizer, "torch.optim.lr_scheduler.StepLR", step_size=1, gamma=0.1)

        assert rates(optimizer, schedule) == [1.0] * 4 + [0.1] * 4 + [0.01] * 4

    def test_on_a_plateau_of_what_it_monitors(self) -> None:
        """Lowered when the loss did not fall; an epoch without validation is passed over."""
        optimizer = optimizer_of()
        schedule = build(optimizer, "ReduceLROnPlateau", monitor="val/loss", patience=0, factor=0.1)

        assert rates(optimizer, schedule, (2.0, 2.0, None, 3.0, 1.0)) == [1.0] * 8 + [0.1] * 8 + [0.01] * 4


class TestNesting:
    def test_sequential_with_numbers_of_the_plan(self) -> None:
        optimizer = optimizer_of()
        schedule = build(
            optimizer, "SequentialLR", interval="step", milestones=[PlanValue("steps_per_epoch")],
            schedulers=[
                Target("LinearLR", {"start_factor": 0.2, "total_iters": PlanValue("steps", 1.0)}),
                Target("MultiStepLR", {"milestones": [PlanValue("steps", 1.5)], "gamma": 0.5}),
            ],
        )  # fmt: skip

        assert rates(optimizer, schedule) == [0.2, 0.4, 0.6, 0.8] + [1.0] * 6 + [0.5] * 2

    def test_chained(self) -> None:
        optimizer = optimizer_of()
        schedule = build(
            optimizer, "ChainedScheduler",
            schedulers=[
                Target("StepLR", {"step_size": 1, "gamma": 0.1}),
                Target("torch.optim.lr_scheduler.ConstantLR", {"factor": 0.5, "total_iters": 1}),
            ],
        )  # fmt: skip

        assert rates(optimizer, schedule) == [0.5] * 4 + [0.1] * 4 + [0.01] * 4

    def test_chained_within_chained(self) -> None:
        optimizer = optimizer_of()
        chained = Target("ChainedScheduler", {"schedulers": [Target("ExponentialLR", {"gamma": 0.5})]})
        constant = Target("ConstantLR", {"factor": 0.5, "total_iters": 9})
        schedule = build(optimizer, "ChainedScheduler", schedulers=[chained, constant])

        assert rates(optimizer, schedule) == [0.5] * 4 + [0.25] * 4 + [0.125] * 4

    def test_a_schedule_of_ones_own(self) -> None:
        optimizer = optimizer_of()
        schedule = build(optimizer, f"{__name__}.Halving", times=1)

        assert rates(optimizer, schedule) == [1.0] * 4 + [0.5] * 8

    def test_a_state_is_taken_up(self) -> None:
        undisturbed = optimizer_of()
        expected = rates(undisturbed, build(undisturbed, "ExponentialLR", interval="step", gamma=0.9))

        first, second = optimizer_of(), optimizer_of()
        before, after = (build(optimizer, "ExponentialLR", interval="step", gamma=0.9) for optimizer in (first, second))
        used = rates(first, before, (1.0,)).expected
        second.load_state_dict(first.state_dict())
        after.load_state_dict(before.state_dict())

        assert used + rates(second, after, (1.0, 1.0)).expected == expected


class Halving(lr_scheduler.LRScheduler):
    def __init__(self, optimizer: torch.optim.Optimizer, times: int) -> None:
        self.times = times
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [rate / 2 ** min(self.last_epoch, self.times) for rate in self.base_lrs]


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("ReduceLROnPlateau", {"monitor": "val/loss", "interval": "step"},
             "scheduler.interval must be epoch for ReduceLROnPlateau, which waits for a validation"),
            ("ReduceLROnPlateau", {},
             "scheduler.monitor must be val/loss or val/accuracy for ReduceLROnPlateau, got None"),
            ("ReduceLROnPlateau", {"monitor": "loss"},
             "scheduler.monitor must be val/loss or val/accuracy for ReduceLROnPlateau, got 'loss'"),
            ("ReduceLROnPlateau", {"monitor": "val/loss", "validates": False},
             "scheduler.monitor needs data.val to measure 'val/loss'; declare data.val"),
            ("ExponentialLR", {"gamma": 0.9, "monitor": "val/loss"},
             "scheduler.monitor is read by ReduceLROnPlateau alone, got 'val/loss'; remove it"),
            ("StepLr", {"step_size": 1},
             "scheduler._target_ names nothing in torch.optim.lr_scheduler, got 'StepLr' (did you mean 'StepLR'?); "
             "write one of its names, or the import path of your own"),
            ("StepLR", {},
             "scheduler.step_size is missing: StepLR needs it; add it"),
            ("StepLR", {"step_size": 1, "gama": 0.5},
             "scheduler.gama is no argument of StepLR (did you mean 'gamma'?); it takes step_size, gamma, last_epoch"),
            ("SequentialLR", {"milestones": [1], "schedulers": [Target("StepLR", {"step_size": 1}), Target("StepLR")]},
             "scheduler.schedulers[1].step_size is missing: StepLR needs it; add it"),
            ("OneCycleLR", {"max_lr": 1.0, "total_steps": -1},
             "scheduler: OneCycleLR raised ValueError: Expected positive integer total_steps, but got -1"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_one_line(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            build(optimizer_of(), name, **options)
        assert str(caught.value) == message
