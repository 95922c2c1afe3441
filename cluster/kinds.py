"""Where a run finds its workers: one class for each kind of cluster, all with the methods of ``Cluster``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cluster import ray_cluster
from cluster.capacity import Capacity, Node, NodeGroup, Placement, WorkerResources

if TYPE_CHECKING:
    from cluster.agent import Task
    from cluster.ray_train import WorkerGroup
    from cluster.workplace import Call


class Cluster(ABC):
    """A cluster as a command and its driver see it. To make one costs nothing and reaches nobody."""

    is_this_machine: bool
    """It is this machine alone."""

    @abstractmethod
    def joined(self) -> AbstractContextManager[None]:
        """Entered by a command for as long as it plans and trains.

        Raises:
            ClusterError: There is no such cluster, or it does not let this process in.
        """

    @abstractmethod
    def import_ahead(self) -> None:
        """Begins to import what ``started`` and ``group`` need, for a process that has something else to wait for."""

    @abstractmethod
    def capacity(self) -> Capacity | None:
        """What a cluster that is joined has, and may get; none: it is this machine, of which the plan knows.

        Raises:
            ClusterError: It is gone.
        """

    @abstractmethod
    def call(self, call: "Call", tell: Callable[[str], None]) -> Any:
        """Makes a call in the place of one worker, within ``joined``: it has what a worker has, while no worker has it.

        Args:
            call: What to call.
            tell: Takes what is waited for, and where the function runs.

        Returns:
            What the function returns.

        Raises:
            ChildProcessError: The process died; the message says how.
            TimeoutError: The function took longer than it may.
            ClusterError: There was no room in time, the host is not fit for it, or hosts were lost.
            StorageError: The user's code cannot be had.
            Exception: What the function raises.
        """

    @abstractmethod
    def started(self) -> AbstractContextManager[None]:
        """Entered by a driver, within ``joined``, for as long as it has workers.

        Raises:
            ClusterError: It does not start.
        """

    @abstractmethod
    def group(self, task: "Task", resources: WorkerResources, most: int, placement: Placement) -> "WorkerGroup":
        """The way to the workers of a run, within ``started``; none is there yet.

        Args:
            task: What each worker is told.
            resources: What each reserves.
            most: The most workers there will be.
            placement: On how few or how many nodes they are to be.
        """

    @abstractmethod
    def nodes(self) -> list[Node]:
        """The nodes that are alive, within ``started``.

        Raises:
            ClusterError: It is gone.
        """


class _OnRay(Cluster):
    def import_ahead(self) -> None:
        ray_cluster.import_ahead(joins=not self.is_this_machine)

    def group(self, task: "Task", resources: WorkerResources, most: int, placement: Placement) -> "WorkerGroup":
        from cluster.ray_train import WorkerGroup  # and with it the stores, of which a wrong description needs none

        capacity = self.capacity()
        if capacity is not None and capacity.may_grow:  # an autoscaler brings nothing for what it can never satisfy
            most = min(most, max(1, capacity.most(resources)))
        return WorkerGroup(task, resources, most, placement, is_shared=not self.is_this_machine)

    def nodes(self) -> list[Node]:
        return ray_cluster.nodes()


class LocalRay(_OnRay):
    """Ray on this machine alone, which a driver starts and ends."""

    is_this_machine = True

    def __init__(self, num_cpus: int) -> None:
        """``num_cpus``: the cores that all workers together may reserve."""
        self._num_cpus = num_cpus

    def joined(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capacity(self) -> None:
        return None

    def call(self, call: "Call", tell: Callable[[str], None]) -> Any:  # noqa: ARG002  # nothing is waited for
        from cluster.workplace import call_here  # and with it the stores

        return call_here(call)

    def started(self) -> AbstractContextManager[None]:
        return ray_cluster.local_cluster(self._num_cpus)


class JoinedRay(_OnRay):
    """A Ray cluster that is up, and that this host is a node of."""

    is_this_machine = False

    def __init__(self, address: str, groups: Sequence[NodeGroup] = ()) -> None:
        """``address``: where its head listens, HOST:PORT. ``groups``: what its autoscaler may start."""
        self._address = address
        self._groups = groups
        self._hosts: dict[str, Any] = {}
        """What keeps fork servers on nodes that calls were made on: the workers there find them."""

    def joined(self) -> AbstractContextManager[None]:
        return ray_cluster.joined_cluster(self._address)

    def capacity(self) -> Capacity:
        return ray_cluster.capacity().declared(self._groups)

    def call(self, call: "Call", tell: Callable[[str], None]) -> Any:
        from cluster.ray_call import call_there  # and with it the stores

        return call_there(call, self._hosts, tell)

    def started(self) -> AbstractContextManager[None]:
        return nullcontext()
