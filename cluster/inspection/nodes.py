"""The inspection of a cluster's nodes: what a node reports about itself, and how the report travels.

The report of all nodes is one line in the log of a job. The line is marked, and it is JSON, so reading it executes
nothing. This module knows no kind of cluster and needs only what every process of the launcher needs.
"""

import json
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar

from cluster.errors import ClusterError, StorageError, one_line
from cluster.inspection.store import answer
from cluster.scheduler import ClusterReport, Needs
from cluster.storage.deadline import OverrunError, result_within, start
from cluster.storage.store import Store
from cluster.versions import submission_versions

T = TypeVar("T")

NEEDS_VARIABLE = "LAUNCHER_NODE_NEEDS"
"""The environment variable that carries the needs to the job."""

_MARK = "launcher-cluster-report: "
_STORE_TIMEOUT_S = 30.0
"""Time limit for the store check of a node; shorter than the time in which a node must answer."""


def inspect_node(needs: Needs, node_id: str) -> dict[str, Any]:
    """What the host of a node has of what is needed: the fields of ``NodeReport`` except ``id`` and ``address``."""
    return {
        "versions": submission_versions(),
        # A variable that is set to the empty string is of no use either.
        "missing": [name for name in needs.variables if not os.environ.get(name)],
        "store_error": store_error(needs, node_id),
    }


def store_error(needs: Needs, node_id: str) -> str:
    """Why this process cannot read, write and delete in the submitter's store, in one line; empty if it can."""
    try:
        result_within(_STORE_TIMEOUT_S, start(lambda: answer(Store(needs.store), needs.check, node_id)))
    except StorageError as error:
        return one_line(error)
    except OverrunError as error:
        return f"{needs.store}: {error}; check the URL, and whether this host may reach it"
    return ""


def needs_to_text(needs: Needs) -> str:
    """Encodes needs for ``NEEDS_VARIABLE``: JSON without ``$``, because Ray expands variables in it."""
    return json.dumps(asdict(needs)).replace("$", "\\u0024")


def needs_from_text(text: str) -> Needs:
    """Decodes the value of ``NEEDS_VARIABLE``.

    Raises:
        ValueError: The text was not made by ``needs_to_text``.
    """
    return from_json(Needs, json.loads(text))


def needs_of_environment() -> Needs:
    """The needs that this process was started with.

    Raises:
        ClusterError: There are none, or those of another version of the launcher.
    """
    text = os.environ.get(NEEDS_VARIABLE)
    if text is None:
        raise ClusterError(f"{NEEDS_VARIABLE} is not set; launcher submit sets it, begin this as a job of Ray")
    try:
        return needs_from_text(text)
    except ValueError as error:
        raise ClusterError(
            f"{NEEDS_VARIABLE}: {error}; install the same version of launcher here and on the cluster"
        ) from error


def report_to_text(report: ClusterReport) -> str:
    """Encodes a report as one marked line, to be written at once: other output in the log must not split it."""
    return f"\n{_MARK}{json.dumps(asdict(report))}\n"


def report_from_log(log: str) -> ClusterReport | None:
    """Finds and decodes the report in the log of the job that makes it; none: the log does not hold it, or not whole.

    Raises:
        ValueError: The log holds several, or the line was not made by ``report_to_text``.
    """
    whole = log[: log.rfind("\n") + 1]  # the job may be writing the last line
    lines = [line.removeprefix(_MARK) for line in whole.splitlines() if line.startswith(_MARK)]
    if not lines:
        return None
    if len(lines) > 1:
        raise ValueError(f"there are {len(lines)} results")
    return from_json(ClusterReport, json.loads(lines[0]))


def without_report(log: str) -> str:
    """The log of a job for people, who have no use for the report."""
    return re.sub(rf"\n{_MARK}.*\n", "", log)


def from_json(hint: type[T], value: Any, where: str = "") -> T:
    """Converts parsed JSON to a type: objects with exactly its fields to a dataclass, lists to tuples.

    Raises:
        ValueError: The value has another type, or a field is missing or unknown. An int is accepted as a float, NaN
            is not.
    """
    return typing.cast(T, _from_json(hint, value, where or "it"))


def _from_json(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint) and isinstance(value, dict):
        names, hints = {field.name for field in fields(hint)}, typing.get_type_hints(hint)
        if names != value.keys():
            raise ValueError(f"{where} has other fields: {', '.join(sorted(names ^ value.keys()))}")
        return typing.cast(Any, hint)(
            **{name: _from_json(hints[name], value[name], f"{where}.{name}") for name in names}
        )
    if origin is Mapping and isinstance(value, dict):
        return {name: _from_json(inner[1], each, f"{where}[{name}]") for name, each in value.items()}
    if origin in (tuple, Sequence) and isinstance(value, list):
        return tuple(_from_json(inner[0], each, f"{where}[{number}]") for number, each in enumerate(value))
    if NoneType in inner:
        (other,) = (each for each in inner if each is not NoneType)
        return None if value is None else _from_json(other, value, where)
    if hint is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if hint in (str, bool, int) and type(value) is hint:
        return value
    raise ValueError(f"{where} is {str(value)[:60]!r}")
