"""Metrics over a whole dataset, exact for any number of workers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cluster.errors import TrainingError
from jobs.losses import GlobalLoss
from jobs.pulse import exact_sum
from jobs.team import Team


@torch.no_grad()
def evaluate(model: nn.Module, loss: GlobalLoss, batches: Iterable[Any], team: Team) -> dict[str, float]:
    """Loss and accuracy over every batch of every worker, each sample once.

    Returns:
        ``val/loss``, as one process with the whole dataset would compute it (with ``reduction: sum`` the
        mean over samples), and ``val/accuracy`` if targets are class numbers.

    Raises:
        TrainingError: The loss ignores all targets.

    Collective: every rank, with its share of the batches.
    """
    was_training = model.training
    model.eval()
    sums = []
    for inputs, target in batches:
        output = model(inputs)
        numerator, own = loss.numerator(output, target)
        weight = loss.weight(target, numerator, own)
        sums.append(torch.cat([loss.tally(output, target, numerator), weight.reshape(1)]))
    model.train(was_training)
    tallies = team.gather_rows([row.tolist() for row in torch.stack(sums).cpu()] if sums else [], width=4)
    total, correct, counted, weight_sum = map(exact_sum, zip(*tallies))
    if weight_sum == 0:
        raise TrainingError("every target of data.val is ignored; give it some that count")
    measured = {"val/loss": total / loss.denominator(weight_sum)}
    if counted:
        measured["val/accuracy"] = correct / counted
    return measured
