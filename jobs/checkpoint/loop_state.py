"""What changes in a run beside model, optimizer and schedule."""

from dataclasses import dataclass


@dataclass(slots=True)
class LoopState:
    """How far the run is: with the parts, its whole state."""

    step: int = 0
    """Optimizer steps completed."""
    best_metric: float | None = None
    """The best value so far of what ``checkpoint.best`` watches."""
    best_step: int | None = None
    watched_metric: float | None = None
    """The best value so far of what ``train.early_stop`` watches."""
    num_stalled: int = 0
    """Measurements of it in a row without an improvement."""
    ended_early: bool = False
    """The run is complete before its last step."""
