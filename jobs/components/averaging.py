"""The moving average of the weights, ``train.ema_decay``: it is validated, and saved beside the trained weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import DescriptionError, one_line
from jobs.components.buffers import copy_buffers

_PREFIX = "module."
_MAX_ERROR_CHARACTERS = 200
"""torch's texts about tensors that cannot be copied can fill a screen."""


class MovingAverage:
    """An exponential moving average of a model's parameters.

    In a step, an average moves by ``1 - decay`` of its distance from the weight. Types of 16 bits round most of such
    moves to nothing, so parameters of these types have averages in float32. The state dict has the names of torch's
    ``AveragedModel``, and holds the averages.

    Attributes:
        module: A copy of the model with the model's buffers, whose parameters are the averages in the model's types.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copies the model.

        Raises:
            DescriptionError: The model cannot be copied, or its state dict does not hold a parameter of 16 bits.
        """
        self.module = _copy_of(model)
        self._decay = decay
        self._num_updates = 0  # on the host: to read it from a GPU, the CPU would wait
        self._wide: dict[int, Tensor] = {}  # the averages in float32, by the identities of the copy's parameters
        groups: dict[torch.dtype, list[int]] = {}
        for number, parameter in enumerate(self.module.parameters()):
            groups.setdefault(parameter.dtype, []).append(number)
            if _is_narrow(parameter):
                self._wide[id(parameter)] = parameter.detach().float()
        self._groups = list(groups.values())
        held = {id(value) for value in self.module.state_dict(keep_vars=True).values()}
        for name, parameter in self.module.named_parameters():
            if id(parameter) in self._wide and id(parameter) not in held:
                raise DescriptionError(
                    f"train.ema_decay: the state dict of the model must hold {name}, whose average is kept in float32, "
                    "got another tensor or none; leave it to torch, or remove train.ema_decay"
                )

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Moves the averages towards the model's parameters and copies its buffers; the first update copies both.

        Only starts work on the GPU, and does not wait for it.
        """
        self._num_updates += 1
        if self._num_updates == 1:
            self.copy_from(model)
            return
        copies, current = list(self.module.parameters()), list(model.parameters())
        for group in self._groups:
            averages = [self._average(copies[number]) for number in group]
            values = [current[number].detach().to(average.dtype) for number, average in zip(group, averages)]
            if averages[0].is_floating_point() or averages[0].is_complex():
                torch._foreach_lerp_(averages, values, 1 - self._decay)
            else:
                torch._foreach_copy_(averages, values)
        self._round(copies)
        copy_buffers(model, self.module)

    @torch.no_grad()
    def copy_from(self, model: nn.Module) -> None:
        """Makes the averages, and the copy's buffers, equal to the model's."""
        copies = list(self.module.parameters())
        values = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_copy_([self._average(parameter) for parameter in copies], values)
        self._round(copies)
        copy_buffers(model, self.module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages, the copy's buffers and the number of updates; its tensors are the live ones."""
        state = self.module.state_dict(prefix=_PREFIX, keep_vars=True)
        live = {name: self._average(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        return {"n_averaged": torch.tensor(self._num_updates), **live}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what ``state_dict`` returned; averages of 16 bits, as torch's ``AveragedModel`` keeps them, fit too.

        Raises:
            RuntimeError, KeyError: The state belongs to another model.
        """
        averages = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        self.module.load_state_dict(averages)
        for name, value in self.module.state_dict(keep_vars=True).items():
            if id(value) in self._wide:
                self._wide[id(value)].copy_(averages[name])
        self._num_updates = int(state["n_averaged"])

    def _average(self, value: Tensor) -> Tensor:
        """Returns the average that a parameter of the copy is rounded from; any other tensor of the copy itself."""
        return self._wide.get(id(value), value.detach())

    def _round(self, copies: list[nn.Parameter]) -> None:
        """Rounds the float32 averages into the parameters of the copy."""
        narrow = [parameter for parameter in copies if id(parameter) in self._wide]
        if narrow:
            torch._foreach_copy_([each.detach() for each in narrow], [self._wide[id(each)] for each in narrow])


def _is_narrow(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize < 4


def _copy_of(model: nn.Module) -> nn.Module:
    """Returns a copy of a model.

    Raises:
        DescriptionError: Something in the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # copying runs the user's code, and each type raises its own errors
        what, reason = _find_uncopyable(model) or ("the model", error)
        raise DescriptionError(
            f"train.ema_decay averages a copy of the model, and {what} cannot be copied: {type(reason).__name__}: "
            f"{one_line(reason)[:_MAX_ERROR_CHARACTERS]}; make it in forward, as torch.nn.utils.parametrizations does, "
            "give its class a __deepcopy__, or remove train.ema_decay"
        ) from error


def _find_uncopyable(model: nn.Module) -> tuple[str, Exception] | None:
    """Returns the first attribute of a module that cannot be copied, and why; None if each can."""
    copied = {id(module): module for module in model.modules()}  # so that a reference to a module copies nothing
    for path, module in model.named_modules():
        for name, value in (vars(module) | module._parameters | module._buffers).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, dict(copied))
            except Exception as error:  # as above
                return f"{path}.{name}".removeprefix("."), error
    return None
