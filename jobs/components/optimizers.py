"""Building the optimizer and its parameter groups."""

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.errors import DescriptionError, nearest
from jobs.components.targets import Builder, check_arguments, resolve
from jobs.components.texts import check_texts
from jobs.spec import GroupSpec, OptimizerSpec

_TYPE_PREFIX = "type:"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters with the same optimizer arguments.

    Attributes:
        pattern: The pattern that matched them; ``(rest)`` for those that no pattern matched.
        names: The parameters' names, in the model's order.
        args: Arguments of the optimizer for this group alone.
        lr_scale: Factor on the optimizer's learning rate.
        from_step: The number of completed steps from which they train; until then they are frozen.
    """

    pattern: str
    names: tuple[str, ...]
    args: Mapping[str, Any]
    lr_scale: float | None = None
    from_step: int = 0


def group_parameters(model: nn.Module, groups: tuple[GroupSpec, ...], steps_per_epoch: int) -> list[ParameterGroup]:
    """Puts each trainable parameter into the first group whose pattern matches its name.

    Args:
        model: The model.
        groups: The groups of the description.
        steps_per_epoch: Converts ``from_epoch`` to steps.

    Returns:
        The groups, and a last one for parameters that no pattern matches, if there are any.

    Raises:
        DescriptionError: A pattern matches no parameter, or only parameters that an earlier pattern matches or the
            model freezes; or two names of one tensor match different groups.
    """
    matching = [_matching(model, group.match) for group in groups]
    names_by_group: list[list[str]] = [[] for _ in range(len(groups) + 1)]  # the last one is for the rest
    for names in _trainable(model):
        first, *others = [
            next((number for number, matched in enumerate(matching) if name in matched), len(groups)) for name in names
        ]
        if any(other != first for other in others):
            raise DescriptionError(
                f"optimizer.groups put one tensor in two groups, got {' and '.join(names)}, which are tied; "
                "write a pattern for both"
            )
        names_by_group[first].append(names[0])
    found = []
    for number, group in enumerate(groups):
        if not names_by_group[number]:
            key = f"optimizer.groups[{number}].match"
            raise DescriptionError(_why_empty(model, key, group.match, matching[number]))
        from_step = group.from_step if group.from_epoch is None else group.from_epoch * steps_per_epoch
        found.append(
            ParameterGroup(group.match, tuple(names_by_group[number]), group.args, group.lr_scale, from_step or 0)
        )
    return [*found, ParameterGroup("(rest)", tuple(names_by_group[-1]), {})] if names_by_group[-1] else found


def _trainable(model: nn.Module) -> list[list[str]]:
    """Returns the names of each trainable tensor; a tied tensor has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return list(names.values())


def _why_empty(model: nn.Module, key: str, pattern: str, matched: set[str]) -> str:
    """Returns the error text for a group without parameters; ``matched``: the names that its pattern matches."""
    known = [name for name, _ in model.named_parameters()]
    if not matched:
        return (
            f"{key} matches no parameter, got {pattern!r}{nearest(pattern, known)}; "
            f"the model has {', '.join(known[:4])}{' ...' if len(known) > 4 else ''}"
        )
    if not any(name in matched for names in _trainable(model) for name in names):
        return f"{key} {pattern!r} matches only parameters that the model freezes itself; drop it, or let them train"
    return f"{key} {pattern!r} matches only parameters that an earlier group has; move it up or drop it"


def _matching(model: nn.Module, pattern: str) -> set[str]:
    """Returns the names of parameters that a pattern over names, or over module types, matches."""
    if not pattern.startswith(_TYPE_PREFIX):
        names = (name for name, _ in model.named_parameters(remove_duplicate=False))
        return {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    kind = pattern.removeprefix(_TYPE_PREFIX)
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules(remove_duplicate=False)
        if any(fnmatch.fnmatchcase(base.__name__, kind) for base in type(module).__mro__)
        for name, _ in module.named_parameters(recurse=False)
    }


def build_optimizer(
    spec: OptimizerSpec, model: nn.Module, groups: list[ParameterGroup], builder: Builder
) -> torch.optim.Optimizer:
    """Builds the optimizer over all groups.

    A frozen group is in it from the start; the optimizer skips its parameters, because they have no gradients.

    Raises:
        DescriptionError: The name, an argument or its value is wrong.
    """
    function = resolve(spec.factory.path, "optimizer", [torch.optim])
    if function is torch.optim.LBFGS:
        raise DescriptionError(
            "optimizer._target_ LBFGS evaluates the model several times in a step, which the loop does not offer; "
            "use a first-order optimizer"
        )
    parameters = dict(model.named_parameters())
    torch_groups = []
    for number, group in enumerate(groups):
        key = f"optimizer.groups[{number}]"
        if group.pattern != "(rest)":
            check_arguments(function, sorted({*group.args, *spec.factory.args}), key, given=1)
            check_texts(function, group.args, key)
        scaled = {} if group.lr_scale is None else {"lr": group.lr_scale * _base_rate(spec, function, key)}
        torch_groups.append({"params": [parameters[name] for name in group.names], **group.args, **scaled})
    optimizer: torch.optim.Optimizer = builder.build(spec.factory, "optimizer", torch_groups, bare_names=[torch.optim])
    return optimizer


def _base_rate(spec: OptimizerSpec, function: Callable[..., Any], key: str) -> float:
    """Returns the optimizer's learning rate, as written or by default."""
    default = inspect.signature(function).parameters.get("lr")
    rate = spec.factory.args.get("lr", default.default if default else None)
    if not isinstance(rate, (int, float)):
        raise DescriptionError(f"{key}.lr_scale needs an lr to scale; write optimizer.lr")
    return rate


def set_trainable(model: nn.Module, groups: Sequence[ParameterGroup], step: int) -> bool:
    """Freezes the groups whose ``from_step`` is after ``step``, unfreezes the others; returns whether any changed."""
    parameters = dict(model.named_parameters())
    changed = False
    for group in groups:
        for name in group.names:
            trains = step >= group.from_step
            changed |= parameters[name].requires_grad != trains
            parameters[name].requires_grad_(trains)
    return changed
