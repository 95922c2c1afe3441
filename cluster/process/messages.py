"""What the processes of a run tell the driver, as frozen dataclasses. What they are told is in ``orders``.

    training process  -- Beat, Report -->                              agent
    agent             -- Hello, StillHere, FromWorker, LogNotKept -->  driver
    Ray's controller  -- AgentsPlaced, AgentsUnplaced, AgentsLost -->  driver

An agent passes a ``Report`` on as it is, in a ``FromWorker`` that says whose it is. Messages of one sender arrive in
order. All values are plain, or frozen dataclasses of plain values, so that every process can unpickle them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cluster.errors import Cause
from cluster.run.manifest import Share

Doing = Literal["start", "restore", "data", "forward", "backward", "validation", "storage", "exchange"]
"""What a training process can be at; within a step, in this order. A process in an exchange waits for the others,
wherever they are, and so comes last."""
DOING: tuple[Doing, ...] = get_args(Doing)

Spent = Mapping[str, float]
"""Seconds since a training process began, by ``Doing``."""


# From a training process to its agent alone.


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life and of progress."""

    doing: Doing
    """What the process does since the last mark."""
    step: int
    """The optimizer steps completed by then."""
    is_first_step: bool
    """This process has not completed a step yet."""
    for_s: float
    """Seconds since the last mark, when the beat left."""
    spent: Spent


# From a training process to the driver.


@dataclass(frozen=True, kw_only=True, slots=True)
class MeetingPlace:
    """Rank 0 has opened the store of the process group."""

    port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentsCompared:
    """What the bits of this attempt depend on beside the description. Rank 0 says it for all."""

    workers: Sequence[Mapping[str, Any]]
    """The environments, as they are stored in the run directory: one for each group of ranks that are alike."""
    differences: str
    """What differs between workers and where, in a line; empty if nothing does."""
    is_refused: bool
    """The workers differ so that they do not train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStarted:
    """The state is restored; the first step begins."""

    step: int
    """The optimizer steps that the state has completed."""
    spent: Spent


@dataclass(frozen=True, kw_only=True, slots=True)
class FellBack:
    """A checkpoint is bad, and the one before it is tried. Rank 0 says it for all."""

    step: int
    """Of the bad checkpoint."""
    defect: str
    """What is wrong with it, in a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLogged:
    """A row of the metrics. Rank 0 says it for all."""

    row: Mapping[str, Any]
    """As it is stored; it has ``step``, ``epoch`` and ``samples``."""
    time: float
    """Unix time at which it was sent, by the clock of the worker."""
    spent: Spent


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixMeasured:
    """A validation gave a matrix, such as a confusion matrix. Rank 0 says it for all."""

    name: str
    """Such as ``val/confusion``."""
    step: int
    classes: Sequence[str]
    """The names of rows and columns."""
    values: Sequence[Sequence[float | None]]
    """By true and predicted class; None where a value is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEvent:
    """Something at a step that belongs into the log of events. Rank 0 says it for all."""

    kind: Literal["step_skipped", "early_stop"]
    step: int
    reason: str
    """In a line, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveSkipped:
    """All workers skip a checkpoint because this one is still writing the one before."""

    step: int
    reason: str
    """In a line, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareWritten:
    """A worker has written its share of a checkpoint."""

    share: Share
    seconds: float
    """What hashing and writing took."""
    best_step: int | None
    """The step of the best checkpoint so far, if a metric is watched for it."""
    best_metric: float | None
    """The value of that metric then."""
    spent: Spent
    """Up to the step of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A worker has done its work, and all that it has to save is written."""

    step: int
    completed: bool
    """The run has no step left; if False, it stops here."""
    spent: Spent


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Why a training process ends, in its own words."""

    error: str
    """The name of a class of ``cluster.errors``."""
    cause: Cause
    message: str
    """In a line, for people."""
    step: int | None
    """The optimizer steps completed; None: every worker would fail in the same way."""
    place: str
    """The step and line at which the user's code failed; empty if it was not the user's code."""
    traceback: str
    """Of the user's code, or empty."""


# From an agent to the driver, about its training process.


@dataclass(frozen=True, kw_only=True, slots=True)
class Exited:
    """How a training process ended."""

    exit_code: int | None
    """Negative: the number of the signal that killed it. None: its fork server was lost, and the process with it."""
    oom_kill: bool
    """The kernel has just killed a process for want of memory."""
    step: int
    """The optimizer steps completed by its last beat."""
    log_tail: str
    """The last lines that it printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpent:
    """What the time of a training process went into: compared with the others', it tells who is slow."""

    step: int
    spent: Spent


@dataclass(frozen=True, kw_only=True, slots=True)
class Hung:
    """A training process has made no progress for longer than its limit."""

    step: int
    """The optimizer steps completed."""
    doing: Doing
    is_first_step: bool
    for_s: float
    """Seconds without progress."""
    is_silent: bool
    """It does not even send beats: it is stopped, or its host has no time for it."""
    stack: str
    """The Python stack, innermost call first; of a silent process, what Linux says of its state."""


@dataclass(frozen=True, slots=True)
class GoesOn:
    """A training process that was said to hang makes progress again."""


Report = (
    MeetingPlace
    | EnvironmentsCompared
    | TrainingStarted
    | FellBack
    | RowLogged
    | MatrixMeasured
    | StepEvent
    | SaveSkipped
    | ShareWritten
    | Finished
    | Failed
    | Exited
    | TimeSpent
    | Hung
    | GoesOn
)
"""What is said by or about one training process."""


@dataclass(frozen=True, slots=True)
class FromWorker:
    """A report, and which process it is by or about."""

    rank: int
    attempt: int
    report: Report


# From an agent to the driver, about itself.


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """An agent is there."""

    rank: int
    id: str
    """Of this agent and no other."""
    generation: int
    """Counts starts of the agents of a run."""
    node: str
    """The id of its node."""
    address: str
    """The address of its node."""
    pid: int


@dataclass(frozen=True, slots=True)
class StillHere:
    """An agent says every ``HERE_INTERVAL_S`` that it lives."""

    rank: int
    id: str


@dataclass(frozen=True, slots=True)
class LogNotKept:
    """The store has not taken a worker's log. Said once until it takes one again."""

    rank: int
    reason: str
    """In a line, for people."""


# From Ray Train's controller to the driver. They may come late, so each names the generation that it is about.


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentsPlaced:
    """Ray holds a place for each agent of a generation, or has let go of them."""

    generation: int
    nodes: Sequence[str]
    """The ids of the nodes, by rank; empty: the places are free again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentsUnplaced:
    """Ray has not found room for all agents, and has started none."""

    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentsLost:
    """Ray has lost agents, or could not start them. The others live until the next start."""

    generation: int
    lost: Mapping[int, str]
    """What Ray says of each agent that is lost, by rank; empty: all are lost, or none has started."""
    reason: str
    """Why, if no agent is named."""


ToDriver = FromWorker | Hello | StillHere | LogNotKept | AgentsPlaced | AgentsUnplaced | AgentsLost
"""What the driver hears."""
