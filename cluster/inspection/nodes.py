"""Inspection of a cluster's nodes: what a node reports about itself, and how the report is transferred.

The report of all nodes is one marked line of JSON in the log of a job; reading it executes nothing. This module knows
no kind of cluster, and imports only what every process of the launcher imports.
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
"""Time limit for the store check of a node; shorter than the time limit for its answer."""


def inspect_node(needs: Needs, node_id: str) -> dict[str, Any]:
    """Check this host against the needs; return the fields of ``NodeReport`` except ``id`` and ``address``."""
    return {
        "versions": submission_versions(),
        # An empty value counts as missing.
        "missing": [name for name in needs.variables if not os.environ.get(name)],
        "store_error": store_error(needs, node_id),
    }


def store_error(needs: Needs, node_id: str) -> str:
    """Return why this process cannot read, write and delete in the submitter's store, in one line; empty if it can."""
    try:
        result_within(_STORE_TIMEOUT_S, start(lambda: answer(Store(needs.store), needs.check, node_id)))
    except StorageError as error:
        return one_line(error)
    except OverrunError as error:
        return f"{needs.store}: {error}; check the URL, and whether this host may reach it"
    return ""


def needs_to_text(needs: Needs) -> str:
    """Encode needs for ``NEEDS_VARIABLE``: JSON without ``$``, because Ray expands variables in it."""
    return json.dumps(asdict(needs)).replace("$", "\\u0024")


def needs_from_text(text: str) -> Needs:
    """Decode the value of ``NEEDS_VARIABLE``.

    Raises:
        ValueError: The text was not made by ``needs_to_text``.
    """
    return from_json(Needs, text)


def needs_of_environment() -> Needs:
    """Return the needs from ``NEEDS_VARIABLE``.

    Raises:
        ClusterError: The variable is not set, or another version of the launcher set it.
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
    """Encode a report as one marked line. Write it in one call, so that no other output splits it in the log."""
    return f"\n{_MARK}{json.dumps(asdict(report))}\n"


def report_from_log(log: str) -> ClusterReport | None:
    """Find and decode the report in the log of an inspection job; None: the log does not hold the whole report yet.

    Raises:
        ValueError: The log holds several reports, or ``report_to_text`` did not make the line.
    """
    whole = log[: log.rfind("\n") + 1]  # the job may still be writing the last line
    lines = [line.removeprefix(_MARK) for line in whole.splitlines() if line.startswith(_MARK)]
    if not lines:
        return None
    if len(lines) > 1:
        raise ValueError(f"there are {len(lines)} results")
    return from_json(ClusterReport, lines[0])


def without_report(log: str) -> str:
    """Return the log of a job without the line of the report, for people."""
    return re.sub(rf"\n{_MARK}.*\n", "", log)
