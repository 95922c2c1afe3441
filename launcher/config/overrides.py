"""Overrides from the command line: ``key=value``; each sets the whole value of its key."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from cluster.errors import FieldError
from launcher.config.keys import clipped, join, show
from launcher.config.yaml_reader import read_yaml, refuse_python

_NAME = "value"
"""The key under which the value of an override is read."""


def key_of(override: str) -> str:
    """Return the key of an override as the user wrote it."""
    return override.partition("=")[0]


def set_override(job: dict[str, Any], override: str) -> str:
    """Set one ``key=value`` in the job, and return its full key."""
    key, equals, text = override.partition("=")
    path = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    if not equals or not all(part and part == part.strip() for part in path):
        raise FieldError("an override", f"must be key=value, got {override!r}")
    return _set(job, path, _override_value(key, text), "")


def refuse_python_in(override: str) -> None:
    """Refuse a value of Python, such as ``None``, in an override that ``set_override`` has set.

    Raises:
        FieldError: It has one.
    """
    key, _, text = override.partition("=")
    if not text.startswith("*"):
        with _named(key):
            refuse_python(f"{_NAME}: {text}")


def _override_value(key: str, text: str) -> Any:
    if not text.strip():
        raise FieldError(key, f"has no value; write {key}=null for none")
    if text.startswith("*"):  # a pattern and no YAML alias: one value has no anchor that an alias could refer to
        return text
    line = f"{_NAME}: {text}".rstrip()
    try:
        with _named(key):
            value = read_yaml(line)[_NAME]
        end = yaml.compose(line, Loader=yaml.SafeLoader).value[0][1].end_mark.index
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise FieldError(key, f"must be a YAML value, got {clipped(repr(text))}: {problem}; quote it") from error
    if end != len(line):  # YAML would drop what follows a # or a line break
        raise FieldError(key, f"must be one YAML value, got {clipped(repr(text))}; quote it")
    return value


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Put the key of an override in the place of ``_NAME`` in errors."""
    try:
        yield
    except FieldError as error:
        raise FieldError(key + error.key.removeprefix(_NAME), error.problem) from error


def _set(parent: Any, path: Sequence[str], value: Any, at: str) -> str:
    name, *rest = path
    index: str | int = name
    if isinstance(parent, list):
        key = f"{at}[{name}]"
        if not name.isdecimal() or int(name) >= len(parent):
            raise FieldError(key, f"does not exist, {at} has {len(parent)} items; write the whole list")
        index = int(name)
    elif isinstance(parent, dict):
        key = join(at, name)
        if rest and parent.get(name) is None:
            parent[name] = {}
    else:
        raise FieldError(at, f"is {show(parent)}, which has nothing in it to set; write the whole of {at}")
    if rest:
        return _set(parent[index], rest, value, key)
    parent[index] = value
    return key
