"""From ``optimizer`` and its groups to a torch optimizer over the model's parameters."""

import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.errors import DescriptionError, nearest
from jobs.spec import GroupSpec, OptimizerSpec
from jobs.targets import Builder, check_arguments, resolve

_TYPE_PREFIX = "type:"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that train alike.

    Attributes:
        pattern: The pattern that chose them; ``(rest)`` for those that no pattern matched.
        names: The parameters' names, in the model's order.
        args: Arguments of the optimizer for this group alone.
        from_epoch: The epoch from which they train; before it they are frozen.
    """

    pattern: str
    names: tuple[str, ...]
    args: dict[str, Any]
    from_epoch: int = 0


def group_parameters(model: nn.Module, groups: tuple[GroupSpec, ...]) -> list[ParameterGroup]:
    """Sorts the trainable parameters into groups; the first pattern that matches a parameter has it.

    Raises:
        DescriptionError: A pattern matches no parameter, or only ones that an earlier pattern has.
    """
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = []
    for number, group in enumerate(groups):
        matching = _matching(model, group.match)
        names = tuple(name for name in left if name in matching)
        if not names:
            key = f"optimizer.groups[{number}].match"
            if matching:
                raise DescriptionError(
                    f"{key} {group.match!r} matches only parameters that an earlier group has; move it up or drop it"
                )
            known = [name for name, _ in model.named_parameters()]
            raise DescriptionError(
                f"{key} matches no parameter, got {group.match!r}{nearest(group.match, known)}; "
                f"the model has {', '.join(known[:4])}{' ...' if len(known) > 4 else ''}"
            )
        found.append(ParameterGroup(group.match, names, dict(group.args), group.from_epoch or 0))
        left = [name for name in left if name not in names]
    return [*found, ParameterGroup("(rest)", tuple(left), {})] if left else found


def _matching(model: nn.Module, pattern: str) -> set[str]:
    if not pattern.startswith(_TYPE_PREFIX):
        return {name for name, _ in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)}
    kind = pattern.removeprefix(_TYPE_PREFIX)
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(base.__name__, kind) for base in type(module).__mro__)
        for name, _ in module.named_parameters(recurse=False)
    }


def build_optimizer(
    spec: OptimizerSpec, model: nn.Module, groups: list[ParameterGroup], builder: Builder
) -> torch.optim.Optimizer:
    """The optimizer over all groups; a frozen group is in it from the start, and is passed over without gradients.

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
        if group.pattern != "(rest)":
            check_arguments(function, sorted({*group.args, *spec.factory.args}), f"optimizer.groups[{number}]", given=1)
        torch_groups.append({"params": [parameters[name] for name in group.names], **group.args})
    return builder.build(spec.factory, "optimizer", torch_groups, bare_names=[torch.optim])


def set_trainable(model: nn.Module, groups: list[ParameterGroup], epoch: int) -> bool:
    """Freezes the groups whose epoch has not come; whether that changed any parameter."""
    parameters = dict(model.named_parameters())
    changed = False
    for group in groups:
        for name in group.names:
            trains = epoch >= group.from_epoch
            changed |= parameters[name].requires_grad != trains
            parameters[name].requires_grad_(trains)
    return changed
