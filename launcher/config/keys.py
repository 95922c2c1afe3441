"""Full keys such as ``optimizer.groups[0].lr``, and values in the words of errors and differences."""

from collections.abc import Iterator
from typing import Any

from jobs.spec import PlanValue


def join(key: str, name: str) -> str:
    """The full key of a name in a section; either may be empty."""
    return f"{key}.{name}" if key and name else key or name


def is_within(key: str, outer: str) -> bool:
    """Whether a full key is another, or lies below it."""
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value with its key; a list of scalars is one value."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, join(key, str(name)))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def show(value: object) -> str:
    """A value as it looks in YAML, in a few words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, PlanValue):
        return str(value)
    return clipped(repr(value))


def clipped(text: str, limit: int = 80) -> str:
    """The text, or as much of it as an error quotes."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
