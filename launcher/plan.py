"""Everything that is decided and checked before a worker starts.

Cheap checks come first: the description against itself and the machine, then the store, then, with torch,
the objects it names and one real micro-batch through model, loss and backward. Nothing is started and
nothing is left behind.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import DescriptionError, StorageError
from cluster.run_directory import RunDirectory
from cluster.storage import Store
from jobs.spec import JobSpec
from launcher.description import Description

if TYPE_CHECKING:
    from launcher.trial import GroupPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What follows from a description and a machine."""

    run: str
    """The run directory's URL."""
    num_samples: int
    num_val_samples: int
    micro_batch: int
    steps_per_epoch: int
    total_steps: int
    end_step: int
    unused_per_epoch: int
    """Samples beyond the last whole batch; others in every epoch."""
    shards_by_worker: tuple[int, ...]
    gpus: int
    """GPUs per worker."""
    groups: "tuple[GroupPlan, ...]"
    parameters: int
    """Trainable and frozen numbers in the model."""
    checkpoint_bytes: int
    """About the size of one checkpoint."""
    trial_samples: int
    trial_loss: float
    data_fingerprint: str
    """A digest of the number of samples, the classes and the targets, where the datasets tell them."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for ``--json``."""
        return asdict(self)


def make_plan(description: Description) -> Plan:
    """Checks everything and decides everything; takes a few seconds, for torch and the trial.

    Raises:
        DescriptionError: The description cannot run as written, here.
        StorageError: The store cannot be written.
    """
    spec = description.spec
    with named_errors(description.source):
        check_machine(spec)
        store = check_store(spec)
        from launcher.trial import try_out  # torch takes seconds to import, and is not needed until here

        tried = try_out(spec)
    steps = tried.steps
    blocks = [spec.train.shards * (n + 1) // spec.workers.num - spec.train.shards * n // spec.workers.num
              for n in range(spec.workers.num)]  # fmt: skip
    return Plan(
        run=RunDirectory(store.at(spec.name)).url,
        num_samples=steps.num_samples,
        num_val_samples=tried.num_val_samples,
        micro_batch=steps.micro_batch,
        steps_per_epoch=steps.steps_per_epoch,
        total_steps=steps.total_steps,
        end_step=min(steps.total_steps, spec.train.max_steps or steps.total_steps),
        unused_per_epoch=steps.num_samples % steps.global_batch,
        shards_by_worker=tuple(blocks),
        gpus=tried.gpus,
        groups=tuple(tried.groups),
        parameters=tried.parameters,
        checkpoint_bytes=tried.checkpoint_bytes,
        trial_samples=tried.trial_samples,
        trial_loss=tried.trial_loss,
        data_fingerprint=tried.data_fingerprint,
    )


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


def check_store(spec: JobSpec) -> Store:
    """Writes, reads and deletes one object in the store.

    Raises:
        StorageError: That fails.
        DescriptionError: No other process could see what is written there.
    """
    try:
        store = Store(spec.store)
        if not store.is_shared:
            raise DescriptionError(
                f"store {spec.store!r} is seen by one process alone, and workers are others; "
                "use a folder, or a URL such as s3://bucket/runs"
            )
        store.probe()
    except StorageError as error:
        raise DescriptionError(f"store: {error}") from error
    return store


@contextmanager
def named_errors(source: str) -> Iterator[None]:
    """Puts the name of the job file before errors that begin with a key of it."""
    try:
        yield
    except DescriptionError as error:
        raise DescriptionError(f"{source}: {error}") from error
