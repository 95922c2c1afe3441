"""What a description names to be built, and the numbers in it that only the plan knows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PlanValue:
    """A number that only the plan knows; it stands in a target's arguments until the plan puts the number there.

    ``${plan.total_steps}``: optimizer steps of the whole run. ``${plan.steps_per_epoch}``: optimizer steps of
    one epoch. ``${plan.steps:EPOCHS}``: optimizer steps in that many epochs.
    """

    name: str
    epochs: float | None = None

    def __str__(self) -> str:
        """The interpolation that it was written as."""
        return f"${{plan.{self.name}}}" if self.epochs is None else f"${{plan.{self.name}:{self.epochs}}}"


@dataclass(frozen=True, slots=True)
class Target:
    """An object to build: an import path (or a bare name of torch's) and its keyword arguments.

    Arguments are scalars, lists, mappings and further targets. Written in YAML as a mapping with
    ``_target_``; ``_partial_: true`` passes the callable itself on, with the arguments bound.
    """

    path: str
    args: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
