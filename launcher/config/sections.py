"""Builds the dataclasses of a language from plain data: defaults, unknown keys, types.

Types are checked more strictly than OmegaConf checks them: nothing is converted except a whole number to a float. Each
error is a ``FieldError`` with the full key.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from keyword import iskeyword
from typing import Any, Literal

from cluster.errors import FieldError, nearest
from jobs.spec import NUMBER_FROM_TEXT, PlanValue, Target, list_in
from launcher.config.keys import join, show
from launcher.config.reference import (
    default_of,
    has_target,
    is_required,
    is_section,
    own_fields,
    shorthand_of,
    type_words,
    union_members,
)
from launcher.config.yaml_reader import FLOAT


def with_defaults(hint: Any, value: Any) -> Any:
    """Add defaults to each section of a value, in the order of the dataclass, with unknown keys last.

    A section with ``_target_`` has its arguments first. A value of a wrong type is left as it is; ``build_section``
    refuses it.
    """
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return [with_defaults(typing.get_args(hint)[0], item) for item in value]
    section = next((member for member in union_members(hint) if dataclasses.is_dataclass(member)), None)
    shorthand = shorthand_of(section)
    if isinstance(value, str) and shorthand and not _means_null(hint, value):
        value = value if "${" in value and shorthand == "_target_" else {shorthand: value}
    if not is_section(section) or not isinstance(value, dict):
        return value
    hints = typing.get_type_hints(section)
    complete: dict[str, Any] = {}
    for field in own_fields(section):
        item = value.get(field.name, default_of(field))
        if item is NO_DEFAULT and is_section(hints[field.name]) and not has_target(hints[field.name]):
            item = {}  # the section's own defaults; ``build_section`` names its missing keys
        if item is not NO_DEFAULT:
            complete[field.name] = with_defaults(hints[field.name], item)
    rest = {name: item for name, item in value.items() if name not in complete}
    return {**rest, **complete} if has_target(section) else {**complete, **rest}


def build_section(section: Any, value: dict[Any, Any], key: str) -> Any:
    """Build a dataclass; keys that are no fields go to its ``factory`` or ``args``, if it has that field.

    Raises:
        FieldError: A key is unknown or missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(section)
    own = {field.name: field for field in own_fields(section)}
    rest = {name: item for name, item in value.items() if name not in own}
    values: dict[str, Any] = {}
    if "factory" in hints:
        values["factory"] = _target(rest, key)
    elif "args" in hints:
        values["args"] = _arguments(rest, key)
    elif rest:
        name = next(iter(rest))
        suggestion = nearest(str(name), own) or f"; the keys here are {', '.join(own)}"
        raise FieldError(join(key, str(name) or "''"), f"is not a known key{suggestion}")
    for name, field in own.items():
        if name in value:
            if _means_null(hints[name], value[name]):
                raise _wrong_type(hints[name], value[name], join(key, name))
            values[name] = _value(hints[name], value[name], join(key, name))
        elif is_required(field):
            raise FieldError(join(key, name), f"is missing; write {type_words(hints[name])}")
    try:
        return section(**values)
    except FieldError as error:
        raise FieldError(join(key, error.key), error.problem) from error


def _value(hint: Any, value: Any, key: str) -> Any:
    """Build the value for a type; the value's own type must match, except that a whole number may be a float."""
    for member in union_members(hint):
        origin, items = typing.get_origin(member), typing.get_args(member)
        shorthand = shorthand_of(member)
        written = {shorthand: value} if shorthand and isinstance(value, str) else value
        if dataclasses.is_dataclass(member) and isinstance(written, dict):
            return _target(written, key) if member is Target else build_section(member, written, key)
        if origin is Mapping and isinstance(value, dict):
            return {str(name): _value(items[1], item, join(key, str(name))) for name, item in value.items()}
        if origin is tuple and isinstance(value, list):
            return tuple(_value(items[0], item, f"{key}[{index}]") for index, item in enumerate(value))
        if origin is Literal and value in items:
            return value
        if member is float and type(value) is int and abs(value) < 2**1000:  # a larger one overflows a float
            return float(value)
        if type(value) is member:
            return _text(value, key) if member is str else value
    raise _wrong_type(hint, value, key)


def _wrong_type(hint: Any, value: Any, key: str) -> FieldError:
    return FieldError(key, f"must be {type_words(hint)}, got {show(value)}{_advice(hint, value)}")


def _means_null(hint: Any, value: Any) -> bool:
    """Return whether a value is a word for null: Python's or, where the key may be null, that of another language."""
    if not isinstance(value, str):
        return False
    return value == "None" or (type(None) in union_members(hint) and value.lower() in ("none", "null", "nil"))


def _advice(hint: Any, value: Any) -> str:
    """Return the advice for a value of the wrong type."""
    members = union_members(hint)
    if isinstance(value, PlanValue):
        return "; only arguments of model, data, loss, optimizer and scheduler can wait for the plan"
    if type(None) in members and (value is False or _means_null(hint, value)):
        return "; write null"
    if value is None or _means_null(hint, value):
        return "; write it, or remove the key"
    if str in members and isinstance(value, (bool, int, float)):
        return "; quote it"
    literals = [member for member in members if typing.get_origin(member) is Literal]
    choices = [choice for literal in literals for choice in typing.get_args(literal)]
    if isinstance(value, str) and (suggestion := nearest(value, choices)):
        return suggestion
    if int in members and isinstance(value, float):
        return f"; write {int(value)}" if value.is_integer() else "; write a whole number"
    if (int in members or float in members) and isinstance(value, str) and re.fullmatch(FLOAT, value):
        return f"; {NUMBER_FROM_TEXT}"
    takes_list = any(typing.get_origin(member) is tuple for member in members)
    if takes_list and isinstance(value, str) and re.fullmatch(r"\(.*\)", value):
        return f"; write a list, {list_in(value) or f'[{value[1:-1]}]'}"
    return ""


def _target(value: dict[Any, Any], key: str) -> Target:
    written = dict(value)
    if "_target_" not in written:
        _arguments(written, key)  # raises the error for a misspelt _target_, if there is one
        raise FieldError(key, "has no _target_; write what to build, an import path such as package.Name")
    path, partial = written.pop("_target_"), written.pop("_partial_", False)
    if not isinstance(path, str) or not all(part.isidentifier() and not iskeyword(part) for part in path.split(".")):
        raise FieldError(join(key, "_target_"), f"must be an import path such as package.Name, got {show(path)}")
    if not isinstance(partial, bool):
        raise FieldError(join(key, "_partial_"), f"must be true or false, got {show(partial)}")
    return Target(path, _arguments(written, key), partial)


def _arguments(args: dict[Any, Any], key: str) -> dict[str, Any]:
    for name in [*_special(args), *args]:
        if name == "_args_":
            raise FieldError(join(key, name), "is not supported; write every argument by its name")
        if name in _special(args):
            raise FieldError(join(key, name), f"is not a known key{nearest(name, ['_target_', '_partial_'])}")
        if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
            raise FieldError(join(key, str(name)), f"cannot be an argument, got {name!r}; write a Python name")
    return {name: _argument(item, join(key, name)) for name, item in args.items()}


def _argument(value: Any, key: str) -> Any:
    """Build an argument: a scalar, a list, a mapping, a target, or a ``PlanValue``."""
    if isinstance(value, dict):
        if "_target_" in value:
            return _target(value, key)
        if special := _special(value):
            suggestion = nearest(special[0], ["_target_"])
            raise FieldError(join(key, special[0]), f"stands in a mapping without _target_{suggestion}")
        return {name: _argument(item, join(key, str(name))) for name, item in value.items()}
    if isinstance(value, list):
        return [_argument(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str):
        return _text(value, key)
    if value is None or isinstance(value, (bool, int, float, PlanValue)):
        return value
    raise FieldError(key, f"must be text, a number, true, false, null, a list or a mapping, got {show(value)}")


def _text(value: str, key: str) -> str:
    if "${plan." in value:
        raise FieldError(key, f"cannot be part of a text, got {value!r}; write ${{plan...}} alone")
    return value


def _special(mapping: dict[Any, Any]) -> list[str]:
    """Return the keys that look like ``_target_``."""
    return [name for name in mapping if isinstance(name, str) and re.fullmatch(r"_[a-z]+_", name)]
