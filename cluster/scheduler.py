"""The interface to a remote cluster: inspect it, start jobs on it, watch and stop them.

There is one subclass for each kind of cluster. A job is one shell command, ``launcher resume RUN_URL``; the same
command again continues the run. The run directory holds the state of the run; the scheduler adds only what is not
there: that the command has not started yet, or why it ended.
"""

import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from cluster.capacity import Capacity, Places
from cluster.errors import ClusterError, Interrupted, Requeued

JobStatus = Literal["pending", "running", "succeeded", "failed", "stopped"]
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "stopped")
"""The states of a job that has ended."""
STOPPED_CODES = (Requeued.exit_code, Interrupted.exit_code, 128 + signal.SIGTERM)
"""Exit codes of a job that has ended because it was asked to: its driver has saved, or had not begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as the cluster reports it.

    Attributes:
        id: The id that it was requested with.
        status: Its state. A job that its cluster starts again after a time limit, a preemption or the loss of a node
            is ``pending`` meanwhile, with the reason as ``message``.
        message: The cluster's explanation of the state, in one line; may be empty.
        exit_code: The exit code of the command; None while it runs, or if it never started.
        began_at: The Unix time at which it started; None before that.
        metadata: The metadata that it was requested with.
    """

    id: str
    status: JobStatus
    message: str
    exit_code: int | None
    began_at: float | None
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """A job to start.

    Attributes:
        id: Letters, digits, ``-`` and ``_``; must not be reused while the cluster is up.
        command: A command line for the shell. It finds the address of the head of its Ray cluster in RAY_ADDRESS.
        environment: Variables of the command and its child processes. Anyone with access to the cluster can read them,
            so they must hold no secrets.
        stop_grace_s: Seconds between the signal that stops the job and SIGKILL.
        metadata: Information for people who look at the cluster; a value unique to this request shows whether it
            started the job.
        places: What the workers reserve, for a cluster whose jobs bring their own nodes. None: not known yet, which
            only a cluster whose jobs start at once accepts.
        variables: The names of environment variables that the command needs.
    """

    id: str
    command: str
    environment: Mapping[str, str]
    stop_grace_s: int
    metadata: Mapping[str, str]
    places: Places | None = None
    variables: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What each node must have for a run.

    Attributes:
        store: The URL of the store, which each node must be able to write to and read from.
        variables: The names of environment variables that must be set.
        check: The folder in the store in which the node proves that it uses this same store, see
            ``cluster/inspection/store.py``.
        modules: The modules that training processes and the dry run import; a job on standby preloads them.
    """

    store: str
    variables: tuple[str, ...]
    check: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What a node found when it inspected itself.

    Attributes:
        id: The node's id, as in ``Capacity``.
        address: The address of its host.
        versions: The versions of ``python``, ``ray``, ``torch`` and ``launcher``, by these names; the one of
            ``launcher`` is a digest of its source.
        missing: The needed variables that are not set on the node.
        store_error: Why the node cannot use the store, in one line; empty if it can.
    """

    id: str
    address: str
    versions: Mapping[str, str]
    missing: tuple[str, ...]
    store_error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterReport:
    """What an inspection of a cluster found.

    Attributes:
        capacity: The nodes that are alive, and what the autoscaler may add.
        nodes: One report for each node that answered in time.
        silent: The addresses of the nodes that did not answer in time.
        warnings: What is not as a user would expect it, and no reason not to submit.
    """

    capacity: Capacity
    nodes: tuple[NodeReport, ...]
    silent: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class Scheduler(ABC):
    """Runs commands on a cluster for a process on any machine. The constructor makes no connection.

    Attributes:
        starts_at_once: A job starts as soon as it is begun, and never again. False: it may wait in a queue for days, is
            started again after a time limit, a preemption or the loss of a node, and brings its own nodes, which
            ``inspect`` then cannot ask.

    Every method raises ClusterError, in one line, if the cluster cannot be reached, refuses access or refuses the
    request. Every method returns in bounded time.
    """

    starts_at_once: ClassVar[bool]

    @abstractmethod
    def inspect(self, needs: Needs) -> ClusterReport:
        """Have each node inspect itself, and return the report; takes seconds, and reserves no resources.

        A cluster whose jobs do not start at once reports its capacity alone: its nodes inspect themselves in the job.
        """

    @abstractmethod
    def report(self, job_id: str) -> ClusterReport:
        """Wait for the report of a job that begins by inspecting the nodes, see ``cluster/inspection/nodes.py``.

        Raises:
            ClusterError: As for every method; or the job prints no report in time, or ends without one.
        """

    @abstractmethod
    def begin(self, request: JobRequest) -> Job:
        """Start a job, unless the cluster already has one with this id.

        The cluster decides this atomically: of several concurrent calls with the same id, one starts the job. If the
        answer to a call is lost, repeat the call.

        Returns:
            The job with this id, with the metadata of the call that started it.
        """

    @abstractmethod
    def script(self, request: JobRequest) -> str:
        """Return the batch script that ``begin`` would hand over.

        Raises:
            ClusterError: As for every method; or the cluster takes commands and no scripts.
        """

    def begin_array(self, requests: Mapping[int, JobRequest]) -> dict[int, Job]:
        """Start jobs as the tasks of one array, each with its number, except those that the cluster already has.

        Either all of them start or none does. If the answer to a call is lost, repeat the call.

        Returns:
            The jobs by their numbers.
        """
        raise ClusterError(f"{next(iter(requests.values())).id}: this kind of cluster has no arrays; submit each run")

    def has_any(self, requests: Mapping[int, JobRequest]) -> bool:
        """Return whether the cluster has any job that a call of ``begin_array`` has started for these requests."""
        there = [(self.read(each.id), each) for each in requests.values()]
        return any(job is not None and job.metadata == each.metadata for job, each in there)

    def array_script(self, requests: Mapping[int, JobRequest]) -> str:
        """Return the batch script that ``begin_array`` would hand over if the cluster had none of the jobs."""
        raise ClusterError(f"{next(iter(requests.values())).id}: this kind of cluster has no arrays; submit each run")

    @abstractmethod
    def read(self, job_id: str) -> Job | None:
        """Return the state of a job; None: the cluster does not know the id, or no longer."""

    @abstractmethod
    def jobs(self) -> list[Job]:
        """Return all jobs that were started through this interface, by any user, the oldest first."""

    @abstractmethod
    def stop(self, job_id: str) -> None:
        """Ask a job to save and end, with SIGKILL after its grace period; return without waiting for either.

        A job that has not started yet ends at once.
        """

    @abstractmethod
    def log(self, job_id: str) -> str:
        """Return what a job has written to stdout and stderr so far. The log can be lost with the job's host."""
