"""What this machine can hold, found out without importing anything."""

import os

from cluster.errors import DescriptionError
from jobs.spec import JobSpec


def check_machine(spec: JobSpec) -> None:
    """Refuses more workers than this machine's cores can ever hold.

    Raises:
        DescriptionError: They do not fit.
    """
    cores = num_cores()
    most = int(cores / spec.workers.cpus)
    if most < 1:
        raise DescriptionError(
            f"workers.cpus must be at most {cores}, the cores of this machine, got {spec.workers.cpus:g}"
        )
    if spec.workers.num > most:
        raise DescriptionError(
            f"workers.num must be at most {most} on this machine, which has {cores} cores for workers of "
            f"{spec.workers.cpus:g} each, got {spec.workers.num}; lower workers.num or workers.cpus"
        )


def num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))
