"""The small report that every worker makes of every step, and what all of them make of it together.

A report travels while the next steps are computed: it is read on the device two steps later, when reading
no longer makes the CPU wait for the GPU, and gathered beside the following step. So the loss of step n is
known after step n + 2, or at once when the loop drains, and a wish to stop is heard by all at the same step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.collectives.exchange import all_gather_flat

TALLY_SIZE = 3
"""Numbers in the tally of a micro-batch: loss sum, correct, counted."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What came of a step.

    Attributes:
        tallies: What each shard of this worker adds to the metrics, float64 [shards of this rank, 3].
        denominator: What the loss was divided by.
        rates: The learning rate of each parameter group.
        skipped: Something was not finite, and the step changed nothing.
    """

    tallies: Tensor
    denominator: float
    rates: tuple[float, ...]
    skipped: bool


@dataclass(frozen=True, slots=True)
class StepReport:
    """What is known of a step once all workers have reported it; the same on every rank.

    Attributes:
        step: Optimizer steps completed, this one included.
        loss: The loss over the global batch.
        denominator: What the loss was divided by.
        correct: Samples whose class was predicted.
        counted: Samples that have a class.
        broken_shards: The shards whose loss was not finite.
        stop: Some worker was asked to stop.
        outcome: What this rank came to in the step.
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
    """Gathers the reports of steps, in the background of later steps.

    Collective: every rank pushes every step, and drains at the same steps.
    """

    def __init__(self, blocks: Sequence[range], group: dist.ProcessGroup) -> None:
        """``blocks``: the shards of each rank; ``group``: a CPU group over all ranks."""
        self._blocks = blocks
        self._group = group
        self._width = 1 + TALLY_SIZE * max(len(block) for block in blocks)
        self._own: _LocalReport | None = None
        self._travelling: _GatherInFlight | None = None

    def push(self, step: int, outcome: StepOutcome, *, stop: bool) -> list[StepReport]:
        """Hands in the outcome of a step; returns the report that has become complete, if any."""
        complete = self._advance()
        self._own = _LocalReport(step, _copy_to_host(outcome.tallies), stop, outcome)
        return complete

    def drain(self) -> list[StepReport]:
        """The reports of all steps pushed so far; waits for them."""
        return [*self._advance(), *self._advance()]

    def _advance(self) -> list[StepReport]:
        """Receives the report that travels, and sends the one that waits."""
        complete = [self._receive(self._travelling)] if self._travelling else []
        self._travelling = self._send(self._own) if self._own else None
        self._own = None
        return complete

    def _send(self, own: "_LocalReport") -> "_GatherInFlight":
        tallies = own.tallies()  # waits for the GPU, which has had a whole step to come this far
        values = torch.zeros(self._width, dtype=torch.float64)
        values[0] = float(own.stop)
        values[1 : 1 + tallies.numel()] = tallies.reshape(-1)
        gathered = torch.empty(len(self._blocks) * self._width, dtype=torch.float64)
        work = all_gather_flat(gathered, values, self._group, async_op=True)
        assert work is not None, "an asynchronous collective is work"
        return _GatherInFlight(own, gathered, work)

    def _receive(self, report: "_GatherInFlight") -> StepReport:
        report.work.wait()
        by_rank = report.gathered.view(len(self._blocks), self._width).tolist()
        tallies = [
            values[1 + TALLY_SIZE * number : 1 + TALLY_SIZE * (number + 1)]
            for block, values in zip(self._blocks, by_rank)
            for number in range(len(block))
        ]
        total, correct, counted = map(exact_sum, zip(*tallies))
        own = report.own
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
    """The correctly rounded sum, which no order of the terms can change; not finite if a term is not."""
    values = list(terms)
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def _copy_to_host(values: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the CPU; the function returned waits for it."""
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
