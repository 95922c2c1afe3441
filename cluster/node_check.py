"""The check of a cluster's nodes: what a node finds out about itself, and the line in which a cluster tells it.

The line goes through the log of a job, so it is marked, and it is JSON: who reads it executes nothing of it. This
knows of no kind of cluster, and needs nothing but what every process of the product needs.
"""

import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar

from cluster.deadline import OverrunError, result_within, start
from cluster.errors import StorageError, one_line
from cluster.scheduler import Look, Needs
from cluster.storage import Store
from cluster.versions import versions

T = TypeVar("T")

NEEDS_VARIABLE = "LAUNCHER_NODE_NEEDS"
"""The environment variable that tells the check what is needed."""

_MARK = "launcher-look: "
_STORE_S = 30.0
"""How long a node tries the store; less than its cluster waits for it."""


def examine(needs: Needs) -> dict[str, Any]:
    """What this process has of what is needed: ``NodeReport`` without what the cluster knows of the node."""
    return {
        "versions": versions(),
        # What is set to nothing is of no use either.
        "missing": [name for name in needs.variables if not os.environ.get(name)],
        "store_error": store_error(needs.store),
    }


def store_error(url: str) -> str:
    """Why an object cannot be written, read and deleted at a URL from here, in a line; empty: it can."""
    try:
        result_within(_STORE_S, start(lambda: Store(url).probe()))
    except StorageError as error:
        return one_line(error)
    except OverrunError as error:
        return f"{url}: {error}; check the URL, and whether this host may reach it"
    return ""


def needs_text(needs: Needs) -> str:
    """Needs as the value of ``NEEDS_VARIABLE``: JSON without a ``$``, which Ray would take for a variable."""
    return json.dumps(asdict(needs)).replace("$", "\\u0024")


def needs_from(text: str) -> Needs:
    """Needs from the value of ``NEEDS_VARIABLE``.

    Raises:
        ValueError: They are not what ``needs_text`` writes.
    """
    return made(Needs, json.loads(text))


def marked(look: Look) -> str:
    """What a cluster has as one line."""
    return _MARK + json.dumps(asdict(look))


def look_in(log: str) -> Look:
    """What a cluster has, from the log of the job that looked.

    Raises:
        ValueError: The line is not there once, or is not what ``marked`` writes.
    """
    lines = [line.removeprefix(_MARK) for line in log.splitlines() if line.startswith(_MARK)]
    if len(lines) != 1:
        raise ValueError(f"there are {len(lines)} results")
    return made(Look, json.loads(lines[0]))


def made(hint: type[T], told: Any, where: str = "") -> T:
    """A value of a type from what JSON holds: dataclasses from objects with exactly their fields, tuples from lists.

    Raises:
        ValueError: It is of another type, or a field is missing or unknown. A whole number is a number; NaN is none.
    """
    return typing.cast(T, _made(hint, told, where or "it"))


def _made(hint: Any, told: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(told, dict):
        names, hints = {field.name for field in fields(hint)}, typing.get_type_hints(hint)
        if names != told.keys():
            raise ValueError(f"{where} has other fields: {', '.join(sorted(names ^ told.keys()))}")
        return typing.cast(Any, hint)(**{name: _made(hints[name], told[name], f"{where}.{name}") for name in names})
    if origin is Mapping and isinstance(told, dict):
        return {name: _made(inner[1], value, f"{where}[{name}]") for name, value in told.items()}
    if origin in (tuple, Sequence) and isinstance(told, list):
        return tuple(_made(inner[0], value, f"{where}[{number}]") for number, value in enumerate(told))
    if NoneType in inner:
        (other,) = (each for each in inner if each is not NoneType)
        return None if told is None else _made(other, told, where)
    if hint is float and type(told) in (int, float) and not math.isnan(told):
        return float(told)
    if hint in (str, bool) and type(told) is hint:
        return told
    raise ValueError(f"{where} is {str(told)[:60]!r}")
