"""The interface of a cluster that runs workers, as a command and its driver use it."""

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
    """A cluster that runs workers. The constructor costs nothing and makes no connection.

    A command enters ``joined`` first, and a driver enters ``started`` within that.
    """

    is_this_machine: bool
    """The cluster is this machine alone."""

    @abstractmethod
    def joined(self) -> AbstractContextManager[None]:
        """Join the cluster; a command stays in this context while it plans and trains.

        Raises:
            ClusterError: There is no such cluster, or it refuses this process.
        """

    @abstractmethod
    def import_ahead(self) -> None:
        """Start to import in the background what ``started`` and ``group`` need."""

    @abstractmethod
    def capacity(self) -> Capacity | None:
        """Within ``joined``: return what the cluster has and may get; None: it is this machine, which the plan knows.

        Raises:
            ClusterError: The cluster is gone.
        """

    @abstractmethod
    def inspect(self, needs: "Needs") -> "ClusterReport":
        """Within ``joined``: have each node inspect itself, and return the report.

        Raises:
            ClusterError: The cluster is gone, or takes no jobs.
        """

    @abstractmethod
    def call(self, call: "Call", tell: Callable[[str], None]) -> Any:
        """Within ``joined``: call a function in the place of one worker, with the resources that a worker reserves.

        Args:
            call: The function, and what it needs.
            tell: Called with a line about what the call waits for, where the function runs, or what it tells.

        Returns:
            What the function returns.

        Raises:
            ChildProcessError: The process died; the message says how.
            TimeoutError: The function exceeded its time limit.
            ClusterError: There was no room in time, the host cannot run the call, or hosts were lost.
            StorageError: The user's code cannot be fetched or unpacked there.
            Exception: What the function raises.
        """

    @abstractmethod
    def started(self) -> AbstractContextManager[None]:
        """Within ``joined``: start what workers need; a driver stays in this context as long as it has workers.

        Raises:
            ClusterError: The start failed.
        """

    @abstractmethod
    def prepare_group(self, entry: str, places: Places) -> None:
        """Within ``joined``: start early what ``group`` needs for the same entry and places; reserve no resources.

        Args:
            entry: The entry of each training process, see ``Task``.
            places: What the workers may reserve.
        """

    @abstractmethod
    def group(self, task: "Task", places: Places) -> "WorkerGroup":
        """Within ``started``: return the worker group of a run, without workers yet.

        Args:
            task: What each worker runs.
            places: What the workers may reserve.
        """

    @abstractmethod
    def nodes(self) -> list[Node]:
        """Within ``started``: return the nodes that are alive.

        Raises:
            ClusterError: The cluster is gone.
        """
