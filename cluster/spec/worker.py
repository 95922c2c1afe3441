"""What each worker gets on a cluster, which the description of every kind of cluster may say."""

import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from cluster.capacity import Placement
from cluster.errors import FieldError


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What each worker gets on this cluster, in place of what the job file says; the command line overrides both.
    It applies to a run only while that is on this cluster: elsewhere the job file, or that cluster, decides."""

    cpus: float | None = None
    """CPU cores that each worker reserves."""
    gpus: int | None = None
    """GPUs per worker, 0 or 1."""
    accelerator: str | None = None
    """The accelerator type a worker needs, by Ray's name for it, such as ``H100``."""
    placement: Placement | None = None
    """``pack``: on as few nodes as possible; ``spread``: on as many as possible."""

    def __post_init__(self) -> None:
        if self.cpus is not None and not 0 < self.cpus < math.inf:
            raise FieldError("cpus", f"must be finite and above 0, got {self.cpus}")
        if self.gpus not in (None, 0, 1):
            raise FieldError("gpus", f"must be 0 or 1, got {self.gpus}; a worker drives one GPU, raise workers.num")

    def overrides(self, section: str = "workers") -> list[str]:
        """Return these values as ``key=value`` changes of a section of a description, by default of a job's."""
        return [f"{section}.{name}={json.dumps(value)}" for name, value in asdict(self).items() if value is not None]

    def keeping(self, overrides: Collection[str]) -> "WorkerSpec":
        """Return a copy with only the fields that are among the given items of ``overrides``."""
        names = {override.partition("=")[0].removeprefix("workers.") for override in overrides}
        return replace(self, **{name: None for name in asdict(self) if name not in names})
