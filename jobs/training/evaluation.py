"""Metrics over a whole dataset, exact for any number of workers.

A validation begins and ends between two steps, so no checkpoint lies within one. If a worker is lost in the middle, the
whole validation is repeated from the same weights.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import TrainingError
from jobs.components.buffers import MODEL, Buffers
from jobs.components.losses import GlobalLoss
from jobs.components.metric_values import MetricValues
from jobs.data.loader import LoadedBatch, seed_draws, seed_host_draws
from jobs.parallel.step_report import exact_sum
from jobs.parallel.worker_team import Team
from jobs.sampling import draw_key

if TYPE_CHECKING:  # importing it imports torchmetrics; only jobs with metrics pay for that
    from jobs.components.metrics import MetricSet


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and then each of its modules into the mode that it had.

    A model may keep some of its modules, such as frozen batch norms, in evaluation mode while it trains.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: GlobalLoss,
    metrics: "MetricSet | None",
    batches: Iterable[LoadedBatch],
    team: Team,
    seed: int,
) -> MetricValues:
    """Measures loss, accuracy and the declared metrics over the batches of all workers, each sample once.

    Every batch begins with the same buffers, and all buffers are as before afterwards: which batches a worker measures
    must not matter.

    The CPU waits for the GPU after the last batch alone, unless a metric does at every batch, as torchmetrics' do to
    check their arguments.

    Args:
        model: Called with the inputs of a batch; in evaluation mode meanwhile.
        loss: The loss of the job.
        metrics: The declared metrics, if there are any.
        batches: Those of this rank, on its device, with the numbers rank, rank + W, rank + 2W, ...; weighed if the loss
            weighs targets.
        team: All W workers.
        seed: Seeds the random draws of each forward pass, by the number of the batch.

    Returns:
        ``val/loss``, as one process with the whole dataset would compute it; ``val/accuracy``, if targets are class
        numbers; and the values of the metrics. The same on every rank. A value that is not finite is left out, so that
        rows stay JSON: for a rule that watches it, nothing was measured.

    Raises:
        TrainingError: The loss ignores all targets, or all batches are empty.

    Collective: every rank.
    """
    buffers = Buffers({MODEL: model, **loss.modules()})
    at_start = buffers.take(with_values=True)
    tallies, weights = [], []  # of each batch
    with evaluation_mode(model):
        for number, batch in zip(count(team.rank, team.world_size), batches):
            if batch.is_empty:
                if metrics is not None:
                    metrics.pass_over()
                continue
            inputs, target, weight = batch.inputs, batch.target, batch.weight
            seed_draws(draw_key("evaluation", seed, number), team.device)
            output = model(inputs)
            numerator, own = loss.numerator(output, target)
            tallies.append(loss.tally(output, target, numerator))
            weights.append(own if weight is None else weight)
            if metrics is not None:
                metrics.update(*loss.measured(output, target))
            buffers.put(at_start)
    on_host = torch.stack(tallies).tolist() if tallies else []  # the wait
    rows = team.gather_rows([[*tally, weight] for tally, weight in zip(on_host, weights)], width=4)
    if not rows:
        raise TrainingError("every sample of data.val is bad; repair the data, or leave data.val out")
    total, correct, counted, weight_sum = map(exact_sum, zip(*rows))
    if weight_sum == 0:
        raise TrainingError("every target of data.val is ignored; give it some that count")
    numbers = {"val/loss": total / loss.denominator(weight_sum)}
    if counted:
        numbers["val/accuracy"] = correct / counted
    values = MetricValues({name: value for name, value in numbers.items() if math.isfinite(value)})
    return values if metrics is None else values | _measure(metrics, team, seed)


def _measure(metrics: "MetricSet", team: Team, seed: int) -> MetricValues:
    """Returns the declared metrics on every rank: rank 0, which always has a batch, computes them for all.

    Collective: every rank.
    """
    shares: list[Any] | None = [None] * team.world_size if team.rank == 0 else None
    dist.gather_object(metrics.share(), shares, dst=0, group=team.cpu_group)

    def compute() -> MetricValues:
        assert shares is not None, "only rank 0 computes"
        seed_host_draws(draw_key("metrics", seed))  # some metrics draw random subsets
        return metrics.compute(shares)

    return team.from_rank_0(compute)
