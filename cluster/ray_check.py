"""The check of a Ray cluster's nodes, run there as a job: ``python -m cluster.ray_check``.

It reads what is needed from an environment variable, has every node that is alive look at itself, and prints what it
has learnt as one marked line, see ``cluster/node_check.py``. It takes no worker's place.
"""

import json
import os
import sys

from cluster import node_check, ray_cluster
from cluster.errors import ClusterError, LauncherError
from cluster.scheduler import Look, Needs, NodeReport

COMMAND = "command -v launcher >/dev/null || exit 127; exec python -P -m cluster.ray_check"
"""The line for the shell of a host of the cluster; it ends with 127 where there is no launcher, or no Python.

-P: a folder ``cluster`` in the working directory is not meant.
"""

_ANSWERS_S = 60.0
"""How long the nodes have for their answers: to start a process, and to try a store that may not answer."""


class NodeCheck:
    """An actor that looks at its node.

    It is pickled by value, for a node on which the product is missing is to say so. So its method uses nothing of this
    module, and its answer is JSON.
    """

    def examine(self, needs: str) -> str:
        """What the node has, as JSON: ``NodeReport`` without ``id`` and ``address``."""
        import json
        import platform

        import ray

        try:
            from cluster import node_check

            found = node_check.examine(node_check.needs_from(needs))
        except Exception as error:  # the border of the process: whatever is wrong with the product there is the answer
            why = f"launcher cannot be used there: {' '.join(str(error).split())}; install it on every node"
            python = ".".join(platform.python_version_tuple()[:2])
            versions = {"python": python, "torch": "unknown", "launcher": "none"}
            found = {"versions": versions, "missing": [], "store_error": why}
        found["versions"]["ray"] = ray.__version__
        return json.dumps(found)


def look(address: str, needs: Needs) -> Look:
    """What the cluster whose head listens at ``address``, HOST:PORT, has.

    Raises:
        ClusterError: It cannot be joined, or is gone.
    """
    with ray_cluster.joined_cluster(address):
        import ray
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[NodeCheck.__module__])
        capacity = ray_cluster.capacity()
        text = node_check.needs_text(needs)
        # An actor lives for as long as somebody refers to it.
        actors = [ray_cluster.actor_on(node.id, NodeCheck).remote() for node in capacity.nodes]
        asked = {actor.examine.remote(text): node for actor, node in zip(actors, capacity.nodes)}
        answered = set(ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWERS_S)[0])
        reports, silent = [], []
        for reference, node in asked.items():
            try:
                if reference not in answered:
                    raise ValueError(f"no answer within {_ANSWERS_S:g} s")
                told = {"id": node.id, "address": node.address, **json.loads(ray.get(reference))}
                reports.append(node_check.made(NodeReport, told))
            except (ray.exceptions.RayError, ValueError) as error:
                print(f"node {node.address}: {ray_cluster.last_line(error)}", file=sys.stderr)
                silent.append(node.address)
    return Look(capacity=capacity, nodes=reports, silent=silent)


def main() -> int:
    """Prints the result, or why there is none; returns the exit code."""
    try:
        address, needs = os.environ.get("RAY_ADDRESS"), os.environ.get(node_check.NEEDS_VARIABLE)
        if address is None or needs is None:
            raise ClusterError(f"RAY_ADDRESS or {node_check.NEEDS_VARIABLE} is not set; begin this as a job of Ray")
        line = node_check.marked(look(address, node_check.needs_from(needs)))
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    # In one piece, on a line of its own, whatever else is in the log.
    sys.stdout.write(f"\n{line}\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
