"""Building an object that a description names: import it, check its arguments, call it.

Every mistake is a ``DescriptionError`` that begins with the key in the description.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from cluster.errors import DescriptionError, LauncherError, nearest, one_line
from jobs.components.shadowing import find_shadowed
from jobs.components.texts import check_texts
from jobs.spec import PlanValue, Target


def resolve(path: str, key: str, bare_names: Sequence[ModuleType] = ()) -> Callable[..., Any]:
    """Returns the callable that ``path`` names.

    Args:
        path: A dotted import path, or a bare name in one of ``bare_names``.
        key: Where it stands in the description, for errors.
        bare_names: Modules in which a name without dots is looked up.

    Raises:
        DescriptionError: The path names nothing, or nothing that can be called, or is ambiguous.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        for module in bare_names:
            found: Callable[..., Any] | None = getattr(module, path, None)
            if callable(found):
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
        return _import(path, key)
    except DescriptionError as error:
        if shadowed is None:
            raise
        raise DescriptionError(f"{key}._target_ {path!r}: {shadowed}") from error


def _import(path: str, key: str) -> Callable[..., Any]:
    """Returns the callable of a dotted import path; see ``resolve``."""
    module_name, _, name = path.rpartition(".")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise DescriptionError(
                f"{key}._target_ {path!r} imports {error.name!r}, which is not installed; install it"
            ) from error
        owner = _class_path(module_name, path, key, error)
    except Exception as error:  # the user's module may raise anything; the error shows it in one line
        raise DescriptionError(
            f"{key}._target_ {path!r}: importing {module_name} raised {type(error).__name__}: {one_line(error)}"
        ) from error
    found: Callable[..., Any] | None = getattr(owner, name, None)
    if found is None:
        raise DescriptionError(f"{key}._target_ {path!r}: {module_name} has no {name!r}{nearest(name, dir(owner))}")
    if not callable(found):
        raise DescriptionError(f"{key}._target_ {path!r} must be a class or a function, got {type(found).__name__}")
    return found


def _class_path(module_name: str, path: str, key: str, error: ModuleNotFoundError) -> Any:
    """Returns the class of ``package.module.Class.method``, because ``package.module.Class`` is not a module."""
    parent, _, name = module_name.rpartition(".")
    if parent:
        try:
            return getattr(importlib.import_module(parent), name)
        except (ModuleNotFoundError, AttributeError):
            pass  # the path leads nowhere, which the error below says
    raise DescriptionError(
        f"{key}._target_ {path!r}: there is no module {error.name!r} beside the job file, "
        "in the working directory or installed; check the spelling"
    ) from error


def check_arguments(function: Callable[..., Any], names: Sequence[str], key: str, given: int = 0) -> None:
    """Checks that a callable accepts the named arguments beside ``given`` positional ones, and needs no others.

    Raises:
        DescriptionError: It does not accept an argument, or needs one that is missing.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some C functions have no signature; a wrong call shows when they are built
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    parameters = parameters[min(given, len(positional)) :]  # *args takes the rest
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
    """Builds targets."""

    def __init__(self, plan_values: Callable[[PlanValue], int] | None = None) -> None:
        """``plan_values``: returns the number for ``${plan...}``; without it such a value is an error."""
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
            nested: Builds a target among the arguments, given its key; by default ``build`` does.

        Raises:
            DescriptionError: The name, an argument or its value is wrong.
            LauncherError: What it is built from is not there: a store of data does not answer, for example.
        """
        function = resolve(target.path, key, bare_names)
        build_nested = nested or (lambda inner, inner_key: self.build(inner, inner_key))
        check_texts(function, target.args, key)
        arguments = {name: self._value(value, f"{key}.{name}", build_nested) for name, value in target.args.items()}
        if target.partial:
            return functools.partial(function, *positional, **arguments)
        check_arguments(function, list(arguments), key, given=len(positional))
        try:
            return function(*positional, **arguments)
        except DescriptionError:
            raise
        except LauncherError as error:
            error.args = (f"{key}: {error}",)
            raise
        except Exception as error:  # the error shows the user what a constructor says of its arguments
            raise DescriptionError(
                f"{key}: {_name(function)} raised {type(error).__name__}: {one_line(error)}"
            ) from error

    def _value(self, value: Any, key: str, nested: Callable[[Target, str], Any]) -> Any:
        """Returns an argument with all targets and plan values in it replaced by what they stand for."""
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
