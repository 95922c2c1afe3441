"""A whole job: its sections together, its data, its checkpoints and its tracker."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.errors import FieldError
from jobs.spec.checks import at_least
from jobs.spec.components import InitSpec, LossSpec, OptimizerSpec, SchedulerSpec
from jobs.spec.resources import WorkersSpec
from jobs.spec.target import Target
from jobs.spec.training import TrainSpec

_ALWAYS_MEASURED = ("loss", "accuracy")


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
        at_least(self, 0, "loaders")


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
        at_least(self, 1, "every_steps", "keep")
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
