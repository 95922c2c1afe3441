"""Whether a watched metric still improves: the best checkpoint so far, and early stopping."""

import math
from collections.abc import Mapping
from typing import Literal

from jobs.checkpoint.loop_state import LoopState
from jobs.spec import BestSpec, EarlyStopSpec


def note_best(rule: BestSpec | None, state: LoopState, metrics: Mapping[str, float]) -> bool:
    """Returns whether the metric of ``checkpoint.best`` was measured and is the best so far; records it in ``state``.

    Args:
        rule: ``checkpoint.best``.
        state: The state of the loop at this step.
        metrics: The metrics measured at this step.
    """
    if rule is None or rule.metric not in metrics:
        return False
    if not _is_better(metrics[rule.metric], state.best_metric, rule.mode):
        return False
    state.best_metric, state.best_step = metrics[rule.metric], state.step
    return True


def note_stall(rule: EarlyStopSpec | None, state: LoopState, metrics: Mapping[str, float]) -> str | None:
    """Counts measurements in a row without an improvement, in ``state``.

    Args:
        rule: ``train.early_stop``.
        state: The state of the loop at this step.
        metrics: The metrics measured at this step.

    Returns:
        Why the run has to stop early, in one line; None if it goes on.
    """
    if rule is None or rule.metric not in metrics:
        return None
    if _is_better(metrics[rule.metric], state.watched_metric, rule.mode, rule.min_delta):
        state.watched_metric, state.num_stalled = metrics[rule.metric], 0
        return None
    state.num_stalled += 1
    if state.num_stalled < rule.patience:
        return None
    return f"{rule.metric} has not improved on {state.watched_metric:.6g} for {rule.patience} measurements"


def _is_better(value: float, best: float | None, mode: Literal["min", "max"], by: float = 0.0) -> bool:
    """Returns whether ``value`` improves on ``best`` by more than ``by``; NaN never does."""
    if math.isnan(value):
        return False
    return best is None or (value > best + by if mode == "max" else value < best - by)
