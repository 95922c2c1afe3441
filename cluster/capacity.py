"""What a cluster has and may get, and how many workers fit there. Knows no kind of cluster, and asks none.

Amounts go by resource name. The names are those of Ray: ``CPU``, ``GPU``, ``memory``, ``accelerator_type:H100``.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.storage.typed_json import Number

Placement = Literal["pack", "spread"]
"""On how few or how many nodes workers are to be: as few as possible, or as many as possible."""

_ROUNDING = 1e-6
_ACCELERATOR = "accelerator_type:"
"""What the name of an accelerator's resource begins with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResources:
    """What each worker reserves."""

    cpus: float
    gpus: int
    accelerator: str | None

    def __str__(self) -> str:
        return amounts_text(self.amounts())

    def amounts(self) -> dict[str, float]:
        """The same by resource name."""
        gpus = {"GPU": float(self.gpus)} if self.gpus else {}
        # Ray makes one of this resource on each node that has the accelerator, for all workers there.
        accelerator = {f"{_ACCELERATOR}{self.accelerator}": 0.001} if self.accelerator else {}
        return {"CPU": self.cpus, **gpus, **accelerator}


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The places that the workers of a run may have."""

    resources: WorkerResources
    """What each reserves."""
    most: int
    """For how many there will be places at most."""
    placement: Placement
    """On how few or how many nodes they are to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    address: str
    resources: Mapping[str, Number]
    """What it has."""
    free: Mapping[str, Number]
    """What nobody has reserved; a moment old."""
    drains_at: Number | None
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
class NodeGroup:
    """Nodes that are alike, which an autoscaler starts and ends."""

    most: int
    """How many of them there may be."""
    resources: Mapping[str, Number]
    """What each of them has."""

    def __str__(self) -> str:
        return f"{self.most} node{'s' * (self.most != 1)} of {amounts_text(self.resources)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a cluster has, and what it may get."""

    nodes: tuple[Node, ...]
    """Those that are alive."""
    limits: Mapping[str, Number] | None
    """What its autoscaler may bring it to, as the cluster tells; none: it has no autoscaler, or that does not tell."""
    groups: tuple[NodeGroup, ...] = ()
    """The nodes that its autoscaler may bring it to, as a person has declared; none: nothing is declared."""

    @property
    def may_grow(self) -> bool:
        """Whether an autoscaler is known of."""
        return self.limits is not None or bool(self.groups)

    @property
    def num_gpus(self) -> int:
        """The GPUs that it has or may get."""
        there = sum(node.resources.get("GPU", 0.0) for node in self.nodes)
        declared = sum(group.most * group.resources.get("GPU", 0.0) for group in self.groups)
        return int(max(there, declared, (self.limits or {}).get("GPU", 0.0)))

    def most(self, worker: WorkerResources) -> int:
        """The workers that it could hold, with all it may get, if nobody else used it.

        Of ``limits`` only the sum over all nodes is known, so this may be too many. Ray Train judges by that sum too.
        """
        there = sum(node.most(worker) for node in self.nodes)
        declared = sum(group.most * _fitting(worker, group.resources) for group in self.groups)
        return max(there, declared, _fitting(worker, self.limits or {}))

    def room(self, worker: WorkerResources) -> int:
        """The workers that it can hold now, beside all that is there."""
        return sum(node.room(worker, 0) for node in self.nodes)

    def declared(self, groups: Sequence[NodeGroup]) -> "Capacity":
        """The same, with what a person has declared of its autoscaler."""
        return replace(self, groups=tuple(groups))


def node_resources(cpus: float, gpus: int, accelerator: str | None) -> dict[str, float]:
    """What a node has, by resource name."""
    kind = {f"{_ACCELERATOR}{accelerator}": 1.0} if accelerator else {}
    return {"CPU": cpus, "GPU": float(gpus), **kind}


def amounts_text(resources: Mapping[str, float]) -> str:
    """What workers ask for of some resources, for people."""
    told = []
    for name, amount in resources.items():
        if name in ("CPU", "GPU"):
            told.append(f"{amount:g} {name}" if amount < sys.maxsize else f"any number of {name}")  # Ray's "no limit"
        elif name.startswith(_ACCELERATOR) and amount > 0:
            told.append(name.removeprefix(_ACCELERATOR))
    return ", ".join(told) or "nothing"


def _fitting(worker: WorkerResources, resources: Mapping[str, float]) -> int:
    need = worker.amounts()
    return int(min(max(0.0, resources.get(name, 0.0)) / each for name, each in need.items()) + _ROUNDING)


def num_cores() -> int:
    """The cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0))
