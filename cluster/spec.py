"""What a person may write of a cluster, as frozen dataclasses, one for each kind.

Standard library and errors only, as is the job language. The docstring under a field is its reference text, which
``launcher schema --cluster KIND`` prints. Nothing secret belongs here: a token comes from the environment.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from cluster.errors import FieldError


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What each worker gets on this cluster, in place of what the job file says; the command line has the last word."""

    cpus: float | None = None
    """CPU cores that each worker reserves."""
    gpus: int | None = None
    """GPUs per worker, 0 or 1."""
    accelerator: str | None = None
    """The accelerator type a worker needs, by Ray's name for it, such as ``H100``."""

    def __post_init__(self) -> None:
        if self.cpus is not None and not 0 < self.cpus < math.inf:
            raise FieldError("cpus", f"must be finite and above 0, got {self.cpus}")
        if self.gpus not in (None, 0, 1):
            raise FieldError("gpus", f"must be 0 or 1, got {self.gpus}; a worker drives one GPU, raise workers.num")

    def overrides(self) -> list[str]:
        """The same as changes of a job."""
        return [f"workers.{name}={json.dumps(value)}" for name, value in asdict(self).items() if value is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalClusterSpec:
    """This machine alone; Ray is started in place, and ends with the run."""

    kind: Literal["local"] = "local"
    worker: WorkerSpec = field(default_factory=WorkerSpec)


@dataclass(frozen=True, kw_only=True, slots=True)
class RayClusterSpec:
    """A Ray cluster that is up. Its token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token."""

    kind: Literal["ray"] = "ray"
    address: str
    """Where its head listens to nodes and drivers, HOST:PORT as ``ray start --head`` prints it."""
    worker: WorkerSpec = field(default_factory=WorkerSpec)

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise FieldError("address", f"must be HOST:PORT, got {self.address!r}; `ray start --head` printed it")


ClusterSpec = LocalClusterSpec | RayClusterSpec
KINDS: Mapping[str, type[ClusterSpec]] = {"local": LocalClusterSpec, "ray": RayClusterSpec}
