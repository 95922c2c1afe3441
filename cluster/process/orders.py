"""What the processes of a run are told, as frozen dataclasses. What they tell is in ``messages``.

driver  -- Task, Orders -->  agent
agent   -- Stop, Meet -->    training process
"""

import math
from dataclasses import dataclass
from typing import Any

LOOPBACK = "127.0.0.1"
"""The address of rank 0 where all workers are on one node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a training process is to do."""

    entry: str
    """``module:function``, called with the link and this task in the training process. A name, because the agent must
    not import what the training process needs."""
    run_url: str
    """The run directory."""
    import_paths: tuple[str, ...]
    """Folders of the user's own modules."""
    working_directory: str
    """Where relative paths of the user's data start, without a bundle on every host."""
    code: str | None = None
    """The digest of the bundle of the user's own modules, which come before those in folders; None: no bundle."""
    code_directory: str | None = None
    """The folder in the bundle of which each training process makes a copy, in which relative paths start; None: they
    start in an empty folder."""
    fork_server: str | None = None
    """The address of a server to fork from, if there is one on the worker's host."""
    rank: int = 0
    """This worker among all."""
    world_size: int = 1
    """How many workers there are."""
    attempt: int = 0
    """Counts starts of the worker group's processes, from 0."""
    host: str = LOOPBACK
    """The address of rank 0."""
    address: str = LOOPBACK
    """This worker's address for the others."""
    on_gpu: bool = False
    """Whether this worker has a GPU, which is visible as the only one."""
    hang_timeout_s: float = math.inf
    """Seconds without progress after which the training process counts as hung."""
    first_step_timeout_s: float = math.inf
    """The same, from its start to the end of its first step."""
    data_fingerprint: str | None = None
    """What the plan found of the data, for every worker to compare; None: it is not compared."""
    may_differ: bool = False
    """Workers train together even if they differ in what may change bits, such as their GPUs."""
    content: Any = None
    """The job, which only the entry understands."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """All that the driver wants: an agent that comes late, or misses a version, reads the same."""

    version: int = 0
    """Grows with every change."""
    attempt: int | None = None
    """The attempt to run; None: not yet."""
    agents: frozenset[str] = frozenset()
    """The ids of the agents that run it. An agent that Ray has lost may live on, and read orders that are not its
    own."""
    host: str = LOOPBACK
    """The address of rank 0 for the others."""
    meeting_port: int | None = None
    """The port of rank 0's store in this attempt, once it is known."""
    stop: bool = False
    """Save and end."""
    end: bool = False
    """The run is over: end now."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish the step, save and end."""


@dataclass(frozen=True, slots=True)
class Meet:
    """Where the workers of this attempt meet."""

    host: str
    """The address of rank 0."""
    port: int
    """The port of rank 0's store."""


Order = Stop | Meet
"""What a training process is told while it runs."""
