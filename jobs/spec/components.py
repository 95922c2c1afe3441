"""What a job is built from beside model and data: a loss, an optimizer with its groups, a schedule, first weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cluster.errors import FieldError
from jobs.spec.checks import at_least, finite_numbers, learning_rate
from jobs.spec.target import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """A loss, and what is made of output and target before it sees them."""

    factory: Target
    output: Literal["identity", "softmax", "log_softmax", "sigmoid"] = "identity"
    """Applied to the model's output first: nothing, or a function over its classes (dimension 1)."""
    target: Literal["index", "one_hot", "float"] | None = None
    """What the loss sees of a target: ``index``, class numbers as they are; ``one_hot``, a 1 at the class's place
    in zeros as wide as the output; ``float``, numbers of the output's type and shape; none: what the dataset gives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """One parameter group: the parameters whose names match, and what differs for them."""

    match: str
    """A shell pattern over parameter names such as ``*.bias``, or ``type:NORM`` for the own parameters of
    every module whose class name matches, such as ``type:BatchNorm*``. The first group that matches wins."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Any argument of the optimizer, for this group alone."""
    lr_scale: float | None = None
    """The group's rate is the optimizer's ``lr`` times this."""
    from_epoch: int | None = None
    """Frozen until this epoch (counted from 0) begins, then trained."""
    from_step: int | None = None
    """Frozen until this many optimizer steps are completed, then trained."""

    def __post_init__(self) -> None:
        at_least(self, 0, "from_epoch", "from_step")
        learning_rate(self.args)
        if self.from_epoch is not None and self.from_step is not None:
            raise FieldError("from_step", "cannot stand beside from_epoch; keep one of them")
        if self.lr_scale is not None and not 0 < self.lr_scale < math.inf:
            raise FieldError("lr_scale", f"must be finite and above 0, got {self.lr_scale}")
        if self.lr_scale is not None and "lr" in self.args:
            raise FieldError("lr_scale", "cannot stand beside lr; keep one of them")
        finite_numbers(self.args)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """An optimizer and its parameter groups."""

    factory: Target
    groups: tuple[GroupSpec, ...] = ()

    def __post_init__(self) -> None:
        learning_rate(self.factory.args)
        finite_numbers(self.factory.args)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """A learning-rate schedule."""

    factory: Target
    interval: Literal["step", "epoch"] = "epoch"
    """When the schedule advances: after every optimizer step, or after every epoch. ReduceLROnPlateau advances
    after every epoch that measured what it monitors; with ``step``, after every validation."""
    monitor: str | None = None
    """The metric that ReduceLROnPlateau watches, such as ``val/loss`` or ``train/loss``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitSpec:
    """Weights to begin with."""

    SHORTHAND: ClassVar[str] = "url"

    url: str
    """A run (its newest good checkpoint is taken), one checkpoint of a run, or a ``.safetensors`` file, anywhere."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over names in this model; what matches is loaded, and must be there."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over names in this model; what matches keeps its first, random weights, such as a new head."""
    weights: Literal["model", "ema"] = "model"
    """Of a run that keeps averaged weights: those it trained, or the average, which it validated with."""

    def __post_init__(self) -> None:
        if not self.url:
            raise FieldError("url", "must be the URL of a run, a checkpoint or a .safetensors file, got ''")
