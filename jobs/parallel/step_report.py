"""Reports of steps: each worker's loss and accuracy sums, gathered from all workers without stopping the loop.

A report is gathered while the next two steps run: by GPUs behind the work of its step, by CPUs beside the next one. So
the loss of step n is known after step n + 2, or at once when the loop drains, and all workers learn of a request to
stop at the same step. A CPU enqueues at most two steps before its GPU has done the first.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

_STEPS_IN_FLIGHT = 2
"""Steps whose reports are on their way."""
TALLY_SIZE = 3
"""The length of a micro-batch's tally: loss sum, correct samples, counted samples."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step gave on this worker.

    Attributes:
        tallies: The tally of each of this worker's shards, float64 [shards of this worker, 3], on the worker's device.
        denominator: What the loss of the global batch was divided by.
        rates: The learning rate of each parameter group.
        skipped: Whether the step changed no weights, because the loss or the gradient was not finite.
    """

    tallies: Tensor
    denominator: float
    rates: tuple[float, ...]
    skipped: bool


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step over all workers; the same on every rank, except for ``outcome``.

    Attributes:
        step: Optimizer steps completed, this one included.
        loss: The loss of the global batch.
        denominator: What the loss was divided by.
        correct: Samples whose class was predicted.
        counted: Samples that have a class which counts.
        broken_shards: The shards whose loss was not finite.
        stop: Whether some worker was asked to stop.
        outcome: What the step gave on this worker.
    """

    step: int
    loss: float
    denominator: float
    correct: float
    counted: float
    broken_shards: tuple[int, ...]
    stop: bool
    outcome: StepOutcome


class StepReports:
    """Gathers the reports of a step from all workers while later steps run.

    Collective: every rank pushes every step and drains at the same steps.
    """

    def __init__(self, blocks: Sequence[range], gather_later: Callable[[Tensor], Callable[[], Tensor]]) -> None:
        """``blocks``: the shards of each rank; ``gather_later``: as ``Team.gather_later``."""
        self._blocks = blocks
        self._gather_later = gather_later
        self._width = 1 + TALLY_SIZE * max(len(block) for block in blocks)
        self._in_flight = deque[_GatherInFlight]()

    def push(self, step: int, outcome: StepOutcome, *, stop: bool) -> list[StepReport]:
        """Adds the outcome of a step; returns the report of an earlier step that this completes, if any.

        Args:
            step: Optimizer steps completed, this one included.
            outcome: What the step gave on this worker.
            stop: Whether this worker was asked to stop.

        Collective: every rank, after every step.
        """
        complete = [self._receive()] if len(self._in_flight) == _STEPS_IN_FLIGHT else []
        values = outcome.tallies.new_zeros(self._width)
        values[0].fill_(stop)
        values[1 : 1 + outcome.tallies.numel()] = outcome.tallies.reshape(-1)
        self._in_flight.append(_GatherInFlight(step, outcome, self._gather_later(values)))
        return complete

    def drain(self) -> list[StepReport]:
        """Waits for the outstanding reports and returns them, oldest first.

        Collective: every rank, at the same steps.
        """
        return [self._receive() for _ in range(len(self._in_flight))]

    def _receive(self) -> StepReport:
        """Waits for the oldest report.

        Shapes: each rank has sent float64 [1 + 3 * most shards of a rank]: ``stop``, its tallies, zeros.
        """
        own = self._in_flight.popleft()
        by_rank = own.gathered().tolist()
        tallies = [
            values[1 + TALLY_SIZE * number : 1 + TALLY_SIZE * (number + 1)]
            for block, values in zip(self._blocks, by_rank)
            for number in range(len(block))
        ]
        total, correct, counted = map(exact_sum, zip(*tallies))
        return StepReport(
            step=own.step,
            loss=total / own.outcome.denominator,
            denominator=own.outcome.denominator,
            correct=correct,
            counted=counted,
            broken_shards=tuple(shard for shard, tally in enumerate(tallies) if not math.isfinite(tally[0])),
            stop=any(values[0] for values in by_rank),
            outcome=own.outcome,
        )


@dataclass(frozen=True, slots=True)
class _GatherInFlight:
    """A step, and what waits for the values of all ranks."""

    step: int
    outcome: StepOutcome
    gathered: Callable[[], Tensor]


def exact_sum(terms: Iterable[float]) -> float:
    """Returns the correctly rounded sum, which does not depend on the order of the terms; NaN if a term is not finite.

    Source: Python's ``math.fsum``, after J. R. Shewchuk, "Adaptive Precision Floating-Point Arithmetic", 1997.
    """
    values = list(terms)
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
