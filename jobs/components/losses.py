"""A loss as numerator and denominator, so that its mean can be taken over the global batch.

The mean of the shards' means is not the mean of the batch once samples have weights or are ignored. So a loss returns
the sum over a micro-batch and the denominator of that sum, and the sum is divided by the denominators of all shards.
The dry run checks that output and target fit the loss.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import DescriptionError, TrainingError
from jobs.components.buffers import Buffers
from jobs.components.loss_calls import call_of
from jobs.components.target_weights import TargetWeights, is_integral
from jobs.components.targets import Builder, check_arguments, resolve
from jobs.spec import LossSpec, Target

CLASS_NUMBER_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
"""Losses whose targets are class numbers."""
_IGNORING = (nn.CrossEntropyLoss, nn.NLLLoss)
"""Those of them that ignore one class number, and divide by the class weights of the other targets."""
_DEFAULT_IGNORE_INDEX = -100
"""torch's default. Most data has no such label, so a loss with the default does not exchange weights in every step."""


class GlobalLoss:
    """A loss over a global batch that is split into shards.

    Attributes:
        spec: ``loss`` of the description.
        function: The loss itself; its ``reduction``, if it has one, is set to ``none``.
        call: How it is called.
        weighs_targets: Whether the denominator depends on the targets; it is then summed over the shards before the
            backward pass. Otherwise it is the same for every micro-batch.
        takes_class_numbers: Whether integer targets are class numbers.
    """

    def __init__(self, function: Callable[..., Tensor], spec: LossSpec) -> None:
        """Takes over a loss, and sets its ``reduction`` to ``none``.

        Raises:
            DescriptionError: It has weights to train, or a reduction that torch does not know.
        """
        self.spec = spec
        self.function = function
        self.call = call_of(function)
        self.takes_class_numbers = spec.target in ("index", "one_hot") or (
            spec.target is None and isinstance(function, CLASS_NUMBER_LOSSES)
        )
        self.weighs_targets = False
        self._ignore_index: int | None = None
        self._reduction: str | None = None
        if isinstance(function, nn.Module) and any(parameter.requires_grad for parameter in function.parameters()):
            raise DescriptionError(
                f"loss._target_ {spec.factory.path} has weights of its own, which no optimizer trains; make it the "
                "model's last layer, with a loss of your own that passes its value on"
            )
        if isinstance(getattr(function, "reduction", None), str):
            self._reduction = _known_reduction(function)
            self._set_reduction("none")
        if isinstance(function, _IGNORING) and spec.target in (None, "index"):
            self._ignore_index = function.ignore_index
            ignores = "ignore_index" in spec.factory.args or function.ignore_index != _DEFAULT_IGNORE_INDEX
            self.weighs_targets = self._reduction == "mean" and (function.weight is not None or ignores)

    def modules(self) -> dict[str, nn.Module]:
        """Returns the loss if it is a module, or the modules among the arguments of a loss function, by their keys."""
        if isinstance(self.function, nn.Module):
            return {"loss": self.function}
        arguments = self.function.keywords if isinstance(self.function, functools.partial) else {}
        return {f"loss.{name}": value for name, value in arguments.items() if isinstance(value, nn.Module)}

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "GlobalLoss":
        """Moves class weights and other buffers of the loss to ``device``, as ``dtype``, the model's number type."""
        if isinstance(self.function, nn.Module):
            self.function.to(device, dtype)
        elif isinstance(self.function, functools.partial):
            arguments = self.function.keywords
            movable = {name: value for name, value in arguments.items() if isinstance(value, (Tensor, nn.Module))}
            moved = {name: value.to(device, dtype) for name, value in movable.items()}
            self.function = functools.partial(self.function, **moved)
        return self

    def sees(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Returns output and target as the loss receives them: after ``loss.output`` and ``loss.target``.

        Shapes: output [N, K, ...] -> the same. target [N, ...] -> the same; ``one_hot``: the shape of the output;
            ``float``: the shape of the output if it has the same numbers.
        """
        if self.spec.output == "sigmoid":
            output = output.sigmoid()
        elif self.spec.output == "softmax":
            output = output.softmax(self.call.class_dim)
        elif self.spec.output == "log_softmax":
            output = output.log_softmax(self.call.class_dim)
        if self.spec.target == "index":
            target = target.long()
        elif self.spec.target == "one_hot":
            target = torch.zeros_like(output, dtype=number_type(output)).scatter_(1, target.long().unsqueeze(1), 1)
        elif self.spec.target == "float":
            like = first(output)
            target = target.to(number_type(like))
            target = target.reshape(like.shape) if fits_into(target.shape, like.shape) else target
        return output, target

    def measured(self, output: Any, target: Any) -> tuple[Any, Any]:
        """Returns output and target as a metric receives them: as the loss does, except that class numbers stay so."""
        output, seen_target = self.sees(output, target)
        return output, target if self.spec.target == "one_hot" else seen_target

    def numerator(self, output: Any, target: Any) -> tuple[Tensor, float]:
        """Returns the loss summed over a micro-batch, and its denominator if the targets do not decide that.

        Raises:
            TrainingError: The loss changes its class weights, while the mean is taken with those it had before.

        Shapes: output and target with N samples in dimension 0 -> a scalar that can be differentiated, a number.
        """
        weights = self._class_weights()
        version = None if weights is None else weights._version
        loss = self._terms(output, target)
        if weights is not self._class_weights() or (weights is not None and weights._version != version):
            raise TrainingError(
                f"loss: {self.spec.factory.path} changes its weight in forward, and the global batch is divided by the "
                "weights that targets had before; write a loss without reduction, which returns its own mean"
            )
        if loss.dim() == 0 and self._reduction != "sum":
            # A user's loss returns the mean over the micro-batch as a scalar, or one value per term.
            samples = next(_lengths([target, output]), 1)
            return loss.to(torch.promote_types(loss.dtype, torch.float32)) * samples, samples
        if isinstance(self.function, nn.CTCLoss) and self._reduction == "mean":
            loss = loss / target[2].clamp(min=1).to(loss)
        # A sum in bfloat16 keeps three digits.
        total = loss.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
        return total, len(loss) if self._reduction == "batchmean" else loss.numel()

    def target_weights(self) -> TargetWeights | None:
        """Returns what weighs the targets of a batch; None if the loss divides by the same number for all targets.

        Waits for the GPU, where the class weights are.
        """
        if not self.weighs_targets:
            return None
        assert self._ignore_index is not None, "a loss that weighs targets has one"
        weights = self._class_weights()
        return TargetWeights(self._ignore_index, None if weights is None else tuple(weights.tolist()))

    def denominator(self, own: float, shards: int = 1) -> float:
        """Returns what to divide the sum of all numerators by.

        Args:
            own: The denominator of one micro-batch, or of a whole dataset.
            shards: The number of equal micro-batches in the sum.
        """
        return 1.0 if self._reduction == "sum" else own * shards

    def as_written(self, output: Any, target: Any) -> Tensor | None:
        """Returns the loss of one micro-batch with the reduction of the description; None if it has no reductions.

        The loss's buffers are as before afterwards.

        Shapes: as the loss returns it: a scalar, or one value per term for ``reduction: none``.
        """
        if self._reduction is None:
            return None
        buffers = Buffers(self.modules())
        before = buffers.take(with_values=True)
        self._set_reduction(self._reduction)
        try:
            return self._terms(output, target)
        finally:
            self._set_reduction("none")
            buffers.put(before)

    def ignores_unsaid(self, counted: float, targets: float) -> bool:
        """Returns whether the loss ignores some targets by torch's default, while its mean is taken over all.

        Args:
            counted: The number of targets that the loss does not ignore.
            targets: The number of all targets.
        """
        means_over_all = self._reduction == "mean" and not self.weighs_targets
        return self._ignore_index is not None and means_over_all and 0 < counted < targets

    def counted(self, target: Any) -> Tensor | None:
        """Returns which targets are class numbers that the loss does not ignore; None if targets are no class numbers.

        Shapes: [N, ...] -> bool, the same shape.
        """
        if self.spec.target == "float" or not isinstance(target, Tensor) or not is_integral(target):
            return None
        if self._ignore_index is None:
            return torch.ones_like(target, dtype=torch.bool)
        return target != self._ignore_index

    def tally(self, output: Any, target: Any, numerator: Tensor) -> Tensor:
        """Returns what a micro-batch adds to loss and accuracy: loss sum, correct samples, counted samples.

        Shapes: output [N, K, ...], target [N, ...], numerator a scalar -> float64 [3], on the device of the loss.
        """
        correct = count = torch.zeros((), dtype=torch.float64, device=numerator.device)
        counted = self.counted(target)
        if counted is not None and isinstance(output, Tensor) and has_classes(output, target):
            correct = ((output.detach().argmax(1) == target) & counted).sum(dtype=torch.float64)
            count = counted.sum(dtype=torch.float64)
        return torch.stack([numerator.detach().double(), correct, count])

    def _class_weights(self) -> Tensor | None:
        """Returns the class weights that the denominator is summed from; None if there are none."""
        return self.function.weight if self.weighs_targets and isinstance(self.function, _IGNORING) else None

    def _set_reduction(self, reduction: str) -> None:
        self.function.reduction = reduction  # type: ignore[attr-defined]  # called only if it has one

    def _terms(self, output: Any, target: Any) -> Tensor:
        """Calls the loss as its ``reduction`` is set now."""
        return self.function(*self.call.arguments(*self.sees(output, target)))


def build_loss(spec: LossSpec, builder: Builder) -> GlobalLoss:
    """Builds the loss; looks up a bare name in ``torch.nn``.

    A class is built, a function gets its arguments bound. Lists of numbers for ``weight`` and ``pos_weight`` become
    tensors. With ``reduction: none`` the job trains on the mean of all terms, ``loss(output, target).mean()``.

    Raises:
        DescriptionError: The name, an argument or its value is wrong, or the loss has weights to train.
    """
    path = spec.factory.path
    args = {
        name: _weights(value, f"loss.{name}") if name in ("weight", "pos_weight") else value
        for name, value in spec.factory.args.items()
    }
    function = resolve(path, "loss", [nn])
    is_class = inspect.isclass(function)
    if not is_class:
        check_arguments(function, list(args), "loss", given=2)
    loss = builder.build(Target(path, args, partial=not is_class), "loss", bare_names=[nn])
    if not callable(loss):
        raise DescriptionError(
            f"loss._target_ must be a loss that can be called with (output, target), got {path}; give it __call__"
        )
    return GlobalLoss(loss, spec)


def first(output: Any) -> Any:
    """Returns the tensor that a target is compared with: the first, if the model returns several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def has_classes(output: Tensor, target: Tensor) -> bool:
    """Returns whether an output has values for several classes where the target has one number.

    Shapes: True for output [N, K, ...] with K > 1 and target [N, ...].
    """
    classes = output.shape[1] if output.dim() > 1 else 1
    return classes > 1 and (*output.shape[:1], *output.shape[2:]) == target.shape


def fits_into(shape: torch.Size, other: torch.Size) -> bool:
    """Returns whether one shape can be reshaped to the other without mixing samples or exchanging axes."""
    lengths, others = ([length for length in axes if length != 1] for axes in (shape, other))
    same_samples = bool(shape) and bool(other) and shape[0] == other[0]
    exchanged = len(lengths) == len(others) and lengths != others
    return same_samples and shape.numel() == other.numel() and not exchanged


def number_type(output: Tensor) -> torch.dtype:
    """Returns the type in which a loss computes: float32 under autocast, else the output's type."""
    return torch.float32 if torch.is_autocast_enabled(output.device.type) else output.dtype


def _known_reduction(function: Any) -> str:
    """Returns the reduction of a loss; raises a DescriptionError for one that this module cannot reproduce."""
    reduction: str = function.reduction
    has_batchmean = isinstance(function, nn.KLDivLoss) or not type(function).__module__.startswith("torch.")
    known = ["mean", "sum", "none", *(["batchmean"] if has_batchmean else [])]
    if reduction not in known:
        raise DescriptionError(
            f"loss.reduction must be one of {', '.join(known)}, got {reduction!r}; write one of them"
        )
    return reduction


def _weights(value: Any, key: str) -> Any:
    """Returns a list of numbers as a float64 tensor [K], and anything else unchanged."""
    if not isinstance(value, (list, tuple)):
        return value
    try:
        weights = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError):
        weights = torch.tensor(math.nan)
    if not weights.isfinite().all():
        raise DescriptionError(f"{key} must be a list of finite numbers, got {value}; write one number per class")
    return weights


def _lengths(batch: Any) -> Iterator[int]:
    """Yields the number of samples in each part of a batch, a tree of tensors and of lists of text."""
    if isinstance(batch, Tensor):
        yield from batch.shape[:1]
    elif isinstance(batch, Mapping):
        yield from _lengths(list(batch.values()))
    elif isinstance(batch, (tuple, list)):
        if batch and isinstance(batch[0], (str, bytes)):
            yield len(batch)
        for part in batch:
            yield from _lengths(part)
