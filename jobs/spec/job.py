"""The whole job, and the sections for data, checkpoints and tracking."""

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
class ShuffleSpec:
    """Read runs of neighbouring samples in a random order, and mix them in buffers, for data in few large objects on a
    remote store. Every sample still comes at most once in an epoch."""

    block: int
    """Samples of a run: neighbours in the data that are read together."""
    buffer: int
    """Samples that are mixed: each stream of samples has ``buffer / block`` blocks open at a time, and takes its next
    samples from all of them. At least a micro-batch."""
    streams: int = 1
    """Streams of each shard, which give it its micro-batches in turn. With as many as ``data.loaders``, each loader
    process has a stream and a buffer of its own, and no block is read by two of them."""

    def __post_init__(self) -> None:
        at_least(self, 1, "block", "buffer", "streams")
        if self.buffer < self.block:
            raise FieldError("buffer", f"must be at least block={self.block}, got {self.buffer}; raise it")

    @property
    def lanes(self) -> int:
        """Blocks that a stream has open at a time."""
        return self.buffer // self.block

    @property
    def kept_samples(self) -> int:
        """Samples that a process keeps of each stream that it reads, to read no block twice while it is open."""
        # Lanes begin evenly spread over a block, so half a block of each is yet to be used; as much of those that two
        # lanes share waits for the second one. A shorter block or the ends of a stream add a few.
        return self.buffer + 4 * self.block


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """The datasets."""

    train: Target
    """The training dataset: a map-style dataset, or a function that returns one. A sample is (input, target)."""
    val: Target | None = None
    """The validation dataset; null: no validation."""
    loaders: int = 0
    """Loader processes per worker, each of which keeps two micro-batches ready; 0: the worker loads samples itself."""
    shuffle: ShuffleSpec | None = None
    """The order of training samples; null: a permutation of all of them in each epoch."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do about a sample that is gone, damaged or no image (``jobs.data.BadSample``, which your own dataset may
    raise too): ``error`` ends the run; ``skip`` replaces it by another one in training, chosen by seed, epoch and
    sample, and leaves it out of a validation. ``launcher status`` counts what was skipped, and ``events.jsonl`` lists
    it. A store that does not answer is no bad sample, it ends the run."""

    def __post_init__(self) -> None:
        at_least(self, 0, "loaders")


@dataclass(frozen=True, kw_only=True, slots=True)
class BestSpec:
    """Which checkpoint is the best one."""

    metric: str
    """A validation metric such as ``val/accuracy``, compared at every validation, or ``train/loss``, compared at the
    end of every epoch."""
    mode: Literal["min", "max"]
    """Whether smaller or larger is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """When to save checkpoints, and which to keep. The end of a run is always saved."""

    every_steps: int | None = None
    """Optimizer steps between checkpoints; null: a checkpoint at the end of every epoch."""
    keep: int = 3
    """The number of newest checkpoints to keep."""
    best: BestSpec | None = None
    """Save a checkpoint whenever this metric improves, and always keep the best one; null: off."""
    patience_s: float = 1800.0
    """Seconds for which training goes on while the store does not answer; after that the run ends, and can be
    resumed."""

    def __post_init__(self) -> None:
        at_least(self, 1, "every_steps", "keep")
        if not 0 < self.patience_s < math.inf:
            raise FieldError("patience_s", f"must be finite and above 0 seconds, got {self.patience_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingSpec:
    """Tracking with Weights & Biases. A failure of the tracker never stops a run."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """``online`` sends to the host and with the key in the environment; ``offline`` records on this machine, for a
    later ``wandb sync``; ``disabled`` records nothing."""
    project: str = "launcher"
    """The W&B project."""
    entity: str | None = None
    """The W&B user or team; null: that of the key."""
    group: str | None = None
    """The W&B group; W&B shows the runs of a group together."""
    tags: tuple[str, ...] = ()
    """The run's tags in W&B."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """A training run. Its state after n steps is a function of this description and n."""

    name: str
    """The name of the run's directory in the store; by default the name of the job file without its suffix."""
    model: Target
    """The model, a ``torch.nn.Module``. It is called with a batch of inputs and returns what the loss accepts."""
    data: DataSpec
    loss: LossSpec
    """The loss, by its name in ``torch.nn`` or an import path. It is called with (output, target)."""
    optimizer: OptimizerSpec
    """The optimizer, by its name in ``torch.optim`` or an import path."""
    scheduler: SchedulerSpec | None = None
    """The learning-rate schedule, by its name in ``torch.optim.lr_scheduler`` or an import path; null: a constant
    rate."""
    train: TrainSpec = field(default_factory=TrainSpec)
    workers: WorkersSpec = field(default_factory=WorkersSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    metrics: Mapping[str, Target] = field(default_factory=dict)
    """What validation measures beside loss and accuracy. Each key names a metric; its value is a metric of torchmetrics
    by name, or a subclass of ``torchmetrics.Metric`` by import path."""
    init_from: InitSpec | None = None
    """Initial weights instead of random ones: a URL, or a mapping with the keys below; null: random weights."""
    seed: int = 0
    """The seed of every random draw."""
    store: str = "runs"
    """The folder or fsspec URL that holds the run directories."""

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
        shuffle = self.data.shuffle
        if shuffle is not None and shuffle.buffer < self.train.micro_batch:
            raise FieldError(
                "data.shuffle.buffer",
                f"must be at least a micro-batch, train.global_batch / train.shards = {self.train.micro_batch}, got "
                f"{shuffle.buffer}; a smaller one mixes nothing",
            )
        self._check_metrics()

    def _check_metrics(self) -> None:
        """Refuses metrics with a wrong name, and watched metrics that nothing measures."""
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
    """Returns the metrics that a rule of the description watches, by the key of the rule."""
    watched: dict[str, str] = {}
    if spec.checkpoint.best is not None:
        watched["checkpoint.best.metric"] = spec.checkpoint.best.metric
    if spec.train.early_stop is not None:
        watched["train.early_stop.metric"] = spec.train.early_stop.metric
    if spec.scheduler is not None and spec.scheduler.monitor is not None:
        watched["scheduler.monitor"] = spec.scheduler.monitor
    return watched
