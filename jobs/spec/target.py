"""Objects to build that a description names, and numbers in it that only the plan knows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PlanValue:
    """A number that the plan computes, for arguments of the scheduler.

    ``${plan.total_steps}``: optimizer steps of the whole run. ``${plan.steps_per_epoch}``: optimizer steps of
    one epoch. ``${plan.steps:EPOCHS}``: optimizer steps in that many epochs.
    """

    name: str
    epochs: float | None = None

    def __str__(self) -> str:
        """Returns the interpolation as it was written."""
        return f"${{plan.{self.name}}}" if self.epochs is None else f"${{plan.{self.name}:{self.epochs}}}"


@dataclass(frozen=True, slots=True)
class Target:
    """An object to build: an import path, or a name in torch, and keyword arguments.

    It is written in YAML as a mapping with ``_target_``. Arguments are scalars, lists, mappings and further
    targets. ``_partial_: true`` passes on the callable itself, with the arguments bound.
    """

    path: str
    args: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
