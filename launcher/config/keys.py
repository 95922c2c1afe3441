"""Full keys such as ``optimizer.groups[0].lr``, and the text of values in errors and differences."""

from collections.abc import Iterator
from typing import Any

from jobs.spec import PlanValue


def join(key: str, name: str) -> str:
    """Return the full key of a name in a section; either may be empty."""
    return f"{key}.{name}" if key and name else key or name


def is_within(key: str, outer: str) -> bool:
    """Return whether a full key equals another or lies below it."""
    return key == outer or key.startswith((f"{outer}.", f"{outer}["))


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every value with its full key; a list of scalars is one value."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, join(key, str(name)))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def show(value: object) -> str:
    """Return a short text for a value, as it looks in YAML."""
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
    """Shorten a text to the length that an error quotes."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
