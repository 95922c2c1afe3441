"""Learning-rate schedules: torch's own rates at every step, stopped or not, and what is refused."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cluster.errors import DescriptionError
from jobs.components.build import rates_digest
from jobs.components.schedules import Schedule, build_schedule, plan_value
from jobs.components.targets import Builder
from jobs.sampling import StepPlan
from jobs.spec import GroupSpec, OptimizerSpec, PlanValue, SchedulerSpec, ShuffleSpec, Target
from tests.states import decode, encode

HERE = __name__
STEPS = StepPlan(num_samples=50, global_batch=12, shards=4, epochs=3)
"""4 steps an epoch, 12 in all."""


# --- Functions and schedules of one's own ---


def halved(tick: int) -> float:
    return 1 / 2**tick


def decayed(tick: int, *, rate: float) -> float:
    return 1 / (1 + rate * tick)


def make_decay(rate: float) -> Callable[[int], float]:
    return lambda tick: 1 / (1 + rate * tick)


class Wave:
    """A callable with a state, which torch keeps."""

    def __init__(self, height: float) -> None:
        self.height = height
        self.calls = 0

    def __call__(self, tick: int) -> float:
        self.calls += 1
        return 1 + self.height * math.sin(self.calls + tick)


class Halving(LRScheduler):
    def __init__(self, own_name_for_the_optimizer: torch.optim.Optimizer, times: int) -> None:
        self.times = times
        super().__init__(own_name_for_the_optimizer)

    def get_lr(self) -> list[Any]:
        return [rate / 2 ** min(self.last_epoch, self.times) for rate in self.base_lrs]


def warm_up(optimizer: torch.optim.Optimizer, ticks: int) -> LRScheduler:
    return lr_scheduler.LambdaLR(optimizer, lambda tick: min(1.0, (tick + 1) / ticks))


# --- Driving ---


def optimizer_of(kind: str = "SGD", groups: int = 2) -> torch.optim.Optimizer:
    """Over groups with different rates."""
    parameters = [
        {"params": [nn.Parameter(torch.ones(2))], **({"lr": 0.2 * number} if number else {})}
        for number in range(groups)
    ]
    return torch.optim.AdamW(parameters, lr=1.0) if kind == "AdamW" else torch.optim.SGD(parameters, 1.0, momentum=0.9)


def build(
    optimizer: torch.optim.Optimizer, name: str, *, interval: Any = "epoch", monitor: str | None = None, **args: Any
) -> Schedule:
    spec = SchedulerSpec(factory=Target(name, args), interval=interval, monitor=monitor)
    return build_schedule(spec, optimizer, Builder(lambda value: plan_value(STEPS, value)), STEPS)


def val_loss(step: int) -> float | None:
    """Every second step and the end of an epoch are validated; the loss rises and falls."""
    return [3.0, 2.0, 2.0, 1.0, 1.0, 9.0][step // 2 % 6] if step % 2 == 0 else None


def advance(schedule: Schedule, step: int) -> None:
    """What the loop does once ``step`` steps are completed."""
    schedule.step_done()
    loss = val_loss(step)
    schedule.measured({} if loss is None else {"val/loss": loss}, ends_epoch=STEPS.ends_epoch(step))


def advance_plain(scheduler: LRScheduler, step: int, interval: str) -> None:
    """What a person writes into a loop of plain torch."""
    if isinstance(scheduler, ReduceLROnPlateau):
        loss = val_loss(step)
        if loss is not None and (interval == "step" or STEPS.ends_epoch(step)):
            scheduler.step(loss)
    elif interval == "step" or STEPS.ends_epoch(step):
        scheduler.step()


Moved = list[tuple[Any, ...]]
"""What a schedule moves, at every step: rate and momentum of every group."""


def train(optimizer: torch.optim.Optimizer, advance: Callable[[int], None], steps: range) -> Moved:
    moved: Moved = []
    for step in steps:
        moved.append(tuple((g["lr"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()
        advance(step + 1)
    return moved


def rates(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: range = range(12)) -> Any:
    """The first group's."""
    moved = train(optimizer, lambda step: advance(schedule, step), steps)
    return pytest.approx([of_groups[0][0] for of_groups in moved])


# --- Every class of torch's ---


@dataclass(frozen=True)
class Case:
    """A schedule as it is described, and as it is written in plain torch."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    plain: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    """None: the class of this name, called with these arguments."""
    monitor: str | None = None

    def plainly(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        if self.plain is not None:
            return self.plain(optimizer)
        return getattr(swa_utils if "." in self.name else lr_scheduler, self.name.rpartition(".")[2])(
            optimizer, **self.args
        )


def sequence(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
            lr_scheduler.CosineAnnealingLR(optimizer, 9, 0.01),
            lr_scheduler.ConstantLR(optimizer, 0.1, 9),
        ],
        [2, 11],
    )


SEQUENCE = {
    "milestones": [2, 11],
    "schedulers": [
        Target("LinearLR", {"start_factor": 0.1, "total_iters": 2}),
        Target("CosineAnnealingLR", {"T_max": 9, "eta_min": 0.01}),
        Target("ConstantLR", {"factor": 0.1, "total_iters": 9}),
    ],
}


def chain(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.MultiplicativeLR(optimizer, halved), lr_scheduler.StepLR(optimizer, 2)]
    )


CHAIN = {
    "schedulers": [Target("MultiplicativeLR", {"lr_lambda": f"{HERE}.halved"}), Target("StepLR", {"step_size": 2})]
}

EVERY = {
    "StepLR": Case("StepLR", {"step_size": 2, "gamma": 0.7}),
    "MultiStepLR": Case("MultiStepLR", {"milestones": [1, 5, 5, 9], "gamma": 0.7}),
    "ConstantLR": Case("ConstantLR", {"factor": 0.3, "total_iters": 2}),
    "LinearLR": Case("LinearLR", {"start_factor": 0.1, "end_factor": 0.9, "total_iters": 7}),
    "ExponentialLR": Case("ExponentialLR", {"gamma": 0.9}),
    "PolynomialLR": Case("PolynomialLR", {"total_iters": 12, "power": 2.0}),
    "CosineAnnealingLR": Case("CosineAnnealingLR", {"T_max": 12, "eta_min": 0.01}),
    "CosineAnnealingWarmRestarts": Case("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 2}),
    "CyclicLR": Case("CyclicLR", {"base_lr": 0.1, "max_lr": [1.0, 2.0], "step_size_up": 2, "mode": "triangular2"}),
    "CyclicLR, exp_range": Case(
        "CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 2, "mode": "exp_range", "gamma": 0.9}
    ),
    "CyclicLR, a function": Case(
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 2, "scale_fn": f"{HERE}.halved", "scale_mode": "iterations"},
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, 2, scale_fn=halved, scale_mode="iterations"),
    ),
    "OneCycleLR": Case("OneCycleLR", {"max_lr": [1.0, 2.0], "total_steps": 12}),
    "OneCycleLR, from epochs": Case(
        "OneCycleLR",
        {"max_lr": 1.0, "epochs": 3, "steps_per_epoch": 4, "three_phase": True, "anneal_strategy": "linear"},
    ),
    "LambdaLR": Case(
        "LambdaLR", {"lr_lambda": f"{HERE}.halved"}, lambda optimizer: lr_scheduler.LambdaLR(optimizer, halved)
    ),
    "LambdaLR, one a group": Case(
        "LambdaLR",
        {
            "lr_lambda": [
                Target(f"{HERE}.decayed", {"rate": 0.5}, partial=True),
                Target(f"{HERE}.make_decay", {"rate": PlanValue("steps_per_epoch")}),
            ]
        },
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, [make_decay(0.5), make_decay(4)]),
    ),
    "LambdaLR, a state": Case(
        "LambdaLR",
        {"lr_lambda": Target(f"{HERE}.Wave", {"height": 0.5})},
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, Wave(0.5)),
    ),
    "LambdaLR, a built-in function": Case(
        "LambdaLR", {"lr_lambda": "math.exp2"}, lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda tick: 2**tick)
    ),
    "MultiplicativeLR": Case(
        "MultiplicativeLR",
        {"lr_lambda": Target(f"{HERE}.decayed", {"rate": 0.5}, partial=True)},
        lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, make_decay(0.5)),
    ),
    "SequentialLR": Case("SequentialLR", SEQUENCE, sequence),
    "ChainedScheduler": Case("ChainedScheduler", CHAIN, chain),
    "ReduceLROnPlateau": Case(
        "ReduceLROnPlateau",
        {
            "mode": "max", "factor": 0.5, "patience": 0, "threshold": 0.1, "threshold_mode": "abs", "cooldown": 1,
            "min_lr": [0.1, 0.15], "eps": 1e-3,
        },
        monitor="val/loss",
    ),
    "SWALR": Case("torch.optim.swa_utils.SWALR", {"swa_lr": 0.05, "anneal_epochs": 5}),
    "a chain in a chain": Case(
        "ChainedScheduler",
        {"schedulers": [Target("ChainedScheduler", CHAIN), Target("ExponentialLR", {"gamma": 0.9})]},
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [chain(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        ),
    ),
    "a sequence in a chain": Case(
        "ChainedScheduler",
        {"schedulers": [Target("SequentialLR", SEQUENCE), Target("ExponentialLR", {"gamma": 0.9})]},
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [sequence(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        ),
    ),
    "a chain in a sequence": Case(
        "SequentialLR",
        {"milestones": [5], "schedulers": [Target("ChainedScheduler", CHAIN), Target("ExponentialLR", {"gamma": 0.9})]},
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer, [chain(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [5]
        ),
    ),
}  # fmt: skip


def test_every_class_that_torch_has_is_among_the_cases() -> None:
    """A class that a later torch brings has to be added above."""
    of_torch = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, LRScheduler) and found is not LRScheduler and not name.startswith("_")
    }
    assert of_torch == {case.name.rpartition(".")[2] for case in EVERY.values()}


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")  # plain torch's, of a chain in a sequence
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{name}, {kind}")
        for name, case in EVERY.items()
        for kind in ("SGD", "AdamW")
        if kind == "SGD" or case.name in ("CyclicLR", "OneCycleLR")  # they move momentum, which AdamW has in betas
    ],
)
class TestEveryClass:
    def test_it_moves_at_every_step_what_plain_torch_moves(self, case: Case, interval: str, kind: str) -> None:
        described, plain = optimizer_of(kind), optimizer_of(kind)
        schedule = build(described, case.name, interval=interval, monitor=case.monitor, **case.args)
        scheduler = case.plainly(plain)

        moved = train(described, lambda step: advance(schedule, step), range(12))

        assert moved == train(plain, lambda step: advance_plain(scheduler, step, interval), range(12))
        assert len(set(moved)) > 1, "the case moves nothing"

    def test_it_goes_on_from_a_checkpoint_as_if_undisturbed(self, case: Case, interval: str, kind: str) -> None:
        def fresh() -> tuple[torch.optim.Optimizer, Schedule]:
            optimizer = optimizer_of(kind)
            return optimizer, build(optimizer, case.name, interval=interval, monitor=case.monitor, **case.args)

        optimizer, undisturbed = fresh()
        expected = train(optimizer, lambda step: advance(undisturbed, step), range(12))

        moved: Moved = []
        optimizer, schedule = fresh()
        for begin, end in [(0, 1), (1, 3), (3, 4), (4, 6), (6, 11), (11, 12)]:
            moved += train(optimizer, lambda step: advance(schedule, step), range(begin, end))  # noqa: B023
            state = {"model": {}, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
            state = decode(encode(state))
            optimizer, schedule = fresh()
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["scheduler"])

        assert moved == expected


# --- When it advances ---


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
        schedule = build_schedule(None, optimizer, Builder(), STEPS)

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

    def test_numbers_of_the_plan_reach_nested_schedules(self) -> None:
        optimizer = optimizer_of()
        schedule = build(
            optimizer, "SequentialLR", interval="step", milestones=[PlanValue("steps_per_epoch")],
            schedulers=[
                Target("LinearLR", {"start_factor": 0.2, "total_iters": PlanValue("steps", 1.0)}),
                Target("MultiStepLR", {"milestones": [PlanValue("steps", 1.5)], "gamma": 0.5}),
            ],
        )  # fmt: skip

        assert rates(optimizer, schedule) == [0.2, 0.4, 0.6, 0.8] + [1.0] * 6 + [0.5] * 2

    def test_after_steps_that_were_skipped_too(self) -> None:
        """Torch would warn that the optimizer never stepped."""
        optimizer = optimizer_of()
        schedule = build(optimizer, "ExponentialLR", interval="step", gamma=0.5)
        for _ in range(3):
            schedule.step_done()

        assert optimizer.param_groups[0]["lr"] == 0.125

    @pytest.mark.parametrize(
        "name", [f"{HERE}.Halving", f"{HERE}.warm_up"], ids=["a class of one's own", "a function that returns one"]
    )
    def test_of_ones_own(self, name: str) -> None:
        optimizer = optimizer_of()
        args = {"times": 1} if name.endswith("Halving") else {"ticks": 2}

        assert rates(optimizer, build(optimizer, name, **args)) == (
            [1.0] * 4 + [0.5] * 8 if "times" in args else [0.5] * 4 + [1.0] * 8
        )


class TestPlateau:
    """Pauses are given as what they measured, an asterisk where they end an epoch."""

    @pytest.mark.parametrize(
        ("interval", "monitor", "pauses", "reductions"),
        [
            ("epoch", "val/loss", [("val/loss", 2.0, "*"), ("val/loss", 2.0, "*"), ("val/loss", 3.0, "*")], [0, 1, 2]),
            ("epoch", "val/loss", [("val/loss", 2.0, "*"), ("val/loss", 2.0, ""), ("val/loss", 1.0, "*")], [0, 0, 0]),
            ("epoch", "val/loss", [("val/loss", 2.0, "*"), ("train/loss", 2.0, "*"), ("val/loss", 2.0, "*")],
             [0, 0, 1]),
            ("epoch", "val/f1/3", [("val/f1/3", 2.0, "*"), ("val/loss", 2.0, "*"), ("val/f1/3", 2.0, "*")], [0, 0, 1]),
            ("epoch", "train/loss", [("train/loss", 2.0, "*"), ("val/loss", 2.0, ""), ("train/loss", 2.0, "*")],
             [0, 0, 1]),
            ("step", "val/loss", [("val/loss", 2.0, ""), ("val/loss", 2.0, "*"), ("val/loss", 2.0, "")], [0, 1, 2]),
            ("step", "val/loss", [("val/loss", 2.0, ""), ("train/loss", 2.0, "*"), ("val/loss", 1.0, "")], [0, 0, 0]),
            ("epoch", "val/loss", [("val/loss", 2.0, "*"), ("val/loss", math.nan, "*"), ("val/loss", 1.0, "*")],
             [0, 1, 1]),
        ],
        ids=[
            "every epoch", "a validation within an epoch", "an epoch without validation", "a metric of one's own",
            "a training metric", "every validation", "no validation", "NaN is no improvement",
        ],
    )  # fmt: skip
    def test_it_advances_where_its_metric_is_measured(
        self, interval: str, monitor: str, pauses: list[tuple[str, float, str]], reductions: list[int]
    ) -> None:
        optimizer = optimizer_of()
        schedule = build(optimizer, "ReduceLROnPlateau", interval=interval, monitor=monitor, patience=0, factor=0.5)

        counted = []
        for name, value, ends_epoch in pauses:
            schedule.step_done()
            schedule.measured({name: value}, ends_epoch=bool(ends_epoch))
            counted.append(-math.log2(optimizer.param_groups[0]["lr"]))

        assert counted == reductions


# --- What is refused ---


def nested(name: str, **args: Any) -> dict[str, Any]:
    return {"milestones": [5], "schedulers": [Target("ConstantLR"), Target(name, args)]}


MISTAKES = {
    "no metric": ("ReduceLROnPlateau", {},
        "scheduler.monitor is missing: ReduceLROnPlateau needs a metric to watch; write for example val/loss"),
    "a metric of steps": ("ReduceLROnPlateau", {"monitor": "train/loss", "interval": "step"},
        "scheduler.monitor must be a validation metric where scheduler.interval is step, got 'train/loss', which "
        "arrives steps later; write interval: epoch"),
    "a metric for nobody": ("ExponentialLR", {"gamma": 0.9, "monitor": "val/loss"},
        "scheduler.monitor is read by ReduceLROnPlateau alone, got 'val/loss'; remove it"),
    "a nested plateau": ("SequentialLR", nested("ReduceLROnPlateau") | {"monitor": "val/loss"},
        "scheduler: SequentialLR raised ValueError: SequentialLR does not support `ReduceLROnPlateau` scheduler as it "
        "requires additional kwargs to be specified when calling `step`, but got one at index 1 in the given "
        "schedulers sequence."),
    "a misspelt name": ("StepLr", {"step_size": 1},
        "scheduler._target_ names nothing in torch.optim.lr_scheduler, got 'StepLr' (did you mean 'StepLR'?); "
        "write one of its names, or the import path of your own"),
    "a missing argument": ("StepLR", {},
        "scheduler.step_size is missing: StepLR needs it; add it"),
    "an unknown argument": ("StepLR", {"step_size": 1, "gama": 0.5},
        "scheduler.gama is no argument of StepLR (did you mean 'gamma'?); it takes step_size, gamma, last_epoch"),
    "a missing argument of a nested one": ("SequentialLR", nested("StepLR"),
        "scheduler.schedulers[1].step_size is missing: StepLR needs it; add it"),
    "a value that torch refuses": ("OneCycleLR", {"max_lr": 1.0, "total_steps": -1},
        "scheduler: OneCycleLR raised ValueError: Expected positive integer total_steps, but got -1"),
    "no schedule": ("collections.Counter", {},
        "scheduler must be a torch.optim.lr_scheduler.LRScheduler, got Counter from collections.Counter; "
        "name a subclass of it, or a function that returns one"),
    "milestones that fall": ("SequentialLR", nested("ConstantLR") | {"milestones": [-5]},
        "scheduler.milestones must be whole numbers in rising order, got [-5]; write for example [5, 10]"),
    # Functions
    "a bare function": ("LambdaLR", {"lr_lambda": "halved"},
        "scheduler.lr_lambda._target_ must be an import path such as package.module.Name, got 'halved'"),
    "milestones as in Python": ("MultiStepLR", {"milestones": "(3, 8)"},
        "scheduler.milestones is text, got '(3, 8)'; write a list, [3, 8], without quotes"),
    "a function in place of its path": ("LambdaLR", {"lr_lambda": "lambda epoch: 0.95 ** epoch"},
        "scheduler.lr_lambda must be the import path of a function, got 'lambda epoch: 0.95 ** epoch'; write the "
        "function in a module beside the job file, and its path here, such as mine.decay"),
    "a misspelt function": ("LambdaLR", {"lr_lambda": f"{HERE}.halvd"},
        f"scheduler.lr_lambda._target_ '{HERE}.halvd': {HERE} has no 'halvd' (did you mean 'halved'?)"),
    "a misspelt function in a list": ("LambdaLR", {"lr_lambda": [f"{HERE}.halved", f"{HERE}.halvd"]},
        f"scheduler.lr_lambda[1]._target_ '{HERE}.halvd': {HERE} has no 'halvd' (did you mean 'halved'?)"),
    "a misspelt function of a nested one": ("SequentialLR", nested("MultiplicativeLR", lr_lambda=f"{HERE}.halvd"),
        f"scheduler.schedulers[1].lr_lambda._target_ '{HERE}.halvd': {HERE} has no 'halvd' (did you mean 'halved'?)"),
    "a function that needs more": ("LambdaLR", {"lr_lambda": f"{HERE}.decayed"},
        "scheduler.lr_lambda.rate is missing: decayed needs it; add it"),
    "a bound argument that it does not take": (
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 1.0, "scale_fn": Target(f"{HERE}.decayed", {"rat": 1}, partial=True)},
        "scheduler.scale_fn.rat is no argument of decayed (did you mean 'rate'?); it takes rate"),
    "a factory's missing argument": ("LambdaLR", {"lr_lambda": Target(f"{HERE}.make_decay")},
        "scheduler.lr_lambda.rate is missing: make_decay needs it; add it"),
    "a number for a function": ("LambdaLR", {"lr_lambda": 0.5},
        "scheduler.lr_lambda must be a function, got 0.5; write its import path"),
    "a factory that raises": ("LambdaLR", {"lr_lambda": Target("math.sqrt")},
        "scheduler.lr_lambda: sqrt raised TypeError: math.sqrt() takes exactly one argument (0 given)"),
    "no function from a factory": ("LambdaLR", {"lr_lambda": Target(f"{HERE}.halved", {"tick": 1})},
        "scheduler.lr_lambda must be a function, got float from " + HERE + ".halved; "
        "with _partial_: true the arguments are bound and the function itself is passed on"),
    # Schedules shorter than the run
    "a cycle": ("OneCycleLR", {"max_lr": 1.0, "total_steps": 11, "interval": "step"},
        "scheduler.total_steps must be at least 12, the steps that it runs for, got 11, after which there is no rate; "
        "write ${plan.total_steps}"),
    "a cycle of epochs": ("OneCycleLR", {"max_lr": 1.0, "epochs": 2, "steps_per_epoch": 4, "interval": "step"},
        "scheduler.total_steps must be at least 12, the steps that it runs for, got 8, after which there is no rate; "
        "write ${plan.total_steps}"),
    "a cosine": ("CosineAnnealingLR", {"T_max": 2},
        "scheduler.T_max must be at least 3, the epochs that it runs for, got 2, after which the rate rises again; "
        "write ${train.epochs}, or take CosineAnnealingWarmRestarts"),
    "a length in quotes": ("CosineAnnealingLR", {"T_max": "12"},
        "scheduler.T_max is text, got '12'; remove the quotes, or write ${oc.decode:${oc.env:NAME}} for a number from "
        "the environment"),
    "a polynomial in a sequence": (
        "SequentialLR", nested("PolynomialLR", total_iters=6) | {"interval": "step"},
        "scheduler.schedulers[1].total_iters must be at least 7, the steps that it runs for, got 6, after which the "
        "rate stays 0; write 7"),
    "a cosine before a milestone": (
        "SequentialLR",
        {"interval": "step", "milestones": [9], "schedulers": [Target("CosineAnnealingLR", {"T_max": 8}),
                                                               Target("ConstantLR")]},
        "scheduler.schedulers[0].T_max must be at least 9, the steps that it runs for, got 8, after which the rate "
        "rises again; write 9, or take CosineAnnealingWarmRestarts"),
    "a cosine in a chain in a sequence": (
        "SequentialLR",
        {"interval": "step", "milestones": [20],
         "schedulers": [Target("ChainedScheduler", {"schedulers": [Target(f"{HERE}.OwnCosine", {"T_max": 10})]}),
                        Target("ConstantLR")]},
        "scheduler.schedulers[0].schedulers[0].T_max must be at least 12, the steps that it runs for, got 10, after "
        "which the rate rises again; write ${plan.total_steps}, or take CosineAnnealingWarmRestarts"),
}  # fmt: skip


class OwnCosine(lr_scheduler.CosineAnnealingLR):
    """A subclass ends where its base does."""


class TestMistakes:
    @pytest.mark.parametrize(("name", "options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
    def test_a_mistake_is_one_line(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            build(optimizer_of(), name, **options)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("StepLR", {"step_size": 50}),
            ("LinearLR", {"total_iters": 2, "interval": "step"}),
            ("CosineAnnealingLR", {"T_max": 3}),
            ("CosineAnnealingLR", {"T_max": PlanValue("total_steps"), "interval": "step"}),
            ("CosineAnnealingWarmRestarts", {"T_0": 2, "interval": "step"}),
            ("SequentialLR", nested("CosineAnnealingLR", T_max=1)),
            ("SequentialLR", nested("CosineAnnealingLR", T_max=7) | {"interval": "step"}),
        ],
        ids=[
            "it changes nothing yet", "a warm-up", "exactly the run", "exactly the steps", "restarts",
            "what never begins", "what is left of the run",
        ],
    )  # fmt: skip
    def test_what_lasts_as_long_as_it_is_needed_is_fine(self, name: str, options: dict[str, Any]) -> None:
        build(optimizer_of(), name, **options)


# --- The preview ---


def fails_late(tick: int) -> float:
    return 1 / (8 - tick)


def turns_to_nan(tick: int) -> float:
    return math.nan if tick == 2 else 1.0


def turns_to_tensors(tick: int) -> Any:
    return torch.tensor(0.5) if tick else 0.5


class TestDigest:
    OPTIMIZER = OptimizerSpec(factory=Target("SGD", {"lr": 0.1, "momentum": 0.9}))
    SCHEDULER = SchedulerSpec(factory=Target("MultiStepLR", {"milestones": [2, 5], "gamma": 0.5}))

    def test_it_stays_what_it_is(self) -> None:
        """Checkpoints hold it: another one would have their schedules begin anew."""
        digest = rates_digest(self.OPTIMIZER, self.SCHEDULER, STEPS)
        assert digest == "v1-51563bb1977010ff1535e278bab91b97b2a14f759794b870994ae6a356e2157b"

    def test_the_order_of_arguments_is_not_in_it(self) -> None:
        optimizer = OptimizerSpec(factory=Target("SGD", {"momentum": 0.9, "lr": 0.1}))
        assert rates_digest(optimizer, None, STEPS) == rates_digest(self.OPTIMIZER, None, STEPS)

    def test_the_order_of_samples_is_not_in_it(self) -> None:
        steps = replace(STEPS, shuffle=ShuffleSpec(block=2, buffer=4))
        assert rates_digest(self.OPTIMIZER, None, steps) == rates_digest(self.OPTIMIZER, None, STEPS)

    def test_whatever_decides_the_rates_is_in_it(self) -> None:
        others = [
            (OptimizerSpec(factory=Target("SGD", {"lr": 0.1, "momentum": 0.8})), self.SCHEDULER, STEPS),
            (replace(self.OPTIMIZER, groups=(GroupSpec(match="*", lr_scale=0.5),)), self.SCHEDULER, STEPS),
            (self.OPTIMIZER, None, STEPS),
            (self.OPTIMIZER, replace(self.SCHEDULER, interval="step"), STEPS),
            (self.OPTIMIZER, self.SCHEDULER, replace(STEPS, epochs=4)),
        ]
        digests = {rates_digest(*other) for other in [*others, (self.OPTIMIZER, self.SCHEDULER, STEPS)]}
        assert len(digests) == len(others) + 1


class TestPreview:
    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("StepLR", {"step_size": 5, "interval": "step"}, [(1, 0.2), (6, 0.02), (11, 0.002)]),
            ("StepLR", {"step_size": 1}, [(1, 0.2), (5, 0.02), (9, 0.002)]),
            ("ConstantLR", {"factor": 1.0}, [(1, 0.2)]),
            ("SequentialLR",
             {"interval": "step", "milestones": [4],
              "schedulers": [Target("LinearLR", {"start_factor": 0.5, "total_iters": 4}),
                             Target("PolynomialLR", {"total_iters": 8})]},
             [(1, 0.1), (5, 0.2), (6, 0.175), (12, 0.025)]),
            ("ReduceLROnPlateau", {"monitor": "val/loss"}, []),
        ],
        ids=["few changes, by step", "few changes, by epoch", "no change", "many changes", "unforeseeable"],
    )  # fmt: skip
    def test_it_tells_the_rates_that_training_will_use(
        self, name: str, options: dict[str, Any], expected: list[tuple[int, float]]
    ) -> None:
        """Those of the last group."""
        previewed = build(optimizer_of(), name, **options).preview(STEPS)
        optimizer = optimizer_of()
        schedule = build(optimizer, name, **options)
        used = [of_groups[-1][0] for of_groups in train(optimizer, lambda step: advance(schedule, step), range(12))]

        assert [step for step, _ in previewed] == [step for step, _ in expected]
        assert [rate for _, rate in previewed] == pytest.approx([rate for _, rate in expected])
        assert [rate for _, rate in previewed] == [used[step - 1] for step, _ in previewed]

    def test_no_schedule_has_none(self) -> None:
        assert build_schedule(None, optimizer_of(), Builder(), STEPS).preview(STEPS) == ()

    def test_a_very_long_run_is_played_in_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("jobs.components.schedules._MOST_PLAYED", 20)
        schedule = build(optimizer_of(groups=2), "ExponentialLR", gamma=0.9, interval="step")

        assert [step for step, _ in schedule.preview(STEPS)] == [1, 5, 10]

    @pytest.mark.parametrize("length", [22, 385])
    def test_torchs_rounding_below_zero_is_no_negative_rate(self, length: int) -> None:
        options = {"start_factor": 1 / 3, "end_factor": 0.0, "total_iters": length}
        optimizer = optimizer_of(groups=1)
        optimizer.param_groups[0]["lr"] = 0.1
        steps = StepPlan(num_samples=400, global_batch=1, shards=1, epochs=1)
        spec = SchedulerSpec(factory=Target("LinearLR", options), interval="step")

        assert abs(build_schedule(spec, optimizer, Builder(), steps).preview(steps)[-1][1]) < 1e-15

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("LambdaLR", {"lr_lambda": f"{HERE}.fails_late"},
             "scheduler: LambdaLR raised ZeroDivisionError after step 8: division by zero"),
            ("SequentialLR",
             {"milestones": [3], "schedulers": [Target("ConstantLR"), Target("ChainedScheduler", CHAIN)]},
             "scheduler: SequentialLR raised NotImplementedError after step 3: it cannot go on from there"),
            ("LambdaLR", {"lr_lambda": f"{HERE}.turns_to_nan"},
             "scheduler: the rate of group 0 must be a finite number and at least 0, got nan at step 3; "
             "look at LambdaLR and its arguments"),
            ("LambdaLR", {"lr_lambda": [f"{HERE}.halved", "math.cos"]},
             "scheduler: the rate of group 1 must be a finite number and at least 0, got -0.08322936730942848 "
             "at step 3; look at LambdaLR and its arguments"),
            ("LambdaLR", {"lr_lambda": f"{HERE}.turns_to_tensors"},
             "scheduler: the rate of group 0 must be a finite number and at least 0, got 0.5 at step 2; "
             "look at LambdaLR and its arguments"),
        ],
        ids=["it raises", "torch raises", "not finite", "negative", "no number"],
    )  # fmt: skip
    def test_a_schedule_that_fails_on_the_way_is_refused(
        self, name: str, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(DescriptionError) as caught:
            build(optimizer_of(), name, interval="step", **options).preview(STEPS)
        assert str(caught.value) == message

    def test_a_failure_at_the_end_of_an_epoch_is_told_with_its_step(self) -> None:
        with pytest.raises(DescriptionError, match=r"raised ZeroDivisionError after step 8: float division by zero$"):
            build(optimizer_of(), "ConstantLR", factor=0.0, total_iters=2).preview(STEPS)
