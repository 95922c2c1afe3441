"""The section for the workers of a job: number, resources, time limits and failures."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cluster.capacity import Placement
from cluster.errors import FieldError
from jobs.spec.checks import at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxFailuresSpec:
    """How many failures of each kind a run recovers from; one more ends it. Null: no limit. Every ``resume`` counts
    from 0, and so does each try of a batch job."""

    machine: int | None = 10
    """Failures of the machine: lost workers, nodes and GPUs, workers that do not start, and processes that are killed,
    hang or run out of the machine's memory. Failed starts are retried after growing delays of at most 60 seconds. A
    hang in the first step of a process ends the run if it repeats at the same step and line."""
    preemption: int | None = None
    """Workers lost because their node was drained or preempted with notice."""
    code: int | None = 3
    """Exceptions of the training code. Each is retried once; a second one at the same step and line ends the run at
    once."""

    def __post_init__(self) -> None:
        at_least(self, 0, "machine", "preemption", "code")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSpec:
    """The workers: how many there are, where they run and how long to wait for them. They do not change the result."""

    num: int | tuple[int, int] = 1
    """Number of workers, at most ``train.shards``, which they need not divide; or the least and the most, such as [1,
    4]: the run starts with as many as there is room for, goes on with fewer when nodes are lost and with more when
    nodes join."""
    cpus: float = 0.5
    """CPU cores that each worker reserves; with a fraction, several workers share a core."""
    gpus: int | Literal["auto"] = "auto"
    """GPUs per worker: 1 (NCCL), 0 (CPU and gloo), or auto: 1 if every worker can have one, also on nodes that the
    autoscaler has yet to start, else 0."""
    accelerator: str | None = None
    """The type of GPU that each worker needs, by Ray's name for it, such as ``H100``; null: any."""
    placement: Placement = "pack"
    """``pack`` uses as few nodes as possible, ``spread`` as many as possible. Best effort, by the room at the start:
    workers neither wait for a better placement nor move later."""
    max_failures: MaxFailuresSpec = field(default_factory=MaxFailuresSpec)
    wait_s: float = 3600.0
    """Seconds to wait for room on the cluster: for the dry run, for the workers at the start, and for workers after
    nodes are lost. After that the run ends; it can be resumed."""
    max_worker_hours: float | None = None
    """Hours of all workers together, over the whole run, after which it saves and stops; null: no limit."""
    start_timeout_s: float = 300.0
    """Seconds for all workers to start once there is room: Ray starts processes, and each node imports torch. A late
    worker counts as a failure of the machine, and all are started again."""
    first_step_timeout_s: float | None = 1800.0
    """Seconds from the start of a training process to the end of its first step, after which it counts as hung and is
    replaced. They include joining the other workers, building model and datasets, loading the first batch and
    compiling, but not reading a checkpoint, which ``checkpoint.patience_s`` limits. The dry run has the same limit.
    Null: no limit; a start that hangs then has to be ended by hand."""
    timeout_s: float = 600.0
    """Seconds that a worker waits for the others, in a collective or at the start, until it gives them up as lost."""
    hang_timeout_s: float = 300.0
    """Seconds without progress, after its first step, until a training process counts as hung and is replaced. Every
    step, batch and validation batch must be shorter."""

    @property
    def least(self) -> int:
        """The fewest workers to train with."""
        return self.num if isinstance(self.num, int) else self.num[0]

    @property
    def most(self) -> int:
        """The most workers to train with."""
        return self.num if isinstance(self.num, int) else self.num[1]

    def __post_init__(self) -> None:
        if isinstance(self.num, tuple) and len(self.num) != 2:
            raise FieldError("num", f"must be a number or the least and the most, such as [1, 4], got {list(self.num)}")
        if not 1 <= self.least <= self.most:
            shown = self.num if isinstance(self.num, int) else list(self.num)
            raise FieldError("num", f"must be at least 1, the least first, got {shown}")
        if not 0 < self.cpus < math.inf:
            raise FieldError("cpus", f"must be finite and above 0, got {self.cpus}")
        if self.max_worker_hours is not None and not 0 < self.max_worker_hours < math.inf:
            raise FieldError("max_worker_hours", f"must be finite and above 0, got {self.max_worker_hours}")
        for name in ("timeout_s", "hang_timeout_s", "wait_s", "start_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise FieldError(name, f"must be finite and above 0 seconds, got {getattr(self, name)}")
        limit = self.first_step_timeout_s
        if limit is not None and not 0 < limit < math.inf:
            raise FieldError("first_step_timeout_s", f"must be finite and above 0, got {limit}; null turns it off")
        if self.gpus not in ("auto", 0, 1):
            raise FieldError(
                "gpus", f"must be 0, 1 or auto, got {self.gpus!r}; a worker drives one GPU, raise workers.num"
            )
