"""The inspection of a cluster's nodes: what a node reports about itself, and how the report travels.

The report of all nodes is one line in the log of a job. The line is marked, and it is JSON, so reading it executes
nothing. This module knows no kind of cluster and needs only what every process of the launcher needs.
"""

import json
import os
import re
from dataclasses import asdict
from typing import Any

from cluster.errors import ClusterError, StorageError, one_line
from cluster.inspection.store import answer
from cluster.scheduler import ClusterReport, Needs
from cluster.storage.deadline import OverrunError, result_within, start
from cluster.storage.store import Store
from cluster.storage.typed_json import from_json
from cluster.versions import submission_versions

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
    return from_json(Needs, text)


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
    return from_json(ClusterReport, lines[0])


def without_report(log: str) -> str:
    """The log of a job for people, who have no use for the report."""
    return re.sub(rf"\n{_MARK}.*\n", "", log)
