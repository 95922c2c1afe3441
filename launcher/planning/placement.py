"""Decides GPUs and workers from what this machine or a cluster has, and refuses a job that can never fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.capacity import Capacity, Places, WorkerResources, num_cores
from cluster.errors import DescriptionError, listed
from jobs.spec import JobSpec, WorkersSpec
from jobs.training.deterministic import refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The GPUs per worker, and the number of workers."""

    gpus: int
    """GPUs per worker."""
    num_workers: int
    """The number of workers at the start."""
    why_cpu: str
    """Why ``workers.gpus: auto`` gives workers no GPU; empty if that needs no warning."""


def check_machine(spec: JobSpec) -> None:
    """Refuse more workers than this machine's cores can hold.

    Raises:
        DescriptionError: The workers do not fit.
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


def decide_workers(
    spec: JobSpec, capacity: Capacity | None, gpus_here: int, accelerator_here: str | None = None
) -> Decision:
    """Decide the GPUs per worker and the number of workers at the start.

    Nodes that the cluster's autoscaler may start count, too: the driver waits for them.

    Args:
        spec: The description.
        capacity: What the cluster has and may get. None: the job runs on this machine.
        gpus_here: The number of GPUs of this machine.
        accelerator_here: Their type, by Ray's name. None: there is no GPU, or the description names no type.

    Raises:
        DescriptionError: The cluster can never hold the workers; or this machine has too few GPUs, or another type.
    """
    workers = spec.workers
    if capacity is None and workers.accelerator not in (None, accelerator_here):
        raise DescriptionError(
            f"workers.accelerator={workers.accelerator}: this machine has {accelerator_here or 'no accelerator'}; "
            "remove it, or run on a cluster that has such nodes"
        )
    place, num_gpus = ("this machine", gpus_here) if capacity is None else ("this cluster", capacity.num_gpus)
    # capacity.limits is not enough: a cluster may report the limits of its autoscaler without accelerator types.
    is_declared = capacity is None or capacity.groups or capacity.is_complete
    more = "" if is_declared else "; if its autoscaler may start such nodes, write them as cluster.autoscaler"
    gpus = int(num_gpus >= workers.least) if workers.gpus == "auto" else workers.gpus
    if gpus * workers.least > num_gpus:
        raise DescriptionError(
            f"workers.gpus={gpus} for {workers.least} workers needs {workers.least} GPUs, and {place} has {num_gpus}; "
            f"lower workers.num or set workers.gpus=0{more}"
        )
    why_cpu = ""
    if workers.gpus == "auto" and not gpus and (num_gpus or capacity is not None):
        why_cpu = (
            f"{place} has {num_gpus or 'no'} GPU{'s' * (num_gpus > 1)} for {workers.least} "
            f"worker{'s' * (workers.least > 1)}: workers.gpus=auto means CPU; "
            "write workers.gpus=1 to insist on GPUs, or 0 if CPUs are meant"
        )
    if capacity is None:
        fits = int(num_cores() / workers.cpus)
        num_workers = min(workers.most, fits, num_gpus if gpus else fits)
        return Decision(gpus=gpus, num_workers=num_workers, why_cpu=why_cpu)
    worker = resources_of(workers, gpus)
    fits, num_nodes = capacity.most(worker), len(capacity.nodes)
    there = "the nodes that it may have" if capacity.may_grow else f"its {num_nodes} node{'s' * (num_nodes != 1)}"
    if fits < workers.least:
        raise DescriptionError(
            f"workers.num must be at most {fits} on this cluster: so many workers of {worker} fit on {there}, "
            f"got {workers.least}; add nodes, or lower workers.num{more}"
        )
    num_workers = max(workers.least, min(workers.most, capacity.room(worker)))
    return Decision(gpus=gpus, num_workers=num_workers, why_cpu=why_cpu)


def most_per_host(workers: WorkersSpec, capacity: Capacity | None, decision: Decision) -> int:
    """Return the largest number of workers on one host, as far as the hosts are known.

    Args:
        workers: What the description says of them.
        capacity: See ``decide_workers``.
        decision: Its result.
    """
    if capacity is None:
        return decision.num_workers
    fits = capacity.most_on_node(resources_of(workers, decision.gpus))
    return min(workers.most, fits or workers.most)


def why_wait(spec: JobSpec, capacity: Capacity | None, gpus: int) -> str:
    """Return what a run that fits would wait for if it started now; empty: nothing.

    Args:
        spec: The description.
        capacity: See ``decide_workers``.
        gpus: GPUs per worker.
    """
    workers = spec.workers
    if capacity is None:
        return ""
    room = capacity.room(resources_of(workers, gpus))
    if room >= workers.least:
        return ""
    return (
        f"there is room for {room} of {workers.least} worker{'s' * (workers.least > 1)} now; "
        f"the run waits for more, for up to {workers.wait_s:g} s (workers.wait_s)"
    )


def check_operators(would_raise_on_gpu: Sequence[str], gpus: int) -> None:
    """Refuse a job whose workers would fail on a GPU, in their first step or validation.

    Args:
        would_raise_on_gpu: The operators that would raise there, as the dry run found them on a CPU.
        gpus: GPUs per worker.

    Raises:
        DescriptionError: A worker would fail.
    """
    if gpus and would_raise_on_gpu:
        raise DescriptionError(refusal(listed(would_raise_on_gpu), "GPUs"))


def hint_for(gpus: int, *, could_fuse: bool) -> str:
    """Return what would make a run faster; empty: nothing that is known.

    Args:
        gpus: GPUs per worker.
        could_fuse: Whether a gradient scaler waits in every step because the optimizer is not fused.
    """
    if not (gpus and could_fuse):
        return ""
    return "optimizer.fused: true spares train.precision: fp16 a wait for the GPU in every step"


def resources_of(workers: WorkersSpec, gpus: int) -> WorkerResources:
    """Return what each worker reserves; ``gpus`` is what ``decide_workers`` decided."""
    return WorkerResources(cpus=workers.cpus, gpus=gpus, accelerator=workers.accelerator)


def places_of(workers: WorkersSpec, gpus: int) -> Places:
    """Return the places of all workers; ``gpus`` is what ``decide_workers`` decided."""
    return Places(
        resources=resources_of(workers, gpus), least=workers.least, most=workers.most, placement=workers.placement
    )
