"""Inspection of the nodes of a Ray cluster, run there as a job: ``python -m cluster.ray.inspection``.

The job reads the needs from an environment variable, has every living node inspect itself, and prints the report as one
marked line, see ``cluster/inspection/nodes.py``. It reserves no resources.
"""

import json
import os
import sys

from cluster.errors import ClusterError, LauncherError
from cluster.inspection import nodes
from cluster.ray import cluster
from cluster.scheduler import ClusterReport, Needs, NodeReport
from cluster.storage.typed_json import from_json

COMMAND = "command -v launcher >/dev/null || exit 127; exec python -P -m cluster.ray.inspection"
"""The shell command of the job; its exit code is 127 if the host has no launcher or no Python.

-P keeps a folder named ``cluster`` in the working directory from being imported instead.
"""

_ANSWER_TIMEOUT_S = 60.0
"""Time limit for the nodes' answers: each starts a process and tries a store that may not respond."""


class NodeCheck:
    """Ray actor: inspects its node.

    The class is pickled by value, so that a node without the launcher can report that. Its method therefore uses
    nothing of this module, and returns JSON.
    """

    def inspect(self, needs: str, node_id: str) -> str:
        """Return the fields of ``NodeReport`` except ``id`` and ``address``, as JSON."""
        import json
        import platform

        import ray

        try:
            from cluster.inspection import nodes

            found = nodes.inspect_node(nodes.needs_from_text(needs), node_id)
        except Exception as error:  # the border of the process: any defect of the launcher is a finding
            why = f"launcher cannot be used there: {' '.join(str(error).split())}; install it on every node"
            python = ".".join(platform.python_version_tuple()[:2])
            versions = {"python": python, "torch": "unknown", "launcher": "none"}
            found = {"versions": versions, "missing": [], "store_error": why}
        found["versions"]["ray"] = ray.__version__
        return json.dumps(found)


def inspect_nodes(needs: Needs) -> ClusterReport:
    """Inspect the nodes of the cluster that this process has joined.

    Raises:
        ClusterError: Ray is gone.
    """
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[NodeCheck.__module__])
    capacity = cluster.capacity()
    text = nodes.needs_to_text(needs)
    # An actor lives only as long as something refers to it.
    actors = [cluster.actor_on(node.id, NodeCheck).remote() for node in capacity.nodes]
    asked = {actor.inspect.remote(text, node.id): node for actor, node in zip(actors, capacity.nodes)}
    answered = set(ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)[0])
    reports, silent = [], []
    for reference, node in asked.items():
        try:
            if reference not in answered:
                raise ValueError(f"no answer within {_ANSWER_TIMEOUT_S:g} s")
            answer = {"id": node.id, "address": node.address, **json.loads(ray.get(reference))}
            reports.append(from_json(NodeReport, json.dumps(answer)))
        except (ray.exceptions.RayError, ValueError) as error:
            print(f"node {node.address}: {cluster.last_line(error)}", file=sys.stderr)
            silent.append(node.address)
    return ClusterReport(capacity=capacity, nodes=tuple(reports), silent=tuple(silent))


def main() -> int:
    """Print the report to stdout, or the error to stderr; return the exit code."""
    try:
        needs, address = nodes.needs_of_environment(), os.environ.get("RAY_ADDRESS")
        if address is None:
            raise ClusterError("RAY_ADDRESS is not set; begin this as a job of Ray")
        with cluster.joined_cluster(address):
            report = inspect_nodes(needs)
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    sys.stdout.write(nodes.report_to_text(report))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
