"""The capacity of a cluster: what it has, what its autoscaler may add, and how many workers fit.

This module knows no kind of cluster and asks none. Amounts are mappings by resource name, with Ray's names: ``CPU``,
``GPU``, ``memory``, ``accelerator_type:H100``.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.storage.typed_json import Number

Placement = Literal["pack", "spread"]
"""Whether workers go to as few nodes as possible (``pack``) or to as many as possible (``spread``)."""

_ROUNDING = 1e-6
_ACCELERATOR = "accelerator_type:"
"""Prefix of the name of an accelerator's resource."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerResources:
    """What each worker reserves."""

    cpus: float
    gpus: int
    accelerator: str | None

    def __str__(self) -> str:
        return amounts_text(self.amounts())

    def amounts(self) -> dict[str, float]:
        """Return the amounts by resource name."""
        gpus = {"GPU": float(self.gpus)} if self.gpus else {}
        # Each node with the accelerator has one unit of this resource, for all workers there.
        accelerator = {f"{_ACCELERATOR}{self.accelerator}": 0.001} if self.accelerator else {}
        return {"CPU": self.cpus, **gpus, **accelerator}


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The resources and placement of the workers of a run."""

    resources: WorkerResources
    """What each worker reserves."""
    least: int
    """The smallest number of workers that the run can train with."""
    most: int
    """The largest number of workers."""
    placement: Placement
    """Whether they go to few nodes or to many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    address: str
    resources: Mapping[str, Number]
    """All its resources."""
    free: Mapping[str, Number]
    """Its unreserved resources, as of a moment ago."""
    drains_at: Number | None
    """The Unix time at which a draining node ends, infinity if that is unknown; None: the node is not draining."""
    is_here: bool
    """This process runs on the node."""

    def most(self, worker: WorkerResources) -> int:
        """Return how many workers fit on the node if it is otherwise unused."""
        return _fitting(worker, self.resources)

    def room(self, worker: WorkerResources, own: int) -> int:
        """Return how many workers fit on the node now, including ``own`` workers that it already holds."""
        return min(self.most(worker), own + _fitting(worker, self.free))


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGroup:
    """Equal nodes that an autoscaler starts and ends."""

    most: int
    """The largest number of nodes."""
    resources: Mapping[str, Number]
    """The resources of each node."""

    def __str__(self) -> str:
        return f"{self.most} node{'s' * (self.most != 1)} of {amounts_text(self.resources)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a cluster has, and what its autoscaler may add."""

    nodes: tuple[Node, ...]
    """The nodes that are alive."""
    limits: Mapping[str, Number] | None
    """The total resources that the autoscaler may reach, as it reports; None: no autoscaler, or it reports none."""
    groups: tuple[NodeGroup, ...] = ()
    """The nodes that the autoscaler may reach, as the cluster's description declares them; empty: none declared."""
    is_complete: bool = False
    """No autoscaler adds nodes that are not known here."""

    @property
    def may_grow(self) -> bool:
        """Whether the cluster is known to have an autoscaler."""
        return self.limits is not None or bool(self.groups)

    @property
    def num_gpus(self) -> int:
        """The number of GPUs that the cluster has or may get."""
        there = sum(node.resources.get("GPU", 0.0) for node in self.nodes)
        declared = sum(group.most * group.resources.get("GPU", 0.0) for group in self.groups)
        return int(max(there, declared, (self.limits or {}).get("GPU", 0.0)))

    def most(self, worker: WorkerResources) -> int:
        """Return how many workers fit on the cluster at its largest if it is otherwise unused.

        ``limits`` is a sum over all nodes, so the result may be too large. Ray Train decides by that sum too.
        """
        there = sum(node.most(worker) for node in self.nodes)
        declared = sum(group.most * _fitting(worker, group.resources) for group in self.groups)
        return max(there, declared, _fitting(worker, self.limits or {}))

    def most_on_node(self, worker: WorkerResources) -> int:
        """Return how many workers fit on the largest node that is there or declared, if it is otherwise unused."""
        there = (node.most(worker) for node in self.nodes)
        return max([*there, *(_fitting(worker, group.resources) for group in self.groups)], default=0)

    def room(self, worker: WorkerResources) -> int:
        """Return how many more workers fit on the cluster now."""
        return sum(node.room(worker, 0) for node in self.nodes)

    def declared(self, groups: Sequence[NodeGroup]) -> "Capacity":
        """Return this capacity with the groups that the cluster's description declares for its autoscaler."""
        return replace(self, groups=tuple(groups))


def node_resources(cpus: float, gpus: int, accelerator: str | None) -> dict[str, float]:
    """Return the resources of a node by resource name."""
    kind = {f"{_ACCELERATOR}{accelerator}": 1.0} if accelerator else {}
    return {"CPU": cpus, "GPU": float(gpus), **kind}


def amounts_text(resources: Mapping[str, float]) -> str:
    """Return CPUs, GPUs and accelerators of some amounts as a text for people."""
    parts = []
    for name, amount in resources.items():
        if name in ("CPU", "GPU"):
            parts.append(f"{amount:g} {name}" if amount < sys.maxsize else f"any number of {name}")  # Ray's "no limit"
        elif name.startswith(_ACCELERATOR) and amount > 0:
            parts.append(name.removeprefix(_ACCELERATOR))
    return ", ".join(parts) or "nothing"


def _fitting(worker: WorkerResources, resources: Mapping[str, float]) -> int:
    """Return how many workers these resources hold."""
    need = worker.amounts()
    return int(min(max(0.0, resources.get(name, 0.0)) / each for name, each in need.items()) + _ROUNDING)


def num_cores() -> int:
    """Return the number of CPU cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0))
