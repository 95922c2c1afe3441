"""The job language: what a person may write, as frozen dataclasses.

Imports nothing but the standard library, so that a mistake is found before torch or Ray is. A value that can
be judged alone is judged here; what needs the data, the model or the machine is judged by the plan.
The docstring under a field is its reference text: ``launcher schema`` prints it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cluster.capacity import Placement
from cluster.errors import FieldError

NUMBER_FROM_TEXT = "remove the quotes, or write ${oc.decode:${oc.env:NAME}} for a number from the environment"
"""What to do where text stands for a number: an environment variable is text until it is decoded."""


_ALWAYS_MEASURED = ("loss", "accuracy")


@dataclass(frozen=True, slots=True)
class PlanValue:
    """A number that only the plan knows; it stands in a target's arguments until the plan puts the number there.

    ``${plan.total_steps}``: optimizer steps of the whole run. ``${plan.steps_per_epoch}``: optimizer steps of
    one epoch. ``${plan.steps:EPOCHS}``: optimizer steps in that many epochs.
    """

    name: str
    epochs: float | None = None

    def __str__(self) -> str:
        """The interpolation that it was written as."""
        return f"${{plan.{self.name}}}" if self.epochs is None else f"${{plan.{self.name}:{self.epochs}}}"


@dataclass(frozen=True, slots=True)
class Target:
    """An object to build: an import path (or a bare name of torch's) and its keyword arguments.

    Arguments are scalars, lists, mappings and further targets. Written in YAML as a mapping with
    ``_target_``; ``_partial_: true`` passes the callable itself on, with the arguments bound.
    """

    path: str
    args: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Where samples come from."""

    train: Target
    """A map-style dataset, or a function that returns one; a sample is (input, target)."""
    val: Target | None = None
    """The validation dataset; none: no validation."""
    loaders: int = 0
    """Loader processes per worker, each keeping two micro-batches ahead; 0 loads in the worker itself."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "loaders")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """A loss, and what is made of output and target before it sees them."""

    factory: Target
    output: Literal["identity", "softmax", "log_softmax", "sigmoid"] = "identity"
    """Applied to the model's output first: nothing, or a function over its classes (dimension 1)."""
    target: Literal["index", "one_hot", "float"] | None = None
    """What the loss sees of a target: ``index``, class numbers as they are; ``one_hot``, a 1 at the class's place
    in zeros as wide as the output; ``float``, numbers of the output's type and shape; none: what the dataset gives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitSpec:
    """Weights to begin with."""

    SHORTHAND: ClassVar[str] = "url"

    url: str
    """A run (its newest good checkpoint is taken), one checkpoint of a run, or a ``.safetensors`` file, anywhere."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over names in this model; what matches is loaded, and must be there."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over names in this model; what matches keeps its first, random weights, such as a new head."""
    weights: Literal["model", "ema"] = "model"
    """Of a run that keeps averaged weights: those it trained, or the average, which it validated with."""

    def __post_init__(self) -> None:
        if not self.url:
            raise FieldError("url", "must be the URL of a run, a checkpoint or a .safetensors file, got ''")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """One parameter group: the parameters whose names match, and what differs for them."""

    match: str
    """A shell pattern over parameter names such as ``*.bias``, or ``type:NORM`` for the own parameters of
    every module whose class name matches, such as ``type:BatchNorm*``. The first group that matches wins."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Any argument of the optimizer, for this group alone."""
    lr_scale: float | None = None
    """The group's rate is the optimizer's ``lr`` times this."""
    from_epoch: int | None = None
    """Frozen until this epoch (counted from 0) begins, then trained."""
    from_step: int | None = None
    """Frozen until this many optimizer steps are completed, then trained."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "from_epoch", "from_step")
        _learning_rate(self.args)
        if self.from_epoch is not None and self.from_step is not None:
            raise FieldError("from_step", "cannot stand beside from_epoch; keep one of them")
        if self.lr_scale is not None and not 0 < self.lr_scale < math.inf:
            raise FieldError("lr_scale", f"must be finite and above 0, got {self.lr_scale}")
        if self.lr_scale is not None and "lr" in self.args:
            raise FieldError("lr_scale", "cannot stand beside lr; keep one of them")
        _finite_numbers(self.args)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """An optimizer and its parameter groups."""

    factory: Target
    groups: tuple[GroupSpec, ...] = ()

    def __post_init__(self) -> None:
        _learning_rate(self.factory.args)
        _finite_numbers(self.factory.args)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """A learning-rate schedule."""

    factory: Target
    interval: Literal["step", "epoch"] = "epoch"
    """When the schedule advances: after every optimizer step, or after every epoch. ReduceLROnPlateau advances
    after every epoch that measured what it monitors; with ``step``, after every validation."""
    monitor: str | None = None
    """The metric that ReduceLROnPlateau watches, such as ``val/loss`` or ``train/loss``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopSpec:
    """When a run has learned all it will; it is completed then."""

    metric: str
    """What is watched: a validation metric such as ``val/loss`` at every validation, or ``train/loss`` at every
    epoch's end."""
    mode: Literal["min", "max"]
    """Whether smaller or larger is better."""
    patience: int
    """The run ends at this many measurements in a row without an improvement."""
    min_delta: float = 0.0
    """What counts as an improvement: better than the best so far by more than this."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "patience")
        if not 0 <= self.min_delta < math.inf:
            raise FieldError("min_delta", f"must be finite and at least 0, got {self.min_delta}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """The training loop. Whatever may change a bit of the result is here, never taken from the machine."""

    epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop, saved and resumable, after this many optimizer steps in all; ``resume`` lifts a limit that was reached."""
    max_seconds: float | None = None
    """Stop, saved and resumable, this many seconds after ``run`` or ``resume`` began, such as before a time limit. The
    first start of workers may go on beyond it to the end of one step, so that every ``resume`` gets on; once workers
    have trained or failed, or while they are waited for, the run stops in time, at its newest checkpoint."""
    global_batch: int = 64
    """Samples per optimizer step, over all workers."""
    shards: int = 4
    """Virtual data-parallel replicas: a global batch is this many micro-batches. Fixed for the life of a run."""
    exact: bool = True
    """Sum gradients in one fixed order, so that any number of workers gives the same bits."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass: 32-bit, or autocast to bfloat16 or float16, the latter with a gradient scaler."""
    tf32: bool = False
    """Let CUDA round the inputs of fp32 matrix products and convolutions to TensorFloat-32."""
    deterministic: bool = True
    """Only kernels that give the same bits every time (``torch.use_deterministic_algorithms``)."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms and take the fastest; the choice may differ from run to run."""
    channels_last: bool = False
    """Keep 4-dimensional tensors in NHWC memory order."""
    compile: bool = False
    """Compile the model with ``torch.compile``."""
    clip_norm: float | None = None
    """Scale the gradient down to this 2-norm when it is longer; off when none."""
    clip_value: float | None = None
    """Bring every number of the gradient into [-this, this]; off when none."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per step, and validate with it."""
    threads: int = 1
    """CPU threads within an operator, per worker; a different number may round differently."""
    validate_every_epochs: int | None = None
    """Epochs between validations; none: 1, or never where ``validate_every_steps`` is set. The end always validates."""
    validate_every_steps: int | None = None
    """Optimizer steps between validations, also within an epoch."""
    early_stop: EarlyStopSpec | None = None
    """End the run once a metric no longer improves."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss is NaN or infinite ends the run; or is skipped, its gradients too when only they are that.
    To skip, all workers wait for each other's loss in every step."""
    log_every_steps: int = 1
    """Optimizer steps between rows of ``metrics.jsonl``; a validation always makes a row."""

    def __post_init__(self) -> None:
        _at_least(
            self, 1, "epochs", "max_steps", "global_batch", "shards", "threads",
            "validate_every_epochs", "validate_every_steps", "log_every_steps",
        )  # fmt: skip
        if self.global_batch % self.shards:
            lower = self.global_batch - self.global_batch % self.shards
            raise FieldError(
                "global_batch",
                f"must divide by train.shards={self.shards}, got {self.global_batch}; "
                f"write {lower + self.shards}" + (f" or {lower}" if lower else ""),
            )
        for name, what in (("clip_norm", "clipping"), ("clip_value", "clipping"), ("max_seconds", "the limit")):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise FieldError(name, f"must be finite and above 0, got {limit}; null turns {what} off")
        if self.clip_norm is not None and self.clip_value is not None:
            raise FieldError("clip_value", "cannot stand beside clip_norm; keep one of them")
        if self.validate_every_epochs is not None and self.validate_every_steps is not None:
            raise FieldError("validate_every_steps", "cannot stand beside validate_every_epochs; keep one of them")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise FieldError("ema_decay", f"must lie between 0 and 1, got {self.ema_decay}; null turns averaging off")
        if self.cudnn_benchmark and self.deterministic:
            raise FieldError("cudnn_benchmark", "cannot be true while train.deterministic is; set one of them to false")

    @property
    def micro_batch(self) -> int:
        """Samples of one shard in one step."""
        return self.global_batch // self.shards


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxFailuresSpec:
    """How many failures of each kind a run recovers from before it is given up; null: any number."""

    machine: int | None = 10
    """Workers and nodes lost, workers that do not start, processes killed, hung, or out of memory by the machine's
    doing. Starts that fail one after the other are tried again later and later, after 60 seconds at most. A hang in
    the first step of a process ends the run when it comes back at the same step and line."""
    preemption: int | None = None
    """Workers lost because their node was drained or taken away with notice."""
    code: int | None = 3
    """Exceptions of the training code, each tried again once; a second one at the same step and line ends the run at
    once."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "machine", "preemption", "code")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSpec:
    """Who does the work. Nothing here changes a bit of the result."""

    num: int | tuple[int, int] = 1
    """Workers, at most ``train.shards``, which need not divide by it; or the least and the most, such as [1, 4]: the
    run begins with what is there, goes on with fewer when nodes go, and takes more when they come."""
    cpus: float = 0.5
    """CPU cores that each worker reserves; a fraction lets several share a core."""
    gpus: int | Literal["auto"] = "auto"
    """GPUs per worker: 1 (NCCL), 0 (CPU with gloo), or auto: 1 where every worker can have one, also on a node that the
    cluster's autoscaler has yet to start, else 0."""
    accelerator: str | None = None
    """The accelerator type a worker needs, by Ray's name for it, such as ``H100``."""
    placement: Placement = "pack"
    """``pack``: on as few nodes as possible; ``spread``: on as many as possible. Best effort, by the room that there is
    when the workers start: they neither wait for it, nor move for it later."""
    max_failures: MaxFailuresSpec = field(default_factory=MaxFailuresSpec)
    wait_s: float = 3600.0
    """Seconds to wait for a cluster to have room: for one worker, to try the job out there; then for the workers, at
    the start and after nodes are lost. After that the run is given up; it can be resumed."""
    max_worker_hours: float | None = None
    """Hours of all workers together, over the whole life of the run, after which it saves and stops; none: no limit."""
    start_timeout_s: float = 300.0
    """Seconds for the agents of all workers to start once there is room for them: Ray starts their processes, and each
    node imports torch. If one is late, that is a failure of the machine, and all are started again."""
    first_step_timeout_s: float | None = 1800.0
    """Seconds from the start of a training process to the end of its first step, after which it counts as hung and is
    replaced: meeting the others, building model and data sets, the first batch, compiling. Reading a checkpoint does
    not count, ``checkpoint.patience_s`` limits that. Trying the job out may take as long. None: no limit, then only a
    person ends a start that hangs."""
    timeout_s: float = 600.0
    """Seconds a worker waits for the others, in an exchange or at the start, before it counts as lost."""
    hang_timeout_s: float = 300.0
    """Seconds without progress, once a process has done its first step, after which it counts as hung and is replaced.
    No step, batch or validation batch may take as long."""

    @property
    def least(self) -> int:
        """The fewest workers to train with."""
        return self.num if isinstance(self.num, int) else self.num[0]

    @property
    def most(self) -> int:
        """The most workers to train with."""
        return self.num if isinstance(self.num, int) else self.num[1]

    def __post_init__(self) -> None:
        if isinstance(self.num, tuple) and len(self.num) != 2:
            raise FieldError("num", f"must be a number or the least and the most, such as [1, 4], got {list(self.num)}")
        if not 1 <= self.least <= self.most:
            shown = self.num if isinstance(self.num, int) else list(self.num)
            raise FieldError("num", f"must be at least 1, the least first, got {shown}")
        if not 0 < self.cpus < math.inf:
            raise FieldError("cpus", f"must be finite and above 0, got {self.cpus}")
        if self.max_worker_hours is not None and not 0 < self.max_worker_hours < math.inf:
            raise FieldError("max_worker_hours", f"must be finite and above 0, got {self.max_worker_hours}")
        for name in ("timeout_s", "hang_timeout_s", "wait_s", "start_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise FieldError(name, f"must be finite and above 0 seconds, got {getattr(self, name)}")
        limit = self.first_step_timeout_s
        if limit is not None and not 0 < limit < math.inf:
            raise FieldError("first_step_timeout_s", f"must be finite and above 0, got {limit}; null turns it off")
        if self.gpus not in ("auto", 0, 1):
            raise FieldError(
                "gpus", f"must be 0, 1 or auto, got {self.gpus!r}; a worker drives one GPU, raise workers.num"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BestSpec:
    """Which checkpoint counts as the best."""

    metric: str
    """A validation metric such as ``val/accuracy``, judged at every validation, or ``train/loss``, at every epoch's
    end."""
    mode: Literal["min", "max"]
    """Whether smaller or larger is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """When checkpoints are made, and which are kept. One is always made at the end."""

    every_steps: int | None = None
    """Optimizer steps between checkpoints, also within an epoch; none: at the end of each epoch."""
    keep: int = 3
    """How many of the newest checkpoints are kept."""
    best: BestSpec | None = None
    """Also make a checkpoint whenever this metric improves, and keep the best one."""
    patience_s: float = 1800.0
    """Seconds that the store may be away while training goes on; after that the run ends, and can be resumed."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every_steps", "keep")
        if not 0 < self.patience_s < math.inf:
            raise FieldError("patience_s", f"must be finite and above 0 seconds, got {self.patience_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingSpec:
    """Weights & Biases. A tracker that fails never stops a run."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """``offline`` records on this machine, for ``wandb sync``; the host and the key come from the environment."""
    project: str = "launcher"
    """The W&B project."""
    entity: str | None = None
    """The W&B user or team; none: the key's own."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """A training run: the state at step n is a function of this and n."""

    name: str
    """The run's directory in the store; by default the job file's stem."""
    model: Target
    """The network: called with a batch of inputs, returns what the loss takes."""
    data: DataSpec
    loss: LossSpec
    """A loss, by a bare name of ``torch.nn`` or an import path; called with (output, target)."""
    optimizer: OptimizerSpec
    """An optimizer, by a bare name of ``torch.optim`` or an import path, with ``groups``."""
    scheduler: SchedulerSpec | None = None
    """A schedule, by a bare name of ``torch.optim.lr_scheduler`` or an import path; none: a constant rate."""
    train: TrainSpec = field(default_factory=TrainSpec)
    workers: WorkersSpec = field(default_factory=WorkersSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    metrics: Mapping[str, Target] = field(default_factory=dict)
    """What validation measures beside loss and accuracy: a name, and a metric of torchmetrics by its bare name, or
    any subclass of ``torchmetrics.Metric`` by its import path."""
    init_from: InitSpec | None = None
    """Weights to begin with instead of random ones: a URL, or a mapping."""
    seed: int = 0
    """Every random draw is a function of this number."""
    store: str = "runs"
    """The fsspec URL, or the folder, that holds run directories."""

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise FieldError("name", f"must be a plain directory name, got {self.name!r}")
        if not 0 <= self.seed < 2**63:
            raise FieldError("seed", f"must lie between 0 and 2**63 - 1, got {self.seed}")
        if not self.store:
            raise FieldError("store", "must be a URL or a folder, got ''; write for example runs or s3://bucket/runs")
        if self.workers.most > self.train.shards:
            raise FieldError(
                "workers.num",
                f"must be at most train.shards={self.train.shards}, got {self.workers.most}; "
                "lower it, or give a new run more shards",
            )
        self._check_metrics()

    def _check_metrics(self) -> None:
        """What is measured has a name of its own, and what is watched is measured."""
        for name in self.metrics:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in _ALWAYS_MEASURED:
                raise FieldError(f"metrics.{name}", f"must be a word other than {', '.join(_ALWAYS_MEASURED)}")
        if self.metrics and self.data.val is None:
            raise FieldError("metrics", "needs data.val to be measured on; declare data.val")
        for key, metric in watched_metrics(self).items():
            kind, _, name = metric.partition("/")
            known = (*_ALWAYS_MEASURED, *(self.metrics if kind == "val" else ()))
            if kind not in ("val", "train") or name.partition("/")[0] not in known:
                names = [f"val/{name}" for name in (*_ALWAYS_MEASURED, *self.metrics)]
                names += [f"train/{name}" for name in _ALWAYS_MEASURED]
                raise FieldError(key, f"must be {', '.join(names[:-1])} or {names[-1]}, got {metric!r}")
            if kind == "val" and self.data.val is None:
                raise FieldError(key, f"needs data.val to measure {metric!r}; declare data.val")


def watched_metrics(spec: JobSpec) -> dict[str, str]:
    """The keys under which a metric is named, and the metric."""
    watched: dict[str, str] = {}
    if spec.checkpoint.best is not None:
        watched["checkpoint.best.metric"] = spec.checkpoint.best.metric
    if spec.train.early_stop is not None:
        watched["train.early_stop.metric"] = spec.train.early_stop.metric
    if spec.scheduler is not None and spec.scheduler.monitor is not None:
        watched["scheduler.monitor"] = spec.scheduler.monitor
    return watched


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _learning_rate(args: Mapping[str, Any]) -> None:
    lr = args.get("lr")
    if isinstance(lr, str):
        raise FieldError("lr", f"must be a number, got {lr!r}; {NUMBER_FROM_TEXT}")
    if lr is not None and not (_is_number(lr) and 0 < lr < math.inf):
        raise FieldError("lr", f"must be finite and above 0, got {lr}; write a learning rate such as 0.1")


def _at_least(spec: object, lowest: int, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < lowest:
            raise FieldError(name, f"must be at least {lowest}, got {value}")


def _finite_numbers(args: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in _numbers(args, prefix):
        if isinstance(value, float) and not math.isfinite(value):  # isfinite overflows on a huge int
            raise FieldError(key, f"must be a finite number, got {value}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Target):
        yield from _numbers(value.args, key)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}[{index}]")
    elif _is_number(value):
        yield key, value
