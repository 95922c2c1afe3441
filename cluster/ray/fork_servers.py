"""Fork servers on the nodes of a Ray cluster other than the driver's.

What an actor imports before it starts its server comes on top of every start, so this module needs next to nothing.
"""

from collections.abc import Sequence
from typing import Any, cast

from cluster.process import fork_server
from cluster.ray.cluster import actor_on


def host_on(node: str, modules: Sequence[str]) -> Any:
    """The actor that keeps a fork server on a node, imports done; it begins to live now, unless there is one.

    It lives as long as the handle that the first call for a node has returned, and so outlives agents: the next ones
    find the server warm. Its name is known in the driver's own namespace alone.

    Args:
        node: The id of the node.
        modules: What its server imports.
    """
    return actor_on(node, _Host, name=_name(node), get_if_exists=True).remote(modules)


def server_here() -> str | None:
    """The address of the server that a host keeps on the node of this process; none if there is no host."""
    import ray

    try:
        host: Any = ray.get_actor(_name(ray.get_runtime_context().get_node_id()))
    except ValueError:  # there is no such actor
        return None
    return cast("str | None", ray.get(host.address.remote()))


def _name(node: str) -> str:
    return f"launcher-host-{node}"


class _Host:
    """Keeps a server from which training processes are forked. An actor."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules
        fork_server.start(modules)

    def address(self) -> str | None:
        fork_server.start(self._modules)  # another one, if it has died
        return fork_server.own_address()
