"""The description of this machine as a cluster."""

from dataclasses import dataclass, field
from typing import Literal

from cluster.spec.worker import WorkerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalClusterSpec:
    """This machine alone; Ray is started for the run, and ends with it."""

    kind: Literal["local"] = "local"
    worker: WorkerSpec = field(default_factory=WorkerSpec)

    @property
    def takes_jobs(self) -> bool:
        """Whether ``launcher submit`` can submit jobs to it: never."""
        return False
