"""The state of the training loop, which a checkpoint holds beside model, optimizer and schedule."""

from dataclasses import dataclass


@dataclass(slots=True)
class LoopState:
    """How far a run is; together with the state of its components, the whole state of the run."""

    step: int = 0
    """Optimizer steps completed."""
    best_metric: float | None = None
    """The best value so far of the metric of ``checkpoint.best``."""
    best_step: int | None = None
    """The step at which it was measured."""
    watched_metric: float | None = None
    """The best value so far of the metric of ``train.early_stop``."""
    num_stalled: int = 0
    """Measurements of that metric in a row without an improvement."""
    ended_early: bool = False
    """Whether early stopping has completed the run."""
