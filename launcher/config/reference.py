"""The languages of jobs and clusters as reference texts, read from the dataclasses and the docstrings in them.

It owns the words for types, which error messages share; it knows how a section is written in YAML, but reads no YAML.
"""

import ast
import dataclasses
import inspect
import sys
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
    """One key of the language; ``depth`` is the number of sections around it."""

    key: str
    type: str
    default: Any
    required: bool
    doc: str
    depth: int
    is_section: bool = False


def describe(language: type = spec.JobSpec) -> str:
    """The whole language, written like an annotated file; ``???`` marks what must be written."""
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
    """The same as data: key -> its type in words, default, whether it is required, and docstring."""
    return {
        entry.key: {"type": entry.type, "default": entry.default, "required": entry.required, "doc": entry.doc}
        for entry in entries(language)
    }


def entries(language: type = spec.JobSpec) -> Iterator[Entry]:
    """Every key of the language, a section before what is in it, in the order of the dataclasses."""
    return _entries(language, "", 0, _docstrings(language))


def union_members(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_section(hint: Any) -> bool:
    """Whether a type is written as a mapping whose keys are the fields of a dataclass."""
    return dataclasses.is_dataclass(hint) and hint is not spec.Target


def has_target(section: Any) -> bool:
    """Whether a section names an object to build beside its own keys."""
    return any(field.name == "factory" for field in dataclasses.fields(section))


def shorthand_of(hint: Any) -> str | None:
    """The key that is meant where a section is written as mere text; none if it cannot be."""
    if not is_section(hint):
        return None
    return "_target_" if has_target(hint) else getattr(hint, "SHORTHAND", None)


def section_in(hint: Any) -> Any:
    """The section that a type holds, itself or in a union or as the items of a tuple; or None."""
    members = typing.get_args(hint) if typing.get_origin(hint) is tuple else union_members(hint)
    return next((member for member in members if is_section(member)), None)


def type_words(hint: Any) -> str:
    """A type in words: what a person may write there."""
    *others, last = [word for member in union_members(hint) for word in _words(member)]
    return f"{', '.join(others)} or {last}" if others else last


_PLURALS = {str: "text", int: "whole numbers"}


def _words(hint: Any) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    if typing.get_origin(hint) is tuple:
        return [f"a list of {_PLURALS.get(typing.get_args(hint)[0], 'mappings')}"]
    if hint is spec.Target or (is_section(hint) and has_target(hint)):
        return ["a mapping with _target_"]
    if is_section(hint):
        return ["text", "a mapping"] if shorthand_of(hint) else ["a mapping"]
    if typing.get_origin(hint) is Mapping:
        return ["a mapping of names to mappings with _target_"]
    return [{int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]]


def _entries(section: type, prefix: str, depth: int, docs: Mapping[tuple[str, str], str]) -> Iterator[Entry]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        doc = docs.get((section.__name__, field.name), "")
        if field.name == "factory":
            yield Entry(f"{prefix}_target_", "text", None, True, _TARGET_DOC, depth)
            continue
        if field.name == "args":
            yield Entry(f"{prefix}<argument>", "any value", None, False, doc, depth)
            continue
        key, hint = f"{prefix}{field.name}", hints[field.name]
        inner = section_in(hint)
        required, default = _default(section, field)
        doc = doc or (inspect.cleandoc(inner.__doc__ or "") if inner else "")
        yield Entry(key, type_words(hint), default, required, doc, depth, is_section=is_section(hint))
        if inner is not None:
            items = "[]" if typing.get_origin(hint) is tuple else ""
            yield from _entries(inner, f"{key}{items}.", depth + 1, docs)


def _default(section: type, field: "dataclasses.Field[Any]") -> tuple[bool, Any]:
    """Whether the key must be written, and what it is when it is not; the description itself fills in two."""
    if section is spec.JobSpec and field.name == "name":
        return False, "the job file's stem"
    if section is spec.JobSpec and field.name == "data":
        return False, None
    if field.default is MISSING:
        return field.default_factory is MISSING, None
    return False, list(field.default) if isinstance(field.default, tuple) else field.default


def _docstrings(language: type) -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal below the field, which Python does not keep."""
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[language.__module__])).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:]):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                        found[node.name, name] = " ".join(doc.split())
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
    """A docstring as comment lines; paragraphs stay apart."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(doc or "").split("\n\n"):
        lines += ["#"] if lines else []
        lines += textwrap.wrap(paragraph, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    return lines


def _yaml(default: Any) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)
