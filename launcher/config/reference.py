"""The reference texts of the job and cluster languages, generated from the dataclasses and their docstrings.

This module owns the words for types, which error texts share. It knows how a section is written in YAML, but reads no
YAML.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from jobs import spec

WIDTH = 100
INDENT = "  "

_TARGET_DOC = "An import path, or a bare name of torch's; every key not listed here is an argument of it."


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a language; ``depth`` is the number of sections around it."""

    key: str
    type: str
    default: Any
    required: bool
    doc: str
    depth: int
    is_section: bool = False


def describe(language: type = spec.JobSpec) -> str:
    """Return the whole language as an annotated YAML file; ``???`` marks required keys."""
    lines = _comment(language.__doc__, "")
    for entry in entries(language):
        if entry.depth == 0:
            lines.append("")
        indent = INDENT * entry.depth
        lines += _comment(entry.doc, indent)
        lines.append(indent + _annotated(entry))
    for special in (spec.Target, spec.PlanValue) if language is spec.JobSpec else ():
        lines += ["", *_comment(special.__doc__, "")]
    return "\n".join(lines)


def describe_json(language: type = spec.JobSpec) -> dict[str, dict[str, Any]]:
    """Return type in words, default, whether it is required, and docstring of each key."""
    return {
        entry.key: {"type": entry.type, "default": entry.default, "required": entry.required, "doc": entry.doc}
        for entry in entries(language)
    }


def entries(section: type = spec.JobSpec, prefix: str = "", depth: int = 0) -> Iterator[Entry]:
    """Yield every key in the order of the dataclasses, a section before its keys."""
    hints, docs = typing.get_type_hints(section), _docstrings(section)
    for field in dataclasses.fields(section):
        doc = docs.get(field.name, "")
        if field.name == "factory":
            yield Entry(f"{prefix}_target_", "text", None, True, _TARGET_DOC, depth)
            continue
        if field.name == "args":
            yield Entry(f"{prefix}<argument>", "any value", None, False, doc, depth)
            continue
        key, hint = f"{prefix}{field.name}", hints[field.name]
        inner = section_in(hint)
        required, default = _default(section, field, hint)
        doc = doc or (inspect.cleandoc(inner.__doc__ or "") if inner else "")
        yield Entry(key, type_words(hint), default, required, doc, depth, is_section=is_section(hint))
        if inner is not None:
            yield from entries(inner, f"{key}[]." if typing.get_origin(hint) is tuple else f"{key}.", depth + 1)


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself if it is no union."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_section(hint: Any) -> bool:
    """Return whether a type is written as a mapping whose keys are the fields of a dataclass."""
    return dataclasses.is_dataclass(hint) and hint is not spec.Target


def has_target(hint: Any) -> bool:
    """Return whether a type is written as a mapping with ``_target_``, with or without keys of its own."""
    return hint is spec.Target or (is_section(hint) and "factory" in hint.__dataclass_fields__)


def own_fields(section: Any) -> "list[dataclasses.Field[Any]]":
    """Return the fields of a section that are keys; ``factory`` and ``args`` hold the keys that are not fields."""
    return [field for field in dataclasses.fields(section) if field.name not in ("factory", "args")]


def is_required(field: "dataclasses.Field[Any]") -> bool:
    """Return whether a key must be written."""
    return field.default is MISSING and field.default_factory is MISSING


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """Return the default of a key as YAML has it; ``MISSING`` if the key has none, or is a section."""
    return list(field.default) if isinstance(field.default, tuple) else field.default


def shorthand_of(hint: Any) -> str | None:
    """Return the key that a text in place of a mapping sets; None if the type must be a mapping."""
    return "_target_" if has_target(hint) else getattr(hint, "SHORTHAND", None)


def section_in(hint: Any) -> Any:
    """Return the section that a type is, or has as a member of a union or as items of a tuple; None: no section."""
    members = typing.get_args(hint) if typing.get_origin(hint) is tuple else union_members(hint)
    return next((member for member in members if is_section(member)), None)


def type_words(hint: Any) -> str:
    """Return a type in words: what the user may write."""
    *others, last = [word for member in union_members(hint) for word in _words(member)]
    return f"{', '.join(others)} or {last}" if others else last


_PLURALS = {str: "text", int: "whole numbers"}


def _words(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    if typing.get_origin(hint) is tuple:
        return [f"a list of {_PLURALS.get(typing.get_args(hint)[0], 'mappings')}"]
    if has_target(hint):
        return ["a mapping with _target_"]
    if is_section(hint):
        return ["text", "a mapping"] if shorthand_of(hint) else ["a mapping"]
    if typing.get_origin(hint) is Mapping:
        return ["a mapping of names to mappings with _target_"]
    return [{int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]]


def _default(section: type, field: "dataclasses.Field[Any]", hint: Any) -> tuple[bool, Any]:
    """Return whether a key is required, and its default; the name of a job defaults to that of its file."""
    if section is spec.JobSpec and field.name == "name":
        return False, "the job file's stem"
    default = default_of(field)
    required = is_required(field) and (has_target(hint) or not is_section(hint))
    return required, None if default is MISSING else default


def _docstrings(section: type) -> dict[str, str]:
    """Return the docstring below each field; Python does not keep it, so it is read from the source."""
    found = {}
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:]):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                found[name] = " ".join(doc.split())
    return found


def _annotated(entry: Entry) -> str:
    name = entry.key.rpartition(".")[2]
    if entry.required:
        return f"{name}: ???  # required: {entry.type}"
    if entry.type == "any value":
        return f"{name}: any value"
    if entry.is_section and entry.default is None:
        return f"{name}:"
    return f"{name}: {_yaml(entry.default)}  # {entry.type}"


def _comment(doc: str | None, indent: str) -> list[str]:
    """Wrap a docstring into comment lines; an empty comment line separates paragraphs."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(doc or "").split("\n\n"):
        lines += ["#"] if lines else []
        lines += textwrap.wrap(paragraph, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    return lines


def _yaml(default: Any) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)
