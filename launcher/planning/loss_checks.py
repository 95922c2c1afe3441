"""What a loss demands of output and target, checked on one real micro-batch.

Torch accepts much that is no loss: shapes that broadcast, logits where probabilities are meant, class numbers
where a 0 or a 1 is. What it does refuse, it refuses in the middle of an epoch, on a GPU without a message. Here
each of these is one line with what to write instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import DescriptionError
from jobs.build.components import listed_targets
from jobs.build.losses import CLASS_NUMBER_LOSSES, GlobalLoss, first, fits_into, has_classes, is_integral, number_type
from jobs.data.loader import shape_of

_TAKE_LOGITS = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, nn.SoftMarginLoss)
"""Losses that apply a softmax or a sigmoid themselves."""
_TAKE_LOG_PROBABILITIES = (nn.NLLLoss, nn.KLDivLoss, nn.CTCLoss)
_TAKE_ONE_TYPE = (nn.MSELoss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss, nn.GaussianNLLLoss)
"""Losses that raise, forward or backward, in some version of torch, where output and target are of two types."""
_WEIGH_OUTPUTS = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_TARGETS_FROM_0_TO_1 = _WEIGH_OUTPUTS
_TARGETS_OF_SIGNS = (nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.CosineEmbeddingLoss, nn.MarginRankingLoss)
_POINTWISE = (
    *_TAKE_ONE_TYPE, nn.L1Loss, nn.SmoothL1Loss, nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss,
    nn.MarginRankingLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss,
)  # fmt: skip
"""Losses of pairs of numbers, which lie at the same places of output and target."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of a dataset, as model and loss get them."""

    key: str
    """Where the dataset stands in the description."""
    dataset: Any
    numbers: list[int]
    """Which samples they are."""
    inputs: Any
    target: Any
    output: Any
    """What the model makes of the inputs."""


def check_fit(loss: GlobalLoss, batch: MicroBatch, model: nn.Module) -> None:
    """Checks all that can be known before the loss is called.

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
        _check_target_values(loss, batch, target)
    if isinstance(output, Tensor):
        _check_output_values(loss, batch, output, model)


def check_mean(loss: GlobalLoss, as_written: Tensor | None, numerator: Tensor, denominator: float) -> None:
    """Compares a loss with what the shards will make of it.

    Args:
        loss: The loss.
        as_written: What it gives for a micro-batch alone, as it reduces it; None if it does not.
        numerator: The sum over the same micro-batch.
        denominator: What that sum is divided by.

    Raises:
        DescriptionError: They are two different means.
    """
    if as_written is None:
        return
    ours, own = (numerator / denominator).item(), as_written.mean().item()  # NaN where no target counts
    # Rounding of 16 bits is a hundredth, of 32 bits far less; another divisor is a factor.
    tolerance = 5e-2 if as_written.dtype.itemsize < 4 else 1e-3
    if math.isfinite(ours) and not math.isclose(ours, own, rel_tol=tolerance, abs_tol=1e-6):
        raise DescriptionError(
            f"loss: {_name(loss)} gives {own:.6g} for a micro-batch whose terms have the mean {ours:.6g}, and shards "
            "can only be put together by terms; write loss.reduction: none for their mean, or sum"
        )


def _check_structure(loss: GlobalLoss, batch: MicroBatch) -> None:
    """How many tensors there are, and whether ``loss.output`` and ``loss.target`` can be applied to them."""
    output, target, spec, count = batch.output, batch.target, loss.spec, loss.call.num_outputs
    if count > 1 and not (isinstance(output, (tuple, list)) and len(output) == count):
        raise DescriptionError(
            f"model must return {count} tensors for {_name(loss)}, got {shape_of(output)}; return them as a tuple"
        )
    if isinstance(loss.function, nn.CTCLoss) and not (isinstance(target, (tuple, list)) and len(target) == 3):
        raise DescriptionError(
            f"{batch.key}: a target for {_name(loss)} is (targets, input_length, target_length), got "
            f"{shape_of(target)}; return the three as a tuple"
        )
    if spec.output != "identity":
        if isinstance(loss.function, _TAKE_LOGITS):
            raise DescriptionError(
                f"loss.output must not be {spec.output} for {_name(loss)}, which takes logits; remove loss.output"
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
    """Compares labels with the width of the model's output: all, where the dataset lists them, else the batch's.

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
    targets, numbers = _all_targets(batch)
    counted = loss.counted(targets)
    if counted is None:
        return
    num_classes = output.shape[1]
    outside = ((targets < 0) | (targets >= num_classes)) & counted
    if outside.any():
        number, label = _first_of(outside, targets, numbers)
        raise DescriptionError(
            f"{batch.key}: the label of sample {number} must lie between 0 and {num_classes - 1}, the "
            f"model's classes, got {int(label)}; give the model as many classes as the data has"
        )
    if loss.ignores_unsaid(int(counted.sum()), targets.numel()):
        number, label = _first_of(~counted, targets, numbers)
        raise DescriptionError(
            f"{batch.key}: the label of sample {number} is {int(label)}, which {_name(loss)} ignores, and the mean is "
            f"taken over all; write loss.ignore_index: {int(label)} to take it over the others"
        )


def _check_weights(loss: GlobalLoss, output: Tensor) -> None:
    """A weight per class, or weights that can be laid over the output of any number of samples."""
    if isinstance(loss.function, CLASS_NUMBER_LOSSES) and _has_width(output):
        weight = loss.function.weight
        if weight is not None and weight.shape != output.shape[1:2]:
            raise DescriptionError(
                f"loss.weight must be {output.shape[1]} numbers, one per class of the model's output, got "
                f"{_counted_numbers(weight)}; make them as many"
            )
    if isinstance(loss.function, _WEIGH_OUTPUTS):
        for name in ("weight", "pos_weight"):
            weight = getattr(loss.function, name, None)
            if weight is not None and weight.numel() != 1 and not _broadcasts(weight.shape, output.shape[1:]):
                raise DescriptionError(
                    f"loss.{name} must broadcast to {list(output.shape[1:])}, the model's output for a sample, got "
                    f"{_counted_numbers(weight)}; make them as many, or write one"
                )


def _check_shapes(loss: GlobalLoss, batch: MicroBatch, output: Tensor, target: Tensor) -> None:
    """Refuses what would broadcast: a loss of every output with every target, which learns nothing."""
    if not isinstance(loss.function, _POINTWISE) or output.shape == target.shape:
        return
    if is_integral(target) and has_classes(output, target):
        fix = "write loss.target: one_hot"
    elif fits_into(target.shape, output.shape):
        fix = "write loss.target: float"
    else:
        fix = f"make the model's output and the target of {batch.key} the same shape"
    raise DescriptionError(
        f"loss: {_name(loss)} takes output and target of one shape, got {list(output.shape)} and "
        f"{list(target.shape)}; {fix}"
    )


def _check_types(loss: GlobalLoss, batch: MicroBatch, output: Tensor, target: Tensor) -> None:
    """Integers of 64 bits for class numbers, the output's type for numbers."""
    to_remedy = "remove loss.target" if loss.spec.target else f"give integers in {batch.key}"
    if isinstance(loss.function, CLASS_NUMBER_LOSSES):
        if is_integral(target):
            if target.dtype != torch.int64:
                raise DescriptionError(
                    f"loss: {_name(loss)} takes class numbers of 64 bits, got {shape_of(target)}; "
                    "write loss.target: index"
                )
        elif not isinstance(loss.function, nn.CrossEntropyLoss):
            raise DescriptionError(f"loss: {_name(loss)} takes class numbers, got {shape_of(target)}; {to_remedy}")
        elif target.shape != output.shape:
            raise DescriptionError(
                f"loss: {_name(loss)} takes class numbers, or probabilities of the output's shape "
                f"{list(output.shape)}, got {shape_of(target)}; {to_remedy}"
            )
    elif isinstance(loss.function, _TAKE_ONE_TYPE) and target.dtype != number_type(output):
        raise DescriptionError(
            f"loss: {_name(loss)} takes targets of the output's type, {number_type(output)}, got {target.dtype}; "
            "write loss.target: float"
        )


def _check_target_values(loss: GlobalLoss, batch: MicroBatch, target: Tensor) -> None:
    """Values that have no meaning for the loss: in all targets where the dataset lists them, else in the batch."""
    if isinstance(loss.function, nn.KLDivLoss):
        log = loss.function.log_target
        if not _are_probabilities(target.exp() if log else target, _any_dims(target)):
            raise DescriptionError(
                f"loss: {_name(loss)} takes {'log-' if log else ''}probabilities as targets, got numbers of "
                f"{batch.key} that do not add up to 1; normalize them"
                + (", or remove loss.log_target" if log else ", or write loss.log_target: true if they are logarithms")
            )
    if loss.spec.target == "one_hot":
        return  # zeros and ones by construction
    targets, numbers = _all_targets(batch)
    if isinstance(loss.function, _TARGETS_FROM_0_TO_1):
        outside = ~((targets >= 0) & (targets <= 1))
        allowed = "lie between 0 and 1"
        fix = "for class numbers write loss.target: one_hot and give the model an output per class"
    elif isinstance(loss.function, _TARGETS_OF_SIGNS):
        outside = (targets != 1) & (targets != -1)
        allowed = "be 1 or -1"
        fix = "give it so"
    else:
        return
    if outside.any():
        number, value = _first_of(outside, targets, numbers)
        raise DescriptionError(
            f"{batch.key}: the target of sample {number} must {allowed} for {_name(loss)}, got {value:g}; {fix}"
        )


def _check_output_values(loss: GlobalLoss, batch: MicroBatch, output: Tensor, model: nn.Module) -> None:
    """Logits where probabilities or their logarithms are meant."""
    if isinstance(loss.function, _TAKE_LOG_PROBABILITIES):
        probabilities = output.detach().exp()
        over_classes: list[tuple[int, ...]] = [(loss.call.class_dim,)] if output.dim() > loss.call.class_dim else []
        dims_choices = _any_dims(output) if isinstance(loss.function, nn.KLDivLoss) else over_classes
        if not _are_probabilities(probabilities, dims_choices):
            raise DescriptionError(
                f"loss: {_name(loss)} takes log-probabilities, and exp of the model's output does not add up to 1; "
                "write loss.output: log_softmax for a model that ends in logits"
            )
    if not isinstance(loss.function, nn.BCELoss):
        return
    if torch.is_autocast_enabled(output.device.type):
        raise DescriptionError(
            f"loss: {_name(loss)} of 16-bit probabilities is no number to train on, and torch refuses it on a GPU; "
            "take BCEWithLogitsLoss on logits, or train.precision: fp32"
        )
    # The outputs of a model that ends in logits may all lie between 0 and 1 by chance; far from the data they do not.
    seen = [output, *(_far_outputs(model, batch.inputs) if loss.spec.output == "identity" else [])]
    for values in seen:
        outside = (values < 0) | (values > 1)
        if outside.any():
            raise DescriptionError(
                f"loss: {_name(loss)} takes outputs between 0 and 1, got {values[outside][0].item():.3g}; write "
                "loss.output: sigmoid, or take BCEWithLogitsLoss, for a model that ends in logits"
            )


def _far_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What the model makes of inputs far from any that it was made for, where these are numbers."""
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        return []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [model(inputs * scale) for scale in (100.0, -100.0)]
    except Exception:  # the user's own code need not bear such inputs; the real ones have been looked at
        return []
    finally:
        model.train(was_training)


def _all_targets(batch: MicroBatch) -> tuple[Tensor, Sequence[int]]:
    """All targets of the dataset if it lists what its samples hold, else the batch's; and their samples' numbers."""
    listed = listed_targets(batch.dataset)
    if listed is not None and listed.dim() and len(listed) == len(batch.dataset):
        of_batch = listed[batch.numbers].to(batch.target)
        if torch.equal(of_batch, batch.target):  # no transform lies between
            return listed, range(len(listed))
    return batch.target, batch.numbers


def _first_of(chosen: Tensor, targets: Tensor, numbers: Sequence[int]) -> tuple[int, float]:
    """The number of the first sample among the chosen targets, and the target."""
    place = tuple(chosen.nonzero()[0])
    return numbers[int(place[0])], targets[place].item()


def _any_dims(tensor: Tensor) -> list[tuple[int, ...]]:
    """The axes over which probabilities may add up: classes, the last, all places of a map, all of a sample."""
    axes = tuple(range(1, tensor.dim()))
    return [dims for dims in (axes[:1], axes[-1:], axes[1:], axes) if dims]


def _are_probabilities(values: Tensor, dims_choices: list[tuple[int, ...]]) -> bool:
    tolerance = 1e-3 if torch.finfo(values.dtype).bits >= 32 else 5e-2
    sums = [values.double().sum(dims) for dims in dims_choices]
    return bool((values >= 0).all()) and any(bool(((sum_ - 1).abs() < tolerance).all()) for sum_ in sums)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False


def _has_width(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() > 1


def _counted_numbers(weight: Tensor) -> str:
    return str(len(weight)) if weight.dim() == 1 else f"a shape of {list(weight.shape)}"


def _name(loss: GlobalLoss) -> str:
    return loss.spec.factory.path
