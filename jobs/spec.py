"""The job language: what a person may write, as frozen dataclasses.

Standard library only, so that a mistake is found before torch or Ray is imported. A value that can
be judged alone is judged here; what needs the data, the model or the machine is judged by the plan.
The docstring under a field is its reference text: ``launcher schema`` prints it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NUMBER_FROM_TEXT = "remove the quotes, or write ${oc.decode:${oc.env:NAME}} for a number from the environment"
"""What to do where text stands for a number: an environment variable is text until it is decoded."""


class FieldError(ValueError):
    """A field holds a value that makes no sense; ``key`` is relative to the section that raised it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key
        self.problem = problem


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
class GroupSpec:
    """One parameter group: the parameters whose names match, and what differs for them."""

    match: str
    """A shell pattern over parameter names such as ``*.bias``, or ``type:NORM`` for the own parameters of
    every module whose class name matches, such as ``type:BatchNorm*``. The first group that matches wins."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Any argument of the optimizer, for this group alone."""
    from_epoch: int | None = None
    """Frozen until this epoch (counted from 0) begins, then trained."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "from_epoch")
        _learning_rate(self.args)
        _finite_numbers(self.args)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """An optimizer and its parameter groups."""

    target: Target
    groups: tuple[GroupSpec, ...] = ()

    def __post_init__(self) -> None:
        _learning_rate(self.target.args)
        _finite_numbers(self.target.args)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """A learning-rate schedule."""

    target: Target
    interval: Literal["step", "epoch"] = "epoch"
    """When the schedule advances: after every optimizer step, or after every epoch."""
    monitor: str | None = None
    """The metric that ReduceLROnPlateau watches, such as ``val/loss``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """The training loop. Whatever may change a bit of the result is here, never taken from the machine."""

    epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop, saved and resumable, after this many optimizer steps in all; ``resume`` lifts a limit that was reached."""
    global_batch: int = 64
    """Samples per optimizer step, over all workers."""
    shards: int = 4
    """Virtual data-parallel replicas: a global batch is this many micro-batches. Fixed for the life of a run."""
    exact: bool = True
    """Sum gradients in one fixed order, so that any number of workers gives the same bits."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass: 32-bit, or autocast to bfloat16."""
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
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per step, and validate with it."""
    threads: int = 1
    """CPU threads within an operator, per worker; a different number may round differently."""
    validate_every_epochs: int = 1
    """Epochs between validations; the last epoch is always validated."""
    log_every_steps: int = 1
    """Optimizer steps between rows of ``metrics.jsonl``; a validation always makes a row."""

    def __post_init__(self) -> None:
        _at_least(
            self, 1, "epochs", "max_steps", "global_batch", "shards", "threads",
            "validate_every_epochs", "log_every_steps",
        )  # fmt: skip
        if self.global_batch % self.shards:
            lower = self.global_batch - self.global_batch % self.shards
            raise FieldError(
                "global_batch",
                f"must divide by train.shards={self.shards}, got {self.global_batch}; "
                f"write {lower + self.shards}" + (f" or {lower}" if lower else ""),
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise FieldError("clip_norm", f"must be finite and above 0, got {self.clip_norm}; null turns clipping off")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise FieldError("ema_decay", f"must lie between 0 and 1, got {self.ema_decay}; null turns averaging off")
        if self.cudnn_benchmark and self.deterministic:
            raise FieldError("cudnn_benchmark", "cannot be true while train.deterministic is; set one of them to false")

    @property
    def micro_batch(self) -> int:
        """Samples of one shard in one step."""
        return self.global_batch // self.shards


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersSpec:
    """Who does the work. Nothing here changes a bit of the result."""

    num: int = 1
    """Workers, at most ``train.shards``; the number of shards need not divide by it."""
    cpus: float = 0.5
    """CPU cores that each worker reserves; a fraction lets several share a core."""
    gpus: int | Literal["auto"] = "auto"
    """GPUs per worker: 1 (NCCL), 0 (CPU with gloo), or auto: 1 where every worker can have one, else 0."""
    accelerator: str | None = None
    """The accelerator type a worker needs, by Ray's name for it, such as ``H100``."""
    max_failures: int = 3
    """Lost workers to recover from before the run is given up; errors of the training code are never retried."""
    timeout_s: float = 600.0
    """Seconds a worker waits for the others, in an exchange or at the start, before it counts as lost."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num")
        _at_least(self, 0, "max_failures")
        if not 0 < self.cpus < math.inf:
            raise FieldError("cpus", f"must be finite and above 0, got {self.cpus}")
        if not 0 < self.timeout_s < math.inf:
            raise FieldError("timeout_s", f"must be finite and above 0 seconds, got {self.timeout_s}")
        if self.gpus not in ("auto", 0, 1):
            raise FieldError(
                "gpus", f"must be 0, 1 or auto, got {self.gpus!r}; a worker drives one GPU, raise workers.num"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BestSpec:
    """Which checkpoint counts as the best."""

    metric: str
    """A validation metric: ``val/loss`` or ``val/accuracy``."""
    mode: Literal["min", "max"]
    """Whether smaller or larger is better."""

    def __post_init__(self) -> None:
        if self.metric not in ("val/loss", "val/accuracy"):
            raise FieldError("metric", f"must be val/loss or val/accuracy, got {self.metric!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """When checkpoints are made, and which are kept. One is always made at the end."""

    every_steps: int | None = None
    """Optimizer steps between checkpoints, also within an epoch; none: at the end of each epoch."""
    keep: int = 3
    """How many of the newest checkpoints are kept."""
    best: BestSpec | None = None
    """Also make a checkpoint whenever this metric improves, and keep the best one."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every_steps", "keep")


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
    loss: Target
    """A loss, by a bare name of ``torch.nn`` or an import path; called with (output, target)."""
    optimizer: OptimizerSpec
    """An optimizer, by a bare name of ``torch.optim`` or an import path, with ``groups``."""
    scheduler: SchedulerSpec | None = None
    """A schedule, by a bare name of ``torch.optim.lr_scheduler`` or an import path; none: a constant rate."""
    train: TrainSpec = field(default_factory=TrainSpec)
    workers: WorkersSpec = field(default_factory=WorkersSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
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
        if self.workers.num > self.train.shards:
            raise FieldError(
                "workers.num",
                f"must be at most train.shards={self.train.shards}, got {self.workers.num}; "
                "lower it, or give a new run more shards",
            )
        best = self.checkpoint.best
        if best is not None and self.data.val is None:
            raise FieldError("checkpoint.best", f"needs data.val to measure {best.metric!r}; declare data.val")


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
