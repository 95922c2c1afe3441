"""What begins a run on a cluster from afar, and watches it: one class for each kind of cluster that can.

A run is begun there by one command, ``launcher resume RUN_URL``, and the same command again goes on with it. What the
scheduler knows of a job is only what the run directory does not say: that nobody drives the run yet, or why it ended.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.capacity import Capacity

JobStatus = Literal["pending", "running", "succeeded", "failed", "stopped"]
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "stopped")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a cluster says of a command.

    Attributes:
        id: What it was begun as.
        status: Where it is in its life.
        message: Why, as the cluster says it, in a line; may be empty.
        exit_code: Of the command; none while it runs, and if it did not get as far as that.
        began_at: Unix time; none: not yet.
    """

    id: str
    status: JobStatus
    message: str
    exit_code: int | None
    began_at: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What each node must have for a run.

    Attributes:
        store: The URL of the store, which each node must be able to write to and read from.
        variables: The names of environment variables that must be set.
    """

    store: str
    variables: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What a node that is alive has.

    Attributes:
        id: Of the node, as in ``Capacity``.
        address: Of its host.
        versions: Of ``python``, ``ray``, ``torch`` and ``launcher``, the last a digest, by these names.
        missing: The variables that are needed and not set there.
        store_error: Why the store cannot be used there, in a line; empty: it can.
    """

    id: str
    address: str
    versions: Mapping[str, str]
    missing: tuple[str, ...]
    store_error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a cluster has.

    Attributes:
        capacity: Its nodes and what it may get.
        nodes: What each of these has; those that did not answer in time are left out.
        silent: The addresses of those that did not.
    """

    capacity: Capacity
    nodes: Sequence[NodeReport]
    silent: Sequence[str]


class Scheduler(ABC):
    """Runs commands on a cluster, for a process anywhere. To make one costs nothing and reaches nobody.

    Every method raises ClusterError, in one line, if the cluster is not reached, does not let this process in, or does
    not do it; none waits without limit.
    """

    @abstractmethod
    def look(self, needs: Needs) -> Look:
        """Has each node look at itself; takes seconds, and room for no worker."""

    @abstractmethod
    def begin(
        self, job_id: str, command: str, environment: Mapping[str, str], *, save_s: int, metadata: Mapping[str, str]
    ) -> bool:
        """Begins a command on the cluster, unless one was begun as this before; returns whether it was not.

        The cluster decides, so that of many that ask at once one has it. After an answer that was lost, ask again.

        Args:
            job_id: Of letters, digits, ``-`` and ``_``; never used again while the cluster is up.
            command: A line for the shell.
            environment: Variables of the command and of all that it starts; no secrets, for everyone can read them.
            save_s: Seconds that the command has to end in order when it is stopped.
            metadata: For people who look at the cluster.
        """

    @abstractmethod
    def read(self, job_id: str) -> Job | None:
        """How a job is; none: this cluster knows of none, or knows no more."""

    @abstractmethod
    def jobs(self) -> list[Job]:
        """The jobs that were begun by whomever, the oldest first."""

    @abstractmethod
    def stop(self, job_id: str) -> None:
        """Has a job stopped, by SIGTERM, and SIGKILL after the seconds it was begun with; does not wait for that."""

    @abstractmethod
    def log(self, job_id: str) -> str:
        """What a job has written to stdout and stderr so far; it may be lost with its host."""
