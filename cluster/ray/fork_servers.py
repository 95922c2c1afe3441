"""Fork servers on the nodes of a Ray cluster other than the driver's.

An actor imports this module before it starts its server, which delays every start; so the module imports very little.
"""

from collections.abc import Sequence
from typing import Any, cast

from cluster.process import fork_server
from cluster.ray.cluster import actor_on


def host_on(node: str, modules: Sequence[str]) -> Any:
    """Return the actor that keeps a preloaded fork server on a node; start it unless the node has one.

    The actor lives as long as the handle that the first call for the node returned. So it outlives agents, and the next
    agents find the modules imported. Its name is visible in the driver's own namespace alone.

    Args:
        node: The id of the node.
        modules: The modules that its server preloads.
    """
    return actor_on(node, _Host, name=_name(node), get_if_exists=True).remote(modules)


def server_here() -> str | None:
    """Return the address of the fork server on this process's node; None if no actor keeps one there."""
    import ray

    try:
        host: Any = ray.get_actor(_name(ray.get_runtime_context().get_node_id()))
    except ValueError:  # there is no such actor
        return None
    return cast("str | None", ray.get(host.address.remote()))


def _name(node: str) -> str:
    return f"launcher-host-{node}"


class _Host:
    """Ray actor: keeps a fork server for the training processes of a node."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        fork_server.start(modules)

    def address(self) -> str | None:
        fork_server.start(self._modules)  # replace it if it has died
        return fork_server.own_address()
