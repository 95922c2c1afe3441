"""A cluster as a command and its driver see it: the interface of each kind of cluster that runs workers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cluster.capacity import Capacity, Node, Places

if TYPE_CHECKING:
    from cluster.process.orders import Task
    from cluster.process.workplace import Call
    from cluster.ray.worker_group import WorkerGroup
    from cluster.scheduler import ClusterReport, Needs


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
    def inspect(self, needs: "Needs") -> "ClusterReport":
        """Has each node inspect itself, within ``joined``.

        Raises:
            ClusterError: It is gone; or it is no cluster that jobs are submitted to.
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
    def prepare_group(self, entry: str, places: Places) -> None:
        """Begins to start what ``group`` with the same arguments needs, within ``joined``; holds no place.

        Args:
            entry: What each worker will run, see ``Task``.
            places: What the workers may have.
        """

    @abstractmethod
    def group(self, task: "Task", places: Places) -> "WorkerGroup":
        """The way to the workers of a run, within ``started``; none is there yet.

        Args:
            task: What each worker is told.
            places: What they may have.
        """

    @abstractmethod
    def nodes(self) -> list[Node]:
        """The nodes that are alive, within ``started``.

        Raises:
            ClusterError: It is gone.
        """
