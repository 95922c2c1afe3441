"""Plans a run: decides and checks everything before a worker starts.

Cheap checks come first: the description against the machine or the cluster, then the store. Last comes the dry run,
which builds the components and trains on one real micro-batch; on a cluster it runs in the place of one worker. No
worker is started, and nothing is left behind.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import DescriptionError, TrainingError
from cluster.process import fork_server
from cluster.process.agent import modules_of
from cluster.process.orders import Task
from cluster.process.workplace import Call, call_here
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.sampling import StepPlan
from jobs.spec import JobSpec
from launcher.code.user_code import UserCode
from launcher.config.description import Description, named_errors
from launcher.planning.built_index import BuiltIndex
from launcher.planning.memory import MemoryPlan
from launcher.planning.placement import (
    check_machine,
    check_operators,
    decide_workers,
    hint_for,
    most_per_host,
    places_of,
    resources_of,
    why_wait,
)
from launcher.planning.shuffle_cost import ShufflePlan
from launcher.planning.store_check import check_store

if TYPE_CHECKING:
    from cluster.capacity import Capacity
    from cluster.kinds.cluster import Cluster

ENTRY = "jobs.training.worker:main"
"""The entry point of a training process."""
_DRY_RUN = "launcher.planning.dry_run:try_out"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """A parameter group, as a plan shows it."""

    pattern: str
    tensors: int
    parameters: int
    lr: float
    weight_decay: float
    from_epoch: int
    """The epoch, from 0, in which the group begins to train."""
    from_step: int
    """The number of completed steps after which it begins to train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitPlan:
    """The weights a run begins with; ``jobs.checkpoint.warm_start.LoadReport`` without torch."""

    url: str
    """The checkpoint or file."""
    sha256: str
    """The digest of the file that holds the weights."""
    loaded: tuple[str, ...]
    """Tensors of the model that get their values from it."""
    kept: tuple[str, ...]
    """Tensors of the model that keep their initial values."""
    unused: tuple[str, ...]
    """Tensors of the file that the model does not have."""
    passed_over: tuple[str, ...]
    """The defects of newer checkpoints of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunResult:
    """What the dry run has found out."""

    steps: StepPlan
    num_val_samples: int
    gpus_here: int
    """The number of GPUs of the machine on which the dry run ran."""
    accelerator_here: str | None
    """Their type, by Ray's name. None: there is no GPU, or the description names no type."""
    groups: list[GroupPlan]
    parameters: int
    checkpoint_bytes: int
    memory: MemoryPlan
    trial_samples: int
    trial_loss: float
    data_fingerprint: str
    modules: tuple[str, ...]
    """The names of the imported modules of the user."""
    rates: tuple[tuple[int, float], ...]
    init_from: InitPlan | None
    would_raise_on_gpu: tuple[str, ...]
    """Operators without a deterministic implementation on GPUs, where the job wants one; none if it ran on a GPU."""
    could_fuse: bool
    """Whether the gradient scaler waits for the GPU in every step because the optimizer is not fused."""
    indexes: tuple[BuiltIndex, ...] = ()
    """The indexes of the data that it has made."""
    shuffle: ShufflePlan | None = None
    """Price and mixing of ``data.shuffle``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that follows from a description and a machine or cluster."""

    run: str
    """The run directory's URL."""
    num_samples: int
    num_val_samples: int
    micro_batch: int
    steps_per_epoch: int
    total_steps: int
    end_step: int
    unused_per_epoch: int
    """Samples beyond the last whole batch; other samples in every epoch."""
    num_workers: int
    """The number of workers at the start; an elastic run may change it."""
    most_shards: int
    """The largest number of shards of a worker; who has how many depends on the hosts."""
    most_per_host: int
    """The largest number of workers on one host, as far as the hosts are known."""
    gpus: int
    """GPUs per worker."""
    why_cpu: str
    """Why ``workers.gpus: auto`` gives workers no GPU; empty if that needs no warning."""
    why_wait: str
    """What a run would wait for if it started now; empty: nothing."""
    groups: tuple[GroupPlan, ...]
    parameters: int
    """The number of parameters of the model, trainable and frozen."""
    checkpoint_bytes: int
    """The approximate size of one checkpoint."""
    memory: MemoryPlan
    """What a worker needs."""
    trial_samples: int
    trial_loss: float
    data_fingerprint: str
    """A digest of the number of samples, the classes and the targets, as far as the datasets list them."""
    rates: tuple[tuple[int, float], ...]
    """(step, learning rate of the last group) for a few steps; empty if the schedule follows a metric."""
    init_from: InitPlan | None
    """The weights that the run begins with. None: random ones."""
    hint: str
    """What would make the run faster; empty: nothing that is known."""
    indexes: tuple[BuiltIndex, ...]
    """The indexes of the data that the workers use."""
    shuffle: ShufflePlan | None
    """Price and mixing of ``data.shuffle``. None: an epoch is a permutation of all samples."""
    job_nodes: str = ""
    """The nodes that the job brings, for people. Empty: it uses nodes that are there."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for ``--json``."""
        return asdict(self) | {"indexes": [index.as_dict() for index in self.indexes]}


def make_plan(
    description: Description,
    run_url: str,
    code: UserCode,
    cluster: "Cluster",
    tell: Callable[[str], None],
    *,
    may_wait: bool,
) -> Plan:
    """Check and decide everything; takes a few seconds, for torch and the dry run.

    Args:
        description: The job.
        run_url: The run whose directory holds the user's code, if that is a bundle.
        code: Where the user's modules are.
        cluster: The cluster to run on; this process has joined it.
        tell: Receives what is waited for.
        may_wait: If True, wait for room for the dry run where the cluster has none. If False, run it on this host's
            CPU instead.

    Raises:
        DescriptionError: The job cannot run there as it is described.
        StorageError: A node cannot read the user's code.
        ClusterError: There is no room for the dry run, or the cluster is not fit for it.
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
        call = _make_call(spec, code.task(_DRY_RUN, run_url, spec), gpus)
        if forks_here:
            fork_server.start(call.modules)
        else:
            fork_server.stop()  # import_ahead may have started it before it was known where workers can be
        if capacity is not None and may_wait:
            cluster.prepare_group(ENTRY, places_of(spec.workers, gpus))

        def tell_more(what: str) -> None:
            tell(f"trying the job out: {what}")

        def dry_run() -> DryRunResult:
            result: DryRunResult
            if tries_here:
                tell_more(f"on this host's CPU, since there is no room for one worker of {call.resources}")
                result = call_here(call, tell_more)
            else:
                result = cluster.call(call, tell_more)
            return result

        store = check_store(spec)
        tried = _with_described_errors(dry_run)
    plan = decide(description, store, tried, capacity)
    with named_errors(description.source):
        check_operators(tried.would_raise_on_gpu, plan.gpus)
    return plan


def try_job(description: Description, import_paths: tuple[str, ...], tell: Callable[[str], None]) -> DryRunResult:
    """Run the dry run of a job on this machine's CPU, wherever the job will train.

    Neither its store nor room for its workers is checked. ``tell`` receives what is being done.

    Raises:
        DescriptionError: The job cannot run as it is described.
    """
    spec = description.spec
    call = _make_call(spec, UserCode(folders=import_paths).task(_DRY_RUN, "", spec), gpus=0)
    with named_errors(description.source):
        fork_server.start(call.modules)
        return _with_described_errors(lambda: call_here(call, lambda what: tell(f"trying the job out: {what}")))


def import_ahead(cluster: "Cluster", modules: tuple[str, ...]) -> None:
    """Start to import what the driver needs, and start the fork server if workers may run on this host.

    Args:
        cluster: The cluster; this process has joined it.
        modules: The modules that the fork server imports, see ``modules_for``.

    Raises:
        ClusterError: The cluster is gone.
    """
    cluster.import_ahead()
    capacity = cluster.capacity()
    if capacity is not None and any(node.is_here and node.resources.get("CPU") for node in capacity.nodes):
        fork_server.start(modules)


def modules_for(spec: JobSpec) -> tuple[str, ...]:
    """Return the launcher's own modules that training processes and the dry run import.

    All of them on a host are forked from one server, so torch is imported once, and not in this process.
    """
    return (*modules_of(ENTRY), _DRY_RUN.partition(":")[0], *(["jobs.components.metrics"] if spec.metrics else []))


def _make_call(spec: JobSpec, task: Task, gpus: int) -> Call:
    return Call(
        task=task,
        modules=modules_for(spec),
        resources=resources_of(spec.workers, gpus),
        wait_s=spec.workers.wait_s,
        start_timeout_s=spec.workers.start_timeout_s,
        timeout_s=spec.workers.first_step_timeout_s,
    )


def _with_described_errors(dry_run: Callable[[], DryRunResult]) -> DryRunResult:
    """Run the dry run; a process that died or hung, or code that failed, becomes a ``DescriptionError``.

    Raises:
        DescriptionError: The dry run failed, died or took too long.
    """
    try:
        return dry_run()
    except TrainingError as error:  # what the parts of the dry run do not expect; they name their key otherwise
        raise DescriptionError(f"the dry run failed: {error}; see the traceback for where", error.traceback) from error
    except ChildProcessError as error:
        advice = "is there enough memory?" if "SIGKILL" in str(error) else "run the same code alone to see where"
        raise DescriptionError(f"model: the process that tried it out {error}; {advice}") from error
    except TimeoutError as error:
        raise DescriptionError(
            f"model: the process that tried it out {error} (workers.first_step_timeout_s); raise that, or look at "
            "what model and data wait for"
        ) from error


def decide(description: Description, store: Store, tried: DryRunResult, capacity: "Capacity | None") -> Plan:
    """Return the plan of a job, given the result of its dry run.

    Raises:
        DescriptionError: The workers can never fit there.
    """
    spec = description.spec
    with named_errors(description.source):
        decision = decide_workers(spec, capacity, tried.gpus_here, tried.accelerator_here)
    steps, num_workers = tried.steps, decision.num_workers
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
        most_shards=math.ceil(spec.train.shards / num_workers),
        most_per_host=most_per_host(spec.workers, capacity, decision),
        gpus=decision.gpus,
        why_cpu=decision.why_cpu,
        why_wait=why_wait(spec, capacity, decision.gpus),
        groups=tuple(tried.groups),
        parameters=tried.parameters,
        checkpoint_bytes=tried.checkpoint_bytes,
        memory=tried.memory,
        trial_samples=tried.trial_samples,
        trial_loss=tried.trial_loss,
        data_fingerprint=tried.data_fingerprint,
        rates=tried.rates,
        init_from=tried.init_from,
        hint=hint_for(decision.gpus, could_fuse=tried.could_fuse),
        indexes=tried.indexes,
        shuffle=tried.shuffle,
    )
