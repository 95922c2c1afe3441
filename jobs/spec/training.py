"""The section for the training loop: length, batches, numerics, validation and early stopping."""

import math
from dataclasses import dataclass
from typing import Literal

from cluster.errors import FieldError
from jobs.spec.checks import at_least

_SMALLEST_BUCKET_MB, _LARGEST_BUCKET_MB = 0.001, 1_000_000
"""1 KiB: below it nearly every gradient is a bucket of its own. 1 TB: above it torch's count of bytes may overflow."""
_SMALLEST_COMPILED_BUCKET_MB = 1
"""The size of DDP's first bucket; torch.compile splits the model by buckets, and the others may not be smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopSpec:
    """When to complete the run before its last epoch."""

    metric: str
    """The metric to watch: a validation metric such as ``val/loss``, at every validation, or ``train/loss``, at the end
    of every epoch."""
    mode: Literal["min", "max"]
    """Whether smaller or larger is better."""
    patience: int
    """The number of measurements in a row without an improvement after which the run ends."""
    min_delta: float = 0.0
    """The metric must beat the best so far by more than this to count as an improvement."""

    def __post_init__(self) -> None:
        at_least(self, 1, "patience")
        if not 0 <= self.min_delta < math.inf:
            raise FieldError("min_delta", f"must be finite and at least 0, got {self.min_delta}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """The training loop. Every setting that may change a bit of the result is here; none is taken from the machine."""

    epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps in all, after which the run saves and stops; null: no limit. ``resume`` lifts a limit that was
    reached."""
    max_seconds: float | None = None
    """Seconds after the start of ``run`` or ``resume`` at which the run saves and stops, for example before a time
    limit of the machine; null: no limit. Each try of a batch job counts from 0, like ``resume``. Only the first start
    of workers may take longer, until one step is done, so that every ``resume`` makes progress. After that, or while it
    waits for workers, the run stops in time, at its newest checkpoint."""
    global_batch: int = 64
    """Samples per optimizer step, over all workers; must divide by ``shards``."""
    shards: int = 4
    """Number of micro-batches in a global batch, each a virtual data-parallel replica that some worker computes. Fixed
    for the life of a run."""
    exact: bool = True
    """Sum gradients in one fixed order, so that any number of workers gives the same bits; false: by all-reduce."""
    bucket_mb: float | None = None
    """MiB of gradients in a bucket: workers exchange each bucket while the backward pass computes the next. A gradient
    is never split, so a bucket may hold more. Null: torch's default, 1 for the first bucket and 25 for the others;
    between hosts of CPUs 3, if ``exact``. Changes no bit while ``exact`` is true."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward pass: float32, or autocast to bfloat16, or to float16 with a gradient scaler."""
    tf32: bool = False
    """Use TensorFloat-32 for matrix products and convolutions of float32 tensors on a GPU."""
    deterministic: bool = True
    """Use only kernels that give the same bits every time (``torch.use_deterministic_algorithms``). It is an error if
    the job runs an operator that has none where its workers are."""
    cudnn_benchmark: bool = False
    """Let cuDNN measure its algorithms and choose the fastest; the choice may differ between runs."""
    channels_last: bool = False
    """Keep 4-dimensional tensors in channels-last (NHWC) memory order."""
    compile: bool = False
    """Compile the model with ``torch.compile``."""
    clip_norm: float | None = None
    """The largest 2-norm of the gradient; a longer one is scaled down to it. Null: off."""
    clip_value: float | None = None
    """The largest absolute value of a number in the gradient; larger ones are clipped to it. Null: off."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, which validation uses. Null: no average."""
    threads: int = 1
    """CPU threads per operator in each worker. Another number may round differently."""
    validate_every_epochs: int | None = None
    """Epochs between validations; null: 1, or none if ``validate_every_steps`` is set. The end of a run is always
    validated."""
    validate_every_steps: int | None = None
    """Optimizer steps between validations; null: validate by epoch."""
    early_stop: EarlyStopSpec | None = None
    """Complete the run once a metric no longer improves; null: off."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a loss is NaN or infinite: ``stop`` ends the run; ``skip`` leaves out the update of that step, also
    if only the gradient is not finite. With ``skip`` all workers wait for their GPU and for each other's loss in
    every step."""
    log_every_steps: int = 1
    """Optimizer steps between rows of ``metrics.jsonl``. A step with a validation always has a row."""

    def __post_init__(self) -> None:
        at_least(
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
        if self.bucket_mb is not None and not _SMALLEST_BUCKET_MB <= self.bucket_mb <= _LARGEST_BUCKET_MB:
            raise FieldError(
                "bucket_mb",
                f"must lie between {_SMALLEST_BUCKET_MB} and {_LARGEST_BUCKET_MB}, got {self.bucket_mb}; "
                "null chooses a size",
            )
        if self.compile and self.bucket_mb is not None and self.bucket_mb < _SMALLEST_COMPILED_BUCKET_MB:
            raise FieldError(
                "bucket_mb",
                f"must be at least {_SMALLEST_COMPILED_BUCKET_MB} while train.compile is true, got {self.bucket_mb}; "
                "null chooses a size",
            )
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
