"""How the losses of torch.nn are called: which tensors of output and target each takes, in which order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class LossCall:
    """How a loss is called."""

    num_outputs: int
    """The number of tensors that it takes from the model's output."""
    arguments: Callable[[Any, Any], tuple[Any, ...]]
    """Returns the loss's arguments, given output and target."""
    class_dim: int = 1
    """The dimension of the output that runs over classes."""


_PLAIN = LossCall(1, lambda output, target: (output, target))
_CALLS: dict[type, LossCall] = {
    nn.CosineEmbeddingLoss: LossCall(2, lambda output, target: (*output, target)),
    nn.MarginRankingLoss: LossCall(2, lambda output, target: (*output, target)),
    nn.TripletMarginLoss: LossCall(3, lambda output, _: tuple(output)),
    nn.TripletMarginWithDistanceLoss: LossCall(3, lambda output, _: tuple(output)),
    nn.GaussianNLLLoss: LossCall(2, lambda output, target: (output[0], target, output[1])),
    # log_probs_TNC; the target is (targets, input_lengths, target_lengths)
    nn.CTCLoss: LossCall(1, lambda output, target: (output, *target), class_dim=2),
}


def call_of(function: Callable[..., Any]) -> LossCall:
    """Returns how a loss is called; one that is not torch's gets (output, target)."""
    return next((call for base, call in _CALLS.items() if isinstance(function, base)), _PLAIN)
