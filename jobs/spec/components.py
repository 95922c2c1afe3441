"""The sections for the loss, the optimizer and its groups, the schedule and the initial weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cluster.errors import FieldError
from jobs.spec.checks import at_least, finite_numbers, learning_rate
from jobs.spec.target import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """A loss, and how output and target are converted for it."""

    factory: Target
    output: Literal["identity", "softmax", "log_softmax", "sigmoid"] = "identity"
    """What to apply to the model's output before the loss: nothing, or a function over classes (dimension 1)."""
    target: Literal["index", "one_hot", "float"] | None = None
    """How to convert targets before the loss: ``index``: to class numbers; ``one_hot``: class numbers to one-hot
    vectors as wide as the output; ``float``: to the output's type and shape; null: not at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """Parameter groups: the parameters whose names match a pattern, and what differs for them."""

    match: str
    """A shell pattern over parameter names, such as ``*.bias``; or ``type:PATTERN``, such as ``type:BatchNorm*``, for
    the parameters that belong directly to modules of matching classes. The first group that matches a parameter gets
    it."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Any argument of the optimizer, for this group only."""
    lr_scale: float | None = None
    """Factor on the optimizer's ``lr`` for this group."""
    from_epoch: int | None = None
    """The epoch, counted from 0, from which the group trains; it is frozen until then."""
    from_step: int | None = None
    """The number of optimizer steps after which the group trains; it is frozen until then."""

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
    """The optimizer and its parameter groups."""

    factory: Target
    groups: tuple[GroupSpec, ...] = ()

    def __post_init__(self) -> None:
        learning_rate(self.factory.args)
        finite_numbers(self.factory.args)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """The learning-rate schedule."""

    factory: Target
    interval: Literal["step", "epoch"] = "epoch"
    """When the schedule advances: after every optimizer step or every epoch. ReduceLROnPlateau advances after an epoch
    that measured its metric, or, with ``step``, after every validation."""
    monitor: str | None = None
    """The metric that ReduceLROnPlateau watches, such as ``val/loss`` or ``train/loss``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitSpec:
    """Initial weights from another run or a file."""

    SHORTHAND: ClassVar[str] = "url"

    url: str
    """The URL of a run, whose newest good checkpoint is used, of one checkpoint, or of a ``.safetensors`` file."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over tensor names in this model. Matching tensors are loaded; the source must have them."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over tensor names in this model. Matching tensors, such as a new head, keep their random initial
    weights."""
    weights: Literal["model", "ema"] = "model"
    """Which weights to load: the trained ones, or the moving average of a run with ``train.ema_decay``."""

    def __post_init__(self) -> None:
        if not self.url:
            raise FieldError("url", "must be the URL of a run, a checkpoint or a .safetensors file, got ''")
