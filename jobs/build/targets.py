"""From a name in the description to an object: import, check the arguments, build.

Every mistake is a ``DescriptionError`` that begins with the key it was written under, so that the caller
need not know where in the description it stands.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from cluster.errors import DescriptionError, nearest, one_line
from jobs.build.shadowing import find_shadowed
from jobs.spec import PlanValue, Target


def resolve(path: str, key: str, bare_names: Sequence[ModuleType] = ()) -> Callable[..., Any]:
    """The callable that ``path`` names: a dotted import path, or a bare name of one of ``bare_names``."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        for module in bare_names:
            if callable(found := getattr(module, path, None)):
                return found
        if not bare_names:
            raise DescriptionError(f"{key}._target_ must be an import path such as package.module.Name, got {path!r}")
        where = " or ".join(module.__name__ for module in bare_names)
        known = [known for module in bare_names for known in dir(module) if known[0].isupper()]
        raise DescriptionError(
            f"{key}._target_ names nothing in {where}, got {path!r}{nearest(path, known)}; "
            "write one of its names, or the import path of your own"
        )
    shadowed = find_shadowed(path)
    if shadowed is not None and shadowed.has_it:
        raise DescriptionError(f"{key}._target_ {path!r}: {shadowed}")
    try:
        return _imported(path, key)
    except DescriptionError as error:
        if shadowed is None:
            raise
        raise DescriptionError(f"{key}._target_ {path!r}: {shadowed}") from error


def _imported(path: str, key: str) -> Callable[..., Any]:
    """The callable of a dotted import path."""
    module_name, _, name = path.rpartition(".")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise DescriptionError(
                f"{key}._target_ {path!r} imports {error.name!r}, which is not installed; install it"
            ) from error
        owner = _class_path(module_name, path, key, error)
    except Exception as error:  # the module is the user's own code: whatever it raises is told in one line
        raise DescriptionError(
            f"{key}._target_ {path!r}: importing {module_name} raised {type(error).__name__}: {one_line(error)}"
        ) from error
    found = getattr(owner, name, None)
    if found is None:
        raise DescriptionError(f"{key}._target_ {path!r}: {module_name} has no {name!r}{nearest(name, dir(owner))}")
    if not callable(found):
        raise DescriptionError(f"{key}._target_ {path!r} must be a class or a function, got {type(found).__name__}")
    return found


def _class_path(module_name: str, path: str, key: str, error: ModuleNotFoundError) -> Any:
    """The class in ``package.module.Class.method``, where ``package.module.Class`` is no module."""
    parent, _, name = module_name.rpartition(".")
    if parent:
        try:
            return getattr(importlib.import_module(parent), name)
        except (ModuleNotFoundError, AttributeError):
            pass  # the message below says that the path leads nowhere
    raise DescriptionError(
        f"{key}._target_ {path!r}: there is no module {error.name!r} beside the job file, "
        "in the working directory or installed; check the spelling"
    ) from error


def check_arguments(function: Callable[..., Any], names: Sequence[str], key: str, given: int = 0) -> None:
    """Raises if the callable does not take the named arguments beside ``given`` positional ones."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some C functions tell nothing; calling them will
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    parameters = parameters[min(given, len(positional)) :]  # *args takes what is given beyond
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for name in names:
            if name not in known:
                takes = ", ".join(known) or "no arguments"
                raise DescriptionError(
                    f"{key}.{name} is no argument of {_name(function)}{nearest(name, known)}; it takes {takes}"
                )
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in names
    ]
    if missing:
        raise DescriptionError(f"{key}.{missing[0]} is missing: {_name(function)} needs it; add it")


class Builder:
    """Builds targets, with the numbers that only the plan knows put in their places."""

    def __init__(self, plan_values: Callable[[PlanValue], int] | None = None) -> None:
        self._plan_values = plan_values

    def build(
        self,
        target: Target,
        key: str,
        *positional: Any,
        bare_names: Sequence[ModuleType] = (),
        nested: Callable[[Target, str], Any] | None = None,
    ) -> Any:
        """Calls the target with ``positional`` and its own arguments.

        Args:
            target: What to build.
            key: Where it stands in the description, for errors.
            positional: Arguments the product passes itself, such as the parameters of an optimizer.
            bare_names: Modules in which a name without dots is looked up.
            nested: How to build a target among the arguments; by default, by its import path.

        Raises:
            DescriptionError: The name, an argument or its value is wrong.
        """
        function = resolve(target.path, key, bare_names)
        build_nested = nested or (lambda inner, inner_key: self.build(inner, inner_key))
        arguments = {name: self._value(value, f"{key}.{name}", build_nested) for name, value in target.args.items()}
        if target.partial:
            return functools.partial(function, *positional, **arguments)
        check_arguments(function, list(arguments), key, given=len(positional))
        try:
            return function(*positional, **arguments)
        except DescriptionError:
            raise
        except Exception as error:  # a constructor's complaint about its arguments is the user's to read
            raise DescriptionError(
                f"{key}: {_name(function)} raised {type(error).__name__}: {one_line(error)}"
            ) from error

    def _value(self, value: Any, key: str, nested: Callable[[Target, str], Any]) -> Any:
        if isinstance(value, Target):
            return nested(value, key)
        if isinstance(value, PlanValue):
            if self._plan_values is None:
                raise DescriptionError(f"{key}: ${{plan...}} is not known here; it can be used in the scheduler")
            return self._plan_values(value)
        if isinstance(value, Mapping):
            return {name: self._value(item, f"{key}.{name}", nested) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._value(item, f"{key}[{number}]", nested) for number, item in enumerate(value)]
        return value


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
