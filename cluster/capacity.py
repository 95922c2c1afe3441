"""What a cluster has and may get, and how many workers fit there. Knows no kind of cluster, and asks none.

Amounts go by resource name. The names are those of Ray: ``CPU``, ``GPU``, ``memory``, ``accelerator_type:H100``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResources:
    """What each worker reserves."""

    cpus: float
    gpus: int
    accelerator: str | None

    def __str__(self) -> str:
        return ", ".join(f"{each:g} {name}" for name, each in self.amounts().items())

    def amounts(self) -> dict[str, float]:
        """The same by resource name."""
        gpus = {"GPU": float(self.gpus)} if self.gpus else {}
        # Ray makes a little of this resource on each node that has the accelerator.
        accelerator = {f"accelerator_type:{self.accelerator}": 0.001} if self.accelerator else {}
        return {"CPU": self.cpus, **gpus, **accelerator}


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    address: str
    resources: Mapping[str, float]
    """What it has."""
    free: Mapping[str, float]
    """What nobody has reserved; a moment old."""
    drains_at: float | None
    """The Unix time at which it will be gone, if that is known; infinity: it will, and nobody knows when."""
    is_here: bool
    """This process runs on it."""

    def most(self, worker: WorkerResources) -> int:
        """The workers that it could hold if nobody else used it."""
        return _fitting(worker, self.resources)

    def room(self, worker: WorkerResources, own: int) -> int:
        """The workers that it can hold now, ``own`` of which it holds already."""
        return min(self.most(worker), own + _fitting(worker, self.free))


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a cluster has, and what it may get."""

    nodes: Sequence[Node]
    """Those that are alive."""
    limits: Mapping[str, float] | None
    """What its autoscaler may bring it to; none: it has no autoscaler, or that does not tell."""

    @property
    def num_gpus(self) -> int:
        """The GPUs that it has or may get."""
        there = sum(node.resources.get("GPU", 0.0) for node in self.nodes)
        return int(max(there, (self.limits or {}).get("GPU", 0.0)))

    def most(self, worker: WorkerResources) -> int:
        """The workers that it could hold, with all it may get, if nobody else used it.

        Of the nodes that may come only the sum is known, so this may be too many. Ray Train judges by that sum too.
        """
        return max(sum(node.most(worker) for node in self.nodes), _fitting(worker, self.limits or {}))


def _fitting(worker: WorkerResources, resources: Mapping[str, float]) -> int:
    need = worker.amounts()
    return int(min(max(0.0, resources.get(name, 0.0)) / each for name, each in need.items()) + _ROUNDING)
