"""The kinds of cluster that run workers on Ray: Ray on this machine, started for one run, or a joined Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.capacity import Capacity, Node, NodeGroup, Places
from cluster.errors import ClusterError
from cluster.kinds.cluster import Cluster
from cluster.ray import cluster
from cluster.ray.session_folder import check_session_folder

if TYPE_CHECKING:
    from cluster.process.orders import Task
    from cluster.process.workplace import Call
    from cluster.ray.worker_group import WorkerGroup
    from cluster.scheduler import ClusterReport, Needs


class _OnRay(Cluster):
    """What both kinds share."""

    def import_ahead(self) -> None:
        cluster.import_ahead(joins=not self.is_this_machine)

    def nodes(self) -> list[Node]:
        return cluster.nodes()


class LocalRay(_OnRay):
    """Ray on this machine alone, which the driver starts and ends."""

    is_this_machine = True

    def __init__(self, num_cpus: int) -> None:
        """``num_cpus``: the CPU cores that all workers together may reserve."""
        self._num_cpus = num_cpus

    def joined(self) -> AbstractContextManager[None]:
        check_session_folder()
        return nullcontext()

    def capacity(self) -> None:
        return None

    def inspect(self, needs: "Needs") -> "ClusterReport":  # noqa: ARG002  # it takes no jobs
        raise ClusterError("this machine takes no jobs; give --cluster the HOST:PORT of a Ray head")

    def call(self, call: "Call", tell: Callable[[str], None]) -> Any:
        from cluster.process.workplace import call_here  # it imports the stores

        return call_here(call, tell)

    def started(self) -> AbstractContextManager[None]:
        return cluster.local_cluster(self._num_cpus)

    def prepare_group(self, entry: str, places: Places) -> None:
        pass  # Ray is not started yet

    def group(self, task: "Task", places: Places) -> "WorkerGroup":
        # It imports the stores, which a command that refuses its description does not need.
        from cluster.ray.worker_group import WorkerGroup

        group = WorkerGroup(task.entry, places, {}, is_shared=False, may_grow=False)
        group.assign(task)
        return group


class JoinedRay(_OnRay):
    """A running Ray cluster of which this host is a node."""

    is_this_machine = False

    def __init__(self, address: str, groups: Sequence[NodeGroup] = ()) -> None:
        """``address``: HOST:PORT of the head. ``groups``: the nodes that the autoscaler may start."""
        self._address = address
        self._groups = groups
        self._hosts: dict[str, Any] = {}
        """Actors that keep fork servers, by node id: workers use the server that a call started on their node."""
        self._prepared: tuple[tuple[str, Places], WorkerGroup] | None = None
        """A worker group not yet returned by ``group``, with the entry and places that it was prepared for."""

    @contextmanager
    def joined(self) -> Iterator[None]:
        with cluster.joined_cluster(self._address):
            try:
                yield
            finally:
                self._close_prepared()

    def capacity(self) -> Capacity:
        return cluster.capacity().declared(self._groups)

    def inspect(self, needs: "Needs") -> "ClusterReport":
        from cluster.ray.inspection import inspect_nodes  # it imports the stores

        return inspect_nodes(needs)

    def call(self, call: "Call", tell: Callable[[str], None]) -> Any:
        from cluster.ray.remote_call import call_there  # it imports the stores

        return call_there(call, self._hosts, tell)

    def started(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare_group(self, entry: str, places: Places) -> None:
        from cluster.ray.worker_group import WorkerGroup  # it imports the stores

        capacity = self.capacity()
        allowed = places
        if capacity.may_grow:  # an autoscaler adds nothing for a request that it can never satisfy
            allowed = replace(places, most=min(places.most, max(1, capacity.most(places.resources))))
        group = WorkerGroup(entry, allowed, self._hosts, is_shared=True, may_grow=capacity.may_grow)
        self._prepared = (entry, places), group

    def group(self, task: "Task", places: Places) -> "WorkerGroup":
        if self._prepared is None or self._prepared[0] != (task.entry, places):
            self._close_prepared()
            self.prepare_group(task.entry, places)
        assert self._prepared is not None
        group, self._prepared = self._prepared[1], None
        group.assign(task)
        return group

    def _close_prepared(self) -> None:
        if self._prepared is not None:
            self._prepared[1].close()
        self._prepared = None
