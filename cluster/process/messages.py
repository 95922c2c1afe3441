"""Messages from the processes of a run to the driver, as frozen dataclasses. ``orders`` has those to the processes.

    training process  -- Beat, Report -->                              agent
    agent             -- Hello, StillHere, FromWorker, LogNotKept, Unkillable -->  driver
    Ray's controller  -- AgentsPlaced, AgentsUnplaced, AgentsLost             -->  driver

An agent forwards each ``Report`` unchanged in a ``FromWorker``, which adds rank and attempt. Messages of one sender
arrive in order. All values are plain or of ``cluster.errors``, so that every process can unpickle them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cluster.errors import Cause, LauncherError
from cluster.process.data_messages import DataDelayed, SampleSkipped
from cluster.process.placement_messages import AgentsLost, AgentsPlaced, AgentsUnplaced
from cluster.run.manifest import Share

Doing = Literal["start", "restore", "data", "forward", "backward", "validation", "storage", "exchange"]
"""Phase of a training process; within a step, in this order. A process in ``exchange`` waits for the others, so it is
the furthest of all that have completed the same step, and comes last."""
DOING: tuple[Doing, ...] = get_args(Doing)

Spent = Mapping[str, float]
"""Seconds since a training process began, by ``Doing``."""


# From a training process to its agent alone.


@dataclass(frozen=True, slots=True)
class Beat:
    """Heartbeat: the process lives, and this is its progress."""

    doing: Doing
    """The current phase."""
    step: int
    """The optimizer steps completed when the phase began."""
    is_first_step: bool
    """This process has not completed a step yet."""
    for_s: float
    """Seconds since the phase began."""
    spent: Spent
    """Seconds since the process began, by phase."""


# From a training process to the driver.


@dataclass(frozen=True, kw_only=True, slots=True)
class MeetingPlace:
    """Rank 0 has opened the store of the process group."""

    port: int
    """The port at which the store listens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentsCompared:
    """What decides the bits of this attempt, apart from the description. Rank 0 sends it for all."""

    workers: Sequence[Mapping[str, Any]]
    """The environments as stored in the run directory: one for each group of equal ranks."""
    differences: str
    """What differs between workers and where, in one line; empty if nothing does."""
    is_refused: bool
    """The workers do not train because of the differences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStarted:
    """The state is restored; the first step begins."""

    step: int
    """The optimizer steps that the state has completed."""
    spent: Spent
    """Seconds since the process began, by phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FellBack:
    """A checkpoint is bad, and the one before it is tried next. Rank 0 sends it for all."""

    step: int
    """The step of the bad checkpoint."""
    defect: str
    """What is wrong with it, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLogged:
    """A row of the metrics. Rank 0 sends it for all."""

    row: Mapping[str, Any]
    """The row as stored; it has ``step``, ``epoch`` and ``samples``."""
    time: float
    """The Unix time at which it was sent, by the worker's clock."""
    spent: Spent
    """Seconds since the process began, by phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixMeasured:
    """A matrix from a validation, such as a confusion matrix. Rank 0 sends it for all."""

    name: str
    """The name of the metric, such as ``val/confusion``."""
    step: int
    """The optimizer steps completed at the validation."""
    classes: Sequence[str]
    """The names of rows and columns."""
    values: Sequence[Sequence[float | None]]
    """Values by true class, then by predicted class; None where a value is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvent:
    """An event at a step, for the event log. Rank 0 sends it for all."""

    kind: Literal["step_skipped", "early_stop"]
    """An update was skipped because a value was not finite, or the run ends early because a metric stalled."""
    step: int
    """The optimizer steps completed."""
    reason: str
    """The reason in one line, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveSkipped:
    """All workers skip a checkpoint because this worker is still writing the previous one."""

    step: int
    """The step of the skipped checkpoint."""
    reason: str
    """The reason in one line, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareWritten:
    """A worker has written its share of a checkpoint."""

    share: Share
    """The step, the manifest entries of the parts written, and what is the same on all workers."""
    seconds: float
    """Seconds that hashing and writing took."""
    best_step: int | None
    """The step of the best checkpoint so far; None if no metric decides which is the best."""
    best_metric: float | None
    """The value of that metric at that step."""
    spent: Spent
    """Seconds by phase up to the step of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A worker has ended its work, and has written its share of every checkpoint."""

    step: int
    """The optimizer steps completed."""
    completed: bool
    """The run has no step left; False: it was stopped at this step."""
    spent: Spent
    """Seconds since the process began, by phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The error that ends a training process, from the process itself."""

    error: type[LauncherError]
    """Its class in the tree of ``cluster.errors``."""
    cause: Cause
    """The kind of failure, on which the driver's decision depends."""
    message: str
    """The error in one line, for people."""
    step: int | None
    """The optimizer steps completed; None: every worker would fail in the same way."""
    place: str
    """The step and line at which the user's code failed; empty if the failure was not in the user's code."""
    traceback: str
    """The traceback through the user's code, or empty."""


# From an agent to the driver, about its training process.


@dataclass(frozen=True, kw_only=True, slots=True)
class Exited:
    """How a training process ended."""

    exit_code: int | None
    """Negative: the number of the signal that killed it. None: its fork server died, so the exit code is unknown."""
    oom_kill: bool
    """The kernel has just killed a process because memory ran out."""
    step: int
    """The optimizer steps completed at its last heartbeat."""
    log_tail: str
    """The last lines that it printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpent:
    """The seconds of a training process by phase; comparing the processes shows which is the straggler."""

    step: int
    """The optimizer steps completed."""
    spent: Spent
    """Seconds since the process began, by phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hung:
    """A training process has made no progress for longer than its time limit."""

    step: int
    """The optimizer steps completed."""
    doing: Doing
    """The phase in which it stands still."""
    is_first_step: bool
    """It has not completed a step yet, so ``first_step_timeout_s`` is its limit."""
    for_s: float
    """Seconds without progress."""
    is_silent: bool
    """It sends no heartbeats either: it is stopped, or its host gives it no processor time."""
    stack: str
    """The Python stack, innermost call first; for a silent process, the state line that Linux reports."""
    data_delay: str = ""
    """If it reads data: what it, or a loader process of it, has said of a store that does not answer; or empty."""
    on_gpu: bool = False
    """It computes on a GPU, for which it waits at whatever line needs a result."""


@dataclass(frozen=True, slots=True)
class GoesOn:
    """A training process reported as hung makes progress again."""


Report = (
    MeetingPlace
    | EnvironmentsCompared
    | TrainingStarted
    | FellBack
    | RowLogged
    | MatrixMeasured
    | StepEvent
    | SampleSkipped
    | DataDelayed
    | SaveSkipped
    | ShareWritten
    | Finished
    | Failed
    | Exited
    | TimeSpent
    | Hung
    | GoesOn
)
"""A message from or about one training process."""


@dataclass(frozen=True, slots=True)
class FromWorker:
    """A report with the rank and attempt of its training process."""

    rank: int
    """The rank of the training process."""
    attempt: int
    """The attempt of the training process, from 0."""
    report: Report
    """The report, unchanged."""


# From an agent to the driver, about itself.


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """An agent has started."""

    rank: int
    """The rank of this agent."""
    id: str
    """A unique id of this agent."""
    generation: int
    """How often the agents of the run were started, this start included."""
    node: str
    """The id of its node."""
    address: str
    """The address of its node."""
    pid: int
    """The process id of this agent on its node."""
    gpu: str = ""
    """The GPU that Ray gave this agent, as in CUDA_VISIBLE_DEVICES; empty: none."""


@dataclass(frozen=True, slots=True)
class StillHere:
    """Heartbeat of an agent, every ``HERE_INTERVAL_S``."""

    rank: int
    """The rank of this agent."""
    id: str
    """The unique id of this agent, as in its ``Hello``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unkillable:
    """A training process does not end though it was killed, so it holds its GPU, and its agent starts no other.

    Sent once per process. The heartbeats of the agent go on.
    """

    rank: int
    """The rank of the agent."""
    id: str
    """The unique id of the agent, as in its ``Hello``."""
    generation: int
    """The generation of the agent."""
    attempt: int
    """The attempt of the training process, which is over."""
    pid: int
    """The id of the training process on the node of the agent."""
    for_s: float
    """Seconds since it was killed."""
    state: str
    """The state line that Linux reports, such as ``State:  D (disk sleep)``; empty if it reports none."""
    on_gpu: bool
    """It computed on a GPU."""


@dataclass(frozen=True, slots=True)
class LogNotKept:
    """A worker's log could not be written to the store. Sent once, and again only after a write has succeeded."""

    rank: int
    """The rank of the worker."""
    reason: str
    """The error in one line, for people."""


ToDriver = FromWorker | Hello | StillHere | LogNotKept | Unkillable | AgentsPlaced | AgentsUnplaced | AgentsLost
"""A message to the driver."""
