"""Checks on one real micro-batch that loss, model output and target fit together.

torch computes a loss for many inputs that make no sense: shapes that broadcast, logits where probabilities are meant,
class numbers where 0 or 1 is. What it does refuse, it refuses in the middle of an epoch, on a GPU without a message.
Here each of these mistakes is one line that says what to write instead.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import DescriptionError
from jobs.components.losses import (
    CLASS_NUMBER_LOSSES,
    GlobalLoss,
    first,
    fits_into,
    has_classes,
    is_integral,
    number_type,
)
from jobs.data.loader import shape_of
from launcher.planning.loss_values import check_output_values, check_target_values, name_of
from launcher.planning.micro_batch import MicroBatch, all_targets, first_of

_TAKE_LOGITS = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, nn.SoftMarginLoss)
"""Losses that apply a softmax or a sigmoid themselves."""
_TAKE_ONE_TYPE = (nn.MSELoss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss, nn.GaussianNLLLoss)
"""Losses that raise in some version of torch, forward or backward, if the dtypes of output and target differ."""
_WEIGH_OUTPUTS = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_POINTWISE = (
    *_TAKE_ONE_TYPE, nn.L1Loss, nn.SmoothL1Loss, nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss,
    nn.MarginRankingLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss,
)  # fmt: skip
"""Losses that compare output and target element by element."""


def check_fit(loss: GlobalLoss, batch: MicroBatch, model: nn.Module) -> None:
    """Check everything that can be checked without calling the loss.

    Raises:
        DescriptionError: Output, target and loss do not fit together.
    """
    _check_structure(loss, batch)
    _check_labels(loss, batch)
    output, target = loss.sees(batch.output, batch.target)
    if isinstance(output, Tensor):
        _check_weights(loss, output)
    if isinstance(first(output), Tensor) and isinstance(target, Tensor):
        _check_shapes(loss, batch, first(output), target)
        _check_types(loss, batch, first(output), target)
        check_target_values(loss, batch, target)
    if isinstance(output, Tensor):
        check_output_values(loss, batch, output, model)


def check_mean(loss: GlobalLoss, as_written: Tensor | None, numerator: Tensor, denominator: float) -> None:
    """Compare the loss's own reduction of a micro-batch with the mean of its terms, which is what shards add up.

    Args:
        loss: The loss.
        as_written: The loss of the micro-batch by its own reduction; None if the loss has no reductions.
        numerator: The sum of the terms of the same micro-batch.
        denominator: The divisor of that sum.

    Shapes:
        as_written: [] or one value per term. numerator: [].

    Raises:
        DescriptionError: The two means differ.
    """
    if as_written is None:
        return
    of_terms, own = (numerator / denominator).item(), as_written.mean().item()  # NaN where no target counts
    # 16-bit rounding is about 1%, 32-bit rounding far less; a wrong divisor is off by a factor.
    tolerance = 5e-2 if as_written.dtype.itemsize < 4 else 1e-3
    if math.isfinite(of_terms) and not math.isclose(of_terms, own, rel_tol=tolerance, abs_tol=1e-6):
        raise DescriptionError(
            f"loss: {name_of(loss)} gives {own:.6g} for a micro-batch whose terms have the mean {of_terms:.6g}, and "
            "shards can only be put together by terms; write loss.reduction: none for their mean, or sum"
        )


def _check_structure(loss: GlobalLoss, batch: MicroBatch) -> None:
    """Check the number of tensors, and that ``loss.output`` and ``loss.target`` can be applied to them."""
    output, target, spec, count = batch.output, batch.target, loss.spec, loss.call.num_outputs
    if count > 1 and not (isinstance(output, (tuple, list)) and len(output) == count):
        raise DescriptionError(
            f"model must return {count} tensors for {name_of(loss)}, got {shape_of(output)}; return them as a tuple"
        )
    if isinstance(loss.function, nn.CTCLoss) and not (isinstance(target, (tuple, list)) and len(target) == 3):
        raise DescriptionError(
            f"{batch.key}: a target for {name_of(loss)} is (targets, input_length, target_length), got "
            f"{shape_of(target)}; return the three as a tuple"
        )
    if spec.output != "identity":
        if isinstance(loss.function, _TAKE_LOGITS):
            raise DescriptionError(
                f"loss.output must not be {spec.output} for {name_of(loss)}, which takes logits; remove loss.output"
            )
        dims = 0 if spec.output == "sigmoid" else loss.call.class_dim + 1
        if not (isinstance(output, Tensor) and output.dim() >= dims):
            raise DescriptionError(
                f"loss.output {spec.output} is a function of one tensor"
                + (f" with classes in dimension {dims - 1}" if dims else "")
                + f", got {shape_of(output)} from the model; apply it in the model"
            )
    if spec.target is not None and not (isinstance(first(output), Tensor) and isinstance(target, Tensor)):
        raise DescriptionError(
            f"loss.target {spec.target} is made of one tensor, got a target of {shape_of(target)} and an output of "
            f"{shape_of(output)}; remove loss.target"
        )


def _check_labels(loss: GlobalLoss, batch: MicroBatch) -> None:
    """Check labels against the width of the model's output: all labels if the dataset lists them, else the batch's.

    A label outside the classes would kill a worker in the middle of an epoch, on a GPU without a message.
    """
    output, target, kind = batch.output, batch.target, loss.spec.target
    if not loss.takes_class_numbers or not isinstance(target, Tensor):
        return
    if kind is not None and not is_integral(target):
        raise DescriptionError(
            f"loss.target {kind} is made of class numbers, got {shape_of(target)}; give integers in {batch.key}, "
            "or remove loss.target"
        )
    fits = isinstance(output, Tensor) and has_classes(output, target)
    if kind == "one_hot" and not fits:
        raise DescriptionError(
            f"loss.target one_hot needs an output with one value per class in dimension 1, got {shape_of(output)} for "
            f"a target of {shape_of(target)}; give the model as many outputs as there are classes"
        )
    if not (fits or (isinstance(loss.function, CLASS_NUMBER_LOSSES) and _has_width(output))):
        return
    targets, numbers = all_targets(batch)
    counted = loss.counted(targets)
    if counted is None:
        return
    num_classes = output.shape[1]
    outside = ((targets < 0) | (targets >= num_classes)) & counted
    if outside.any():
        number, label = first_of(outside, targets, numbers)
        raise DescriptionError(
            f"{batch.key}: the label of sample {number} must lie between 0 and {num_classes - 1}, the "
            f"model's classes, got {int(label)}; give the model as many classes as the data has"
        )
    if loss.ignores_unsaid(int(counted.sum()), targets.numel()):
        number, label = first_of(~counted, targets, numbers)
        raise DescriptionError(
            f"{batch.key}: the label of sample {number} is {int(label)}, which {name_of(loss)} ignores, and the mean "
            f"is taken over all; write loss.ignore_index: {int(label)} to take it over the others"
        )


def _check_weights(loss: GlobalLoss, output: Tensor) -> None:
    """Check that there is one weight per class, or that the weights broadcast to the output of a sample."""
    if isinstance(loss.function, CLASS_NUMBER_LOSSES) and _has_width(output):
        weight = loss.function.weight
        if weight is not None and weight.shape != output.shape[1:2]:
            raise DescriptionError(
                f"loss.weight must be {output.shape[1]} numbers, one per class of the model's output, got "
                f"{_size_text(weight)}; make them as many"
            )
    if isinstance(loss.function, _WEIGH_OUTPUTS):
        for name in ("weight", "pos_weight"):
            weight = getattr(loss.function, name, None)
            if weight is not None and weight.numel() != 1 and not _broadcasts(weight.shape, output.shape[1:]):
                raise DescriptionError(
                    f"loss.{name} must broadcast to {list(output.shape[1:])}, the model's output for a sample, got "
                    f"{_size_text(weight)}; make them as many, or write one"
                )


def _check_shapes(loss: GlobalLoss, batch: MicroBatch, output: Tensor, target: Tensor) -> None:
    """Refuse shapes that would broadcast: a loss of every output with every target learns nothing."""
    if not isinstance(loss.function, _POINTWISE) or output.shape == target.shape:
        return
    if is_integral(target) and has_classes(output, target):
        fix = "write loss.target: one_hot"
    elif fits_into(target.shape, output.shape):
        fix = "write loss.target: float"
    else:
        fix = f"make the model's output and the target of {batch.key} the same shape"
    raise DescriptionError(
        f"loss: {name_of(loss)} takes output and target of one shape, got {list(output.shape)} and "
        f"{list(target.shape)}; {fix}"
    )


def _check_types(loss: GlobalLoss, batch: MicroBatch, output: Tensor, target: Tensor) -> None:
    """Check dtypes: int64 for class numbers, the output's dtype for other targets."""
    to_remedy = "remove loss.target" if loss.spec.target else f"give integers in {batch.key}"
    if isinstance(loss.function, CLASS_NUMBER_LOSSES):
        if is_integral(target):
            if target.dtype != torch.int64:
                raise DescriptionError(
                    f"loss: {name_of(loss)} takes class numbers of 64 bits, got {shape_of(target)}; "
                    "write loss.target: index"
                )
        elif not isinstance(loss.function, nn.CrossEntropyLoss):
            raise DescriptionError(f"loss: {name_of(loss)} takes class numbers, got {shape_of(target)}; {to_remedy}")
        elif target.shape != output.shape:
            raise DescriptionError(
                f"loss: {name_of(loss)} takes class numbers, or probabilities of the output's shape "
                f"{list(output.shape)}, got {shape_of(target)}; {to_remedy}"
            )
    elif isinstance(loss.function, _TAKE_ONE_TYPE) and target.dtype != number_type(output):
        raise DescriptionError(
            f"loss: {name_of(loss)} takes targets of the output's type, {number_type(output)}, got {target.dtype}; "
            "write loss.target: float"
        )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        broadcast: torch.Size = torch.broadcast_shapes(shape, to)
    except RuntimeError:
        return False
    return broadcast == to


def _has_width(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() > 1


def _size_text(weight: Tensor) -> str:
    return str(len(weight)) if weight.dim() == 1 else f"a shape of {list(weight.shape)}"
