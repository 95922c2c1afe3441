"""A loss as numerator and denominator, so that its mean can be taken over the global batch.

The mean of the shards' means is not the mean of the batch as soon as samples carry weights or are
ignored. So a loss here gives the sum over its micro-batch and what that sum has to be divided by, and the
division uses the denominators of all shards.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jobs.spec import LossSpec, Target
from jobs.targets import Builder, check_arguments, resolve


class GlobalLoss:
    """A loss over a global batch that is spread over shards.

    Attributes:
        weighs_targets: The denominator depends on the targets, and so has to be summed over the shards
            before the backward pass; otherwise it is the same for every micro-batch.
        takes_class_numbers: Targets are numbers of classes, if they are integers.
    """

    def __init__(self, function: Callable[[Any, Any], Tensor], ignores: bool = False) -> None:
        """Takes over a loss; ``ignores``: the description says that some targets do not count."""
        self._function = function
        self._reduction: str | None = None
        self._class_weight: Tensor | None = None
        self._ignore_index: int | None = None
        if isinstance(function, nn.Module) and hasattr(function, "reduction"):
            self._reduction = str(function.reduction)
            function.reduction = "none"  # type: ignore[assignment]  # known to be a string, not a module
        self.takes_class_numbers = isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss))
        if isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss)):
            self._class_weight = function.weight
            self._ignore_index = function.ignore_index
        self.weighs_targets = self._reduction == "mean" and (self._class_weight is not None or ignores)

    def to(self, device: torch.device) -> "GlobalLoss":
        """Moves class weights and other buffers of the loss."""
        if isinstance(self._function, nn.Module):
            self._function.to(device)
        if self._class_weight is not None:
            assert isinstance(self._function, (nn.CrossEntropyLoss, nn.NLLLoss))
            self._class_weight = self._function.weight
        return self

    def numerator(self, output: Any, target: Any) -> tuple[Tensor, float]:
        """The loss summed over a micro-batch, and the denominator where the targets do not decide it.

        Shapes: a scalar that can be differentiated.
        """
        loss = self._function(output, target)
        if self._reduction is None:
            # A loss of one's own: a scalar is the mean over the micro-batch, anything else one value per term.
            samples = len(target) if isinstance(target, Tensor) else 1
            return (loss * samples, samples) if loss.dim() == 0 else (loss.sum(), loss.numel())
        if self._reduction == "sum":
            return loss.sum(), 0.0
        if self._reduction == "batchmean":
            return loss.sum(), loss.shape[0]
        return loss.sum(), loss.numel()

    def denominator(self, own: float, shards: int) -> float:
        """The denominator of the global batch, where the targets do not decide it."""
        return 1.0 if self._reduction == "sum" else own * shards

    def ignores_unsaid(self, counted: float, denominator: float) -> bool:
        """Whether a step had targets that the loss ignores, though the description does not say that any are."""
        return self.takes_class_numbers and not self.weighs_targets and 0 < counted < denominator

    def target_weight(self, target: Tensor) -> Tensor:
        """What a micro-batch adds to the denominator where the targets decide it.

        Shapes: a float64 scalar.
        """
        counted = self.counted(target)
        if counted is None:  # class probabilities: torch divides by the number of them, whatever the class weights
            return torch.tensor(target.numel() / target.shape[1], dtype=torch.float64, device=target.device)
        if self._class_weight is None:
            return counted.sum(dtype=torch.float64)
        return self._class_weight[target[counted]].sum(dtype=torch.float64)

    def counted(self, target: Any) -> Tensor | None:
        """Which targets are class numbers that count, or None if targets are no class numbers."""
        if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
            return None
        if self._ignore_index is None:
            return torch.ones_like(target, dtype=torch.bool)
        return target != self._ignore_index

    def tally(self, output: Any, target: Any, numerator: Tensor) -> Tensor:
        """What a micro-batch adds to the metrics: loss sum, correct, counted.

        Shapes: float64 [3] on the device of the loss.
        """
        correct = count = torch.zeros((), dtype=torch.float64, device=numerator.device)
        counted = self.counted(target)
        if counted is not None and isinstance(output, Tensor) and output.dim() == target.dim() + 1:
            correct = ((output.detach().argmax(1) == target) & counted).sum(dtype=torch.float64)
            count = counted.sum(dtype=torch.float64)
        return torch.stack([numerator.detach().double(), correct, count])


def build_loss(spec: LossSpec, builder: Builder) -> GlobalLoss:
    """A bare name is looked up in ``torch.nn``. A function is taken as it is, a class is built.

    Lists of numbers for ``weight`` and ``pos_weight`` become tensors.

    Raises:
        DescriptionError: The name, an argument or its value is wrong.
    """
    target = spec.factory
    function = resolve(target.path, "loss", [nn])
    if not inspect.isclass(function):
        check_arguments(function, list(target.args), "loss", given=2)
        arguments = dict(target.args)
        return GlobalLoss(lambda output, labels: function(output, labels, **arguments))
    tensors = {
        name: torch.tensor(value, dtype=torch.float32)
        for name, value in target.args.items()
        if name in ("weight", "pos_weight") and isinstance(value, (list, tuple))
    }
    loss = builder.build(Target(target.path, {**target.args, **tensors}), "loss", bare_names=[nn])
    return GlobalLoss(loss, ignores="ignore_index" in target.args)
