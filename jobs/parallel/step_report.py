"""Reports of steps: each worker's loss and accuracy sums, gathered from all workers without stopping the loop.

A report is gathered while the next steps run. The CPU reads it from the GPU one step later, when the copy is done and
the CPU need not wait for it, and receives the other workers' reports after one more step. So the loss of step n is
known after step n + 2, or at once when the loop drains, and all workers learn of a request to stop at the same step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.collectives.groups import all_gather_flat

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

    def __init__(self, blocks: Sequence[range], group: dist.ProcessGroup) -> None:
        """``blocks``: the shards of each rank; ``group``: a gloo group of all ranks."""
        self._blocks = blocks
        self._group = group
        self._width = 1 + TALLY_SIZE * max(len(block) for block in blocks)
        self._unsent: _LocalReport | None = None
        self._in_flight: _GatherInFlight | None = None

    def push(self, step: int, outcome: StepOutcome, *, stop: bool) -> list[StepReport]:
        """Adds the outcome of a step; returns the report of an earlier step that this completes, if any.

        Args:
            step: Optimizer steps completed, this one included.
            outcome: What the step gave on this worker.
            stop: Whether this worker was asked to stop.

        Collective: every rank, after every step.
        """
        complete = self._advance()
        self._unsent = _LocalReport(step, _copy_to_host(outcome.tallies), stop, outcome)
        return complete

    def drain(self) -> list[StepReport]:
        """Waits for the outstanding reports and returns them, oldest first.

        Collective: every rank, at the same steps.
        """
        return [*self._advance(), *self._advance()]

    def _advance(self) -> list[StepReport]:
        """Completes the gather in flight and starts the next."""
        complete = [self._receive(self._in_flight)] if self._in_flight else []
        self._in_flight = self._send(self._unsent) if self._unsent else None
        self._unsent = None
        return complete

    def _send(self, own: "_LocalReport") -> "_GatherInFlight":
        """Starts the gather of a report.

        Shapes: each rank sends float64 [1 + 3 * most shards of a rank]: ``stop``, its tallies, zeros.
        """
        tallies = own.tallies()  # waits for the GPU, which had a whole step to finish the copy
        values = torch.zeros(self._width, dtype=torch.float64)
        values[0] = float(own.stop)
        values[1 : 1 + tallies.numel()] = tallies.reshape(-1)
        gathered = torch.empty(len(self._blocks) * self._width, dtype=torch.float64)
        work = all_gather_flat(gathered, values, self._group, async_op=True)
        assert work is not None, "an asynchronous collective returns its work"
        return _GatherInFlight(own, gathered, work)

    def _receive(self, gather: "_GatherInFlight") -> StepReport:
        gather.work.wait()
        by_rank = gather.gathered.view(len(self._blocks), self._width).tolist()
        tallies = [
            values[1 + TALLY_SIZE * number : 1 + TALLY_SIZE * (number + 1)]
            for block, values in zip(self._blocks, by_rank)
            for number in range(len(block))
        ]
        total, correct, counted = map(exact_sum, zip(*tallies))
        own = gather.own
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
class _LocalReport:
    step: int
    tallies: Callable[[], Tensor]
    stop: bool
    outcome: StepOutcome


@dataclass(frozen=True, slots=True)
class _GatherInFlight:
    own: _LocalReport
    gathered: Tensor
    work: dist.Work


def exact_sum(terms: Iterable[float]) -> float:
    """Returns the correctly rounded sum, which does not depend on the order of the terms; NaN if a term is not finite.

    Source: Python's ``math.fsum``, after J. R. Shewchuk, "Adaptive Precision Floating-Point Arithmetic", 1997.
    """
    values = list(terms)
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _copy_to_host(values: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the CPU; returns a function that waits for the copy and returns it.

    Shapes: any -> the same, on the CPU.
    """
    if not values.is_cuda:
        return lambda: values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
