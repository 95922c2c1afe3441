"""Everything that is decided and checked before a worker starts.

Cheap checks come first: the description against itself and the machine or the cluster, then the store, then, with
torch, the objects it names and one real micro-batch through model, loss and backward, in the place of one worker where
there is a cluster. No worker is started and nothing is left behind.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import DescriptionError, StorageError
from cluster.process import fork_server
from cluster.process.agent import modules_of
from cluster.process.orders import Task
from cluster.process.workplace import Call, call_here
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.sampling import StepPlan, shard_block
from jobs.spec import JobSpec
from launcher.code.user_code import UserCode
from launcher.config.description import Description, named_errors
from launcher.planning.placement import check_machine, decide_workers, places_of, resources_of, why_wait

if TYPE_CHECKING:
    from cluster.capacity import Capacity
    from cluster.kinds.cluster import Cluster

ENTRY = "jobs.training.worker:main"
"""What a training process runs."""
_TRIAL = "launcher.planning.dry_run:try_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """One row of the table of parameter groups."""

    pattern: str
    tensors: int
    parameters: int
    lr: float
    weight_decay: float
    from_epoch: int
    """The epoch, counted from 0, in which it begins to train."""
    from_step: int
    """The optimizer step after which it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitPlan:
    """Which weights a run begins with; ``jobs.checkpoint.warm_start.LoadReport`` without torch."""

    url: str
    """The very checkpoint or file."""
    sha256: str
    """Of the file that holds the weights."""
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    """Names in the source that nothing in the model takes."""
    passed_over: tuple[str, ...]
    """The defects of newer checkpoints of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunResult:
    """What building and trying out told."""

    steps: StepPlan
    num_val_samples: int
    gpus_here: int
    """GPUs of this machine."""
    accelerator_here: str | None
    """Their type, by Ray's name; none: it has none, or the description names none."""
    groups: list[GroupPlan]
    parameters: int
    checkpoint_bytes: int
    trial_samples: int
    trial_loss: float
    data_fingerprint: str
    modules: tuple[str, ...]
    """The user's own that were imported, by name."""
    rates: tuple[tuple[int, float], ...]
    init_from: InitPlan | None


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
    num_workers: int
    """The workers to begin with; more or fewer may follow, if that is what is written."""
    shards_by_worker: tuple[int, ...]
    gpus: int
    """GPUs per worker."""
    why_cpu: str
    """Why workers get no GPU, where ``workers.gpus: auto`` may have meant one; else nothing."""
    why_wait: str
    """What a run would wait for if it began now; else nothing."""
    groups: tuple[GroupPlan, ...]
    parameters: int
    """Trainable and frozen numbers in the model."""
    checkpoint_bytes: int
    """About the size of one checkpoint."""
    trial_samples: int
    trial_loss: float
    data_fingerprint: str
    """A digest of the number of samples, the classes and the targets, where the datasets tell them."""
    rates: tuple[tuple[int, float], ...]
    """A few steps and the learning rates they use, in the last group; none where the schedule follows a metric."""
    init_from: InitPlan | None
    """The weights that the run begins with, if they are not random."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for ``--json``."""
        return asdict(self)


def make_plan(
    description: Description,
    run_url: str,
    code: UserCode,
    cluster: "Cluster",
    tell: Callable[[str], None],
    *,
    may_wait: bool,
) -> Plan:
    """Checks everything and decides everything; takes a few seconds, for torch and the trial.

    Args:
        description: What to plan.
        run_url: The run whose directory holds the user's code, if it is a bundle.
        code: Where the user's own modules are.
        cluster: What to run on; this process has joined it.
        tell: Takes what is waited for.
        may_wait: The run is to begin, so wait for room where the cluster has none. If False, try the job out on this
            host's CPU instead.

    Raises:
        DescriptionError: The description cannot run as written, there.
        StorageError: The user's code cannot be had there.
        ClusterError: There is no room for the trial, or the cluster is not fit for it.
    """
    spec, capacity = description.spec, cluster.capacity()
    with named_errors(description.source):
        if capacity is None:
            check_machine(spec)
            gpus, forks_here, tries_here = 0, True, False
        else:
            gpus = decide_workers(spec, capacity, gpus_here=0).gpus
            worker = resources_of(spec.workers, gpus)
            tries_here = not may_wait and not capacity.room(worker)
            forks_here = tries_here or any(node.is_here and node.most(worker) for node in capacity.nodes)
        call = _make_call(spec, code.task(_TRIAL, run_url, spec), gpus)
        if forks_here:
            fork_server.start(call.modules)
        else:
            fork_server.stop()  # one that was started before it was known where workers can be
        if capacity is not None and may_wait:
            cluster.prepare_group(ENTRY, places_of(spec.workers, gpus))

        def try_out() -> DryRunResult:
            if not tries_here:
                return cluster.call(call, lambda what: tell(f"trying the job out: {what}"))
            tell(f"trying the job out: on this host's CPU, since there is no room for one worker of {call.resources}")
            return call_here(call)

        store = check_store(spec)
        tried = _tried(try_out)
    return decide(description, store, tried, capacity)


def try_job(description: Description, import_paths: tuple[str, ...]) -> DryRunResult:
    """Checks all of a job but its store that does not depend on where it will train, on this machine and its CPU.

    That is its parts, and one micro-batch.

    Raises:
        DescriptionError: The description cannot run as written.
    """
    spec = description.spec
    call = _make_call(spec, UserCode(folders=import_paths).task(_TRIAL, "", spec), gpus=0)
    with named_errors(description.source):
        fork_server.start(call.modules)
        return _tried(lambda: call_here(call))


def import_ahead(cluster: "Cluster", modules: tuple[str, ...]) -> None:
    """Begins to import what a driver needs, and what processes do that train or try a job out if one may live here.

    Args:
        cluster: This process has joined it.
        modules: See ``modules_for``.

    Raises:
        ClusterError: It is gone.
    """
    cluster.import_ahead()
    capacity = cluster.capacity()
    if capacity is not None and any(node.is_here and node.resources.get("CPU") for node in capacity.nodes):
        fork_server.start(modules)


def modules_for(spec: JobSpec) -> tuple[str, ...]:
    """What processes import that train or try a job out, as far as it is the product's own.

    The workers of a host will be forked from the same server, so torch is imported once, and not in this process.
    """
    return (*modules_of(ENTRY), _TRIAL.partition(":")[0], *(["jobs.build.metrics"] if spec.metrics else []))


def _make_call(spec: JobSpec, task: Task, gpus: int) -> Call:
    return Call(
        task=task,
        modules=modules_for(spec),
        resources=resources_of(spec.workers, gpus),
        wait_s=spec.workers.wait_s,
        start_timeout_s=spec.workers.start_timeout_s,
        timeout_s=spec.workers.first_step_timeout_s,
    )


def _tried(try_out: Callable[[], DryRunResult]) -> DryRunResult:
    """What a trial told.

    Raises:
        DescriptionError: It failed for what is written.
    """
    try:
        return try_out()
    except ChildProcessError as error:
        raise DescriptionError(f"model: the process that tried it out {error}; is there enough memory?") from error
    except TimeoutError as error:
        raise DescriptionError(
            f"model: the process that tried it out {error} (workers.first_step_timeout_s); raise that, or look at "
            "what model and data wait for"
        ) from error


def decide(description: Description, store: Store, tried: DryRunResult, capacity: "Capacity | None") -> Plan:
    """The plan of a job that was tried out.

    Raises:
        DescriptionError: It can never fit there.
    """
    spec = description.spec
    with named_errors(description.source):
        decision = decide_workers(spec, capacity, tried.gpus_here, tried.accelerator_here)
    steps, num_workers = tried.steps, decision.num_workers
    blocks = [shard_block(spec.train.shards, num_workers, rank) for rank in range(num_workers)]
    return Plan(
        run=RunDirectory(store.at(spec.name)).url,
        num_samples=steps.num_samples,
        num_val_samples=tried.num_val_samples,
        micro_batch=steps.micro_batch,
        steps_per_epoch=steps.steps_per_epoch,
        total_steps=steps.total_steps,
        end_step=min(steps.total_steps, spec.train.max_steps or steps.total_steps),
        unused_per_epoch=steps.num_samples % steps.global_batch,
        num_workers=num_workers,
        shards_by_worker=tuple(map(len, blocks)),
        gpus=decision.gpus,
        why_cpu=decision.why_cpu,
        why_wait=why_wait(spec, capacity, decision.gpus),
        groups=tuple(tried.groups),
        parameters=tried.parameters,
        checkpoint_bytes=tried.checkpoint_bytes,
        trial_samples=tried.trial_samples,
        trial_loss=tried.trial_loss,
        data_fingerprint=tried.data_fingerprint,
        rates=tried.rates,
        init_from=tried.init_from,
    )


def checked_store(description: Description) -> Store:
    """The store of a description, in which one object was written, read and deleted.

    Raises:
        DescriptionError: It cannot be used.
    """
    with named_errors(description.source):
        return check_store(description.spec)


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
