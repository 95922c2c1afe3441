"""What the targets of a batch add to the denominator of a loss that weighs them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TargetWeights:
    """The weights of targets, without the loss: the processes that load batches weigh their targets.

    So the weight of a global batch is known before the batch is on a GPU, and no step waits for the GPU to tell it.
    """

    ignored: int
    """The class number that does not count."""
    of_class: tuple[float, ...] | None
    """The weight of each class; None: 1."""

    def __call__(self, target: Tensor) -> float:
        """Returns the weight of targets; the same bits in any order and with any number of threads.

        Shapes: class numbers [N, ...] or probabilities [N, K, ...].

        Raises:
            IndexError: A target that counts is not the number of a class.

        Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html, reduction "mean".
        """
        if not is_integral(target):  # class probabilities: torch divides by their number, whatever the class weights
            return target.numel() / target.shape[1]
        counted = target[target != self.ignored].long()
        if self.of_class is None or counted.numel() == 0:
            return float(counted.numel())
        lowest, highest = (int(bound) for bound in torch.aminmax(counted))
        if lowest < 0 or highest >= len(self.of_class):
            wrong = lowest if lowest < 0 else highest
            raise IndexError(f"target {wrong} is no class: the loss has weights for {len(self.of_class)} classes")
        counts = torch.bincount(counted, minlength=len(self.of_class)).tolist()
        return math.fsum(count * weight for count, weight in zip(counts, self.of_class))


def is_integral(tensor: Tensor) -> bool:
    """Returns whether a tensor can hold class numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex())
