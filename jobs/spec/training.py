"""The training loop of a job: its length, its batches, its arithmetic, when it validates and ends."""

import math
from dataclasses import dataclass
from typing import Literal

from cluster.errors import FieldError
from jobs.spec.checks import at_least


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
        at_least(self, 1, "patience")
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
