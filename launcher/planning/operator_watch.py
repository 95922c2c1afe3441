"""Watches the operators that the dry run runs, and finds those that a GPU has no deterministic implementation of."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.errors import listed
from jobs.spec import TrainSpec
from launcher.planning.deterministic_ops import OPERATORS, operator_of

_FORWARD = {operator.forward for operator in OPERATORS.values()}


class OperatorWatch(TorchDispatchMode):
    """Passes on every operator of forward pass, backward pass and optimizer, and collects those of the table.

    Hooks of all modules tell which module of the model runs an operator. A backward pass has none, so its operators are
    told with the modules that ran the forward pass of the same operator for a gradient.
    """

    supports_higher_order_operators = True

    def __init__(self, train: TrainSpec, device: torch.device) -> None:
        super().__init__()
        self._train = train
        # A GPU compiles the model, and older versions of torch would not while a dispatch mode is on.
        self._is_on = train.deterministic and not (train.compile and device.type == "cuda")
        self._names: dict[int, str] = {}
        """The names of modules, by their identity."""
        self._running: list[nn.Module] = []
        """The modules whose forward pass runs, the innermost last."""
        self._differentiated: dict[str, dict[str, None]] = {}
        """The modules that ran an operator for a gradient, by its name, in order."""
        self._found: dict[str, dict[str, None]] = {}
        """The modules that ran an operator of the table, by its name, in order; there may be none."""
        self._otherwise: dict[str, None] = {}

    @contextmanager
    def over(self, roots: Iterable[tuple[str, nn.Module]], otherwise: str = "") -> Iterator[None]:
        """Watch what runs meanwhile, unless nothing could raise.

        Args:
            roots: Modules and their names; the modules in them are named by these.
            otherwise: The name for what runs outside of these modules; empty: it is not named.
        """
        if not self._is_on:
            yield
            return
        self._names = {
            id(module): f"{root_name}.{name}".rstrip(".")
            for root_name, root in roots
            for name, module in root.named_modules()
        }
        self._otherwise = {otherwise: None} if otherwise else {}
        begins = register_module_forward_pre_hook(lambda module, _: self._running.append(module))
        ends = register_module_forward_hook(self._module_ends, always_call=True)
        try:
            with self:
                yield
        finally:
            begins.remove()
            ends.remove()

    def found(self) -> tuple[str, ...]:
        """Return each operator of the table that was seen, the modules that ran it, and what to use instead."""
        return tuple(map(self._text, self._found))

    def describe(self, refused: str) -> str:
        """Return the same of an operator that raised, by the name that torch's error has for it."""
        names = (name for name in self._found if refused in OPERATORS[name].on_gpu)
        return next(map(self._text, names), refused)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What the user's code compiles itself stays compiled."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func.namespace == "aten":
            self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _module_ends(self, *_: Any) -> None:
        self._running.pop()

    def _note(self, func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in _FORWARD:
            has_gradient = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            if has_gradient and torch.is_grad_enabled():
                self._differentiated.setdefault(name, {}).update(self._innermost())
            return
        operator = operator_of(name, lambda: _by_name(func, args, kwargs))
        if operator is None:
            return
        modules = self._differentiated.get(operator.forward, {}) if operator.forward else self._innermost()
        if self._train.compile and operator.is_compiled_away and modules:
            modules = {module: None for module in modules if module.partition(".")[0] != "model"}
            if not modules:
                return
        self._found.setdefault(name, {}).update(modules)

    def _text(self, name: str) -> str:
        modules, instead = list(self._found[name]), OPERATORS[name].instead
        where = f" in {listed(modules, most=3)}" if modules else ""
        return f"{name}{where}" + (f" (instead: {instead})" if instead else "")

    def _innermost(self) -> dict[str, None]:
        """Return the name of the innermost module that runs and has one, if there is any."""
        names = (self._names.get(id(module)) for module in reversed(self._running))
        return dict.fromkeys([name for name in names if name is not None][:1]) or self._otherwise


def _by_name(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with the defaults of those that are left out."""
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {**defaults, **dict(zip((argument.name for argument in schema), args)), **kwargs}
