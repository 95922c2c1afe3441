"""The workers of a job: how many, on what, how long they are waited for, and how many failures they may have."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cluster.capacity import Placement
from cluster.errors import FieldError
from jobs.spec.checks import at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxFailuresSpec:
    """How many failures of each kind a run recovers from before it is given up; null: any number."""

    machine: int | None = 10
    """Workers and nodes lost, workers that do not start, processes killed, hung, or out of memory by the machine's
    doing. Starts that fail one after the other are tried again later and later, after 60 seconds at most. A hang in
    the first step of a process ends the run when it comes back at the same step and line."""
    preemption: int | None = None
    """Workers lost because their node was drained or taken away with notice."""
    code: int | None = 3
    """Exceptions of the training code, each tried again once; a second one at the same step and line ends the run at
    once."""

    def __post_init__(self) -> None:
        at_least(self, 0, "machine", "preemption", "code")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSpec:
    """Who does the work. Nothing here changes a bit of the result."""

    num: int | tuple[int, int] = 1
    """Workers, at most ``train.shards``, which need not divide by it; or the least and the most, such as [1, 4]: the
    run begins with what is there, goes on with fewer when nodes go, and takes more when they come."""
    cpus: float = 0.5
    """CPU cores that each worker reserves; a fraction lets several share a core."""
    gpus: int | Literal["auto"] = "auto"
    """GPUs per worker: 1 (NCCL), 0 (CPU with gloo), or auto: 1 where every worker can have one, also on a node that the
    cluster's autoscaler has yet to start, else 0."""
    accelerator: str | None = None
    """The accelerator type a worker needs, by Ray's name for it, such as ``H100``."""
    placement: Placement = "pack"
    """``pack``: on as few nodes as possible; ``spread``: on as many as possible. Best effort, by the room that there is
    when the workers start: they neither wait for it, nor move for it later."""
    max_failures: MaxFailuresSpec = field(default_factory=MaxFailuresSpec)
    wait_s: float = 3600.0
    """Seconds to wait for a cluster to have room: for one worker, to try the job out there; then for the workers, at
    the start and after nodes are lost. After that the run is given up; it can be resumed."""
    max_worker_hours: float | None = None
    """Hours of all workers together, over the whole life of the run, after which it saves and stops; none: no limit."""
    start_timeout_s: float = 300.0
    """Seconds for the agents of all workers to start once there is room for them: Ray starts their processes, and each
    node imports torch. If one is late, that is a failure of the machine, and all are started again."""
    first_step_timeout_s: float | None = 1800.0
    """Seconds from the start of a training process to the end of its first step, after which it counts as hung and is
    replaced: meeting the others, building model and data sets, the first batch, compiling. Reading a checkpoint does
    not count, ``checkpoint.patience_s`` limits that. Trying the job out may take as long. None: no limit, then only a
    person ends a start that hangs."""
    timeout_s: float = 600.0
    """Seconds a worker waits for the others, in an exchange or at the start, before it counts as lost."""
    hang_timeout_s: float = 300.0
    """Seconds without progress, once a process has done its first step, after which it counts as hung and is replaced.
    No step, batch or validation batch may take as long."""

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
