"""Messages to the processes of a run, as frozen dataclasses. ``messages`` has those to the driver.

driver  -- Task, Orders -->  agent
agent   -- Stop, Meet -->    training process
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOOPBACK = "127.0.0.1"
"""The address of rank 0 if all workers are on one node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a training process runs, and where."""

    entry: str
    """``module:function``, which the training process calls with its ``AgentLink`` and this task. It is a name because
    the agent must not import what the training process needs."""
    run_url: str
    """The run directory."""
    import_paths: tuple[str, ...]
    """Folders of the user's own modules."""
    working_directory: str
    """Without a bundle: the working directory on every host, to which relative paths of the user's data refer."""
    code: str | None = None
    """The digest of the bundle of the user's modules, which come before those in ``import_paths``; None: no bundle."""
    code_directory: str | None = None
    """The folder of the bundle that each training process copies to its working directory; None: that is empty."""
    fork_server: str | None = None
    """The address of the server to fork from; None: the agent starts its own."""
    rank: int = 0
    """The number of this worker, from 0."""
    world_size: int = 1
    """The number of workers."""
    attempt: int = 0
    """The number of this attempt, from 0: each start of the training processes is one."""
    host: str = LOOPBACK
    """The address of rank 0."""
    address: str = LOOPBACK
    """The address at which the others reach this worker."""
    on_gpu: bool = False
    """This worker has a GPU, the only one visible to it."""
    hang_timeout_s: float = math.inf
    """Seconds without progress after which the training process counts as hung."""
    first_step_timeout_s: float = math.inf
    """The same limit from the start of the process to the end of its first step."""
    data_fingerprint: str | None = None
    """The fingerprint of the data that the plan made, which every worker compares with its own; None: no comparison."""
    indexes: Mapping[str, str] = field(default_factory=dict)
    """The digests of the indexes of the data in the run directory, by the ids of their sources."""
    may_differ: bool = False
    """Workers train together even if they differ in something that may change bits, such as their GPUs."""
    content: Any = None
    """The job, which only the entry function reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """All that the driver wants: an agent that starts late or misses a version needs only the newest one."""

    version: int = 0
    """Grows with every change."""
    attempt: int | None = None
    """The attempt to run; None: run none yet."""
    agents: frozenset[str] = frozenset()
    """The ids of the agents that run the attempt. An agent that Ray has lost may live on and read orders for others."""
    host: str = LOOPBACK
    """The address of rank 0 for the others."""
    meeting_port: int | None = None
    """The port of rank 0's store in this attempt; None: not known yet."""
    stop: bool = False
    """The training processes save and end."""
    end: bool = False
    """The run is over: the agents end now."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish the step, save and end."""


@dataclass(frozen=True, slots=True)
class Meet:
    """The address of the store at which the workers of this attempt meet."""

    host: str
    """The address of rank 0."""
    port: int
    """The port of rank 0's store."""


Order = Stop | Meet
"""A message to a training process while it runs."""
