"""What there is to run on, this machine or a cluster, and whether a job can ever fit there."""

import os
from collections.abc import Sequence

from cluster.errors import DescriptionError
from cluster.ray_cluster import Node, WorkerResources
from jobs.spec import JobSpec


def check_machine(spec: JobSpec) -> None:
    """Refuses more workers than this machine's cores can ever hold.

    Raises:
        DescriptionError: They do not fit.
    """
    cores, workers = num_cores(), spec.workers
    fits = int(cores / workers.cpus)
    if fits < 1:
        raise DescriptionError(f"workers.cpus must be at most {cores}, the cores of this machine, got {workers.cpus:g}")
    if workers.least > fits:
        raise DescriptionError(
            f"workers.num must be at most {fits} on this machine, which has {cores} cores for workers of "
            f"{workers.cpus:g} each, got {workers.least}; lower workers.num or workers.cpus"
        )


def decide_workers(spec: JobSpec, nodes: Sequence[Node] | None, gpus_here: int) -> tuple[int, int]:
    """GPUs per worker, and the workers to begin with.

    Args:
        spec: The description.
        nodes: The nodes of the cluster; none: this machine alone.
        gpus_here: The GPUs of this machine.

    Raises:
        DescriptionError: The cluster could not hold them if it were empty, or this machine has too few GPUs.
    """
    workers = spec.workers
    gpus_there = gpus_here if nodes is None else int(sum(node.resources.get("GPU", 0.0) for node in nodes))
    gpus = int(gpus_there >= workers.least) if workers.gpus == "auto" else workers.gpus
    if gpus * workers.least > gpus_there:
        raise DescriptionError(
            f"workers.gpus={gpus} for {workers.least} workers needs {workers.least} GPUs, and this "
            f"{'machine' if nodes is None else 'cluster'} has {gpus_there}; lower workers.num or set workers.gpus=0"
        )
    if nodes is None:
        fits = int(num_cores() / workers.cpus)
        return gpus, min(workers.most, fits, gpus_there if gpus else fits)
    worker = WorkerResources(cpus=workers.cpus, gpus=gpus, accelerator=workers.accelerator)
    fits = sum(node.most(worker) for node in nodes)
    if fits < workers.least:
        raise DescriptionError(
            f"workers.num must be at most {fits} on this cluster: so many workers of {worker} fit on its "
            f"{len(nodes)} node{'s' * (len(nodes) != 1)}, got {workers.least}; add nodes, or lower workers.num"
        )
    return gpus, max(workers.least, min(workers.most, sum(node.room(worker, 0) for node in nodes)))


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))
