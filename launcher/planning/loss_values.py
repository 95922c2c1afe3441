"""Checks on one real micro-batch that targets and outputs have values that the loss can take."""

from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import DescriptionError
from jobs.components.losses import GlobalLoss
from jobs.training.evaluation import evaluation_mode
from launcher.planning.micro_batch import MicroBatch, all_targets, first_of

_TAKE_LOG_PROBABILITIES = (nn.NLLLoss, nn.KLDivLoss, nn.CTCLoss)
_TARGETS_FROM_0_TO_1 = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_TARGETS_OF_SIGNS = (nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.CosineEmbeddingLoss, nn.MarginRankingLoss)


def check_target_values(loss: GlobalLoss, batch: MicroBatch, target: Tensor) -> None:
    """Refuse targets that have no meaning for the loss: in all targets if the dataset lists them, else in the batch.

    Raises:
        DescriptionError: A target is outside the values that the loss takes.
    """
    if isinstance(loss.function, nn.KLDivLoss):
        log = loss.function.log_target
        if not _are_probabilities(target.exp() if log else target, _any_dims(target)):
            raise DescriptionError(
                f"loss: {name_of(loss)} takes {'log-' if log else ''}probabilities as targets, got numbers of "
                f"{batch.key} that do not add up to 1; normalize them"
                + (", or remove loss.log_target" if log else ", or write loss.log_target: true if they are logarithms")
            )
    if loss.spec.target == "one_hot":
        return  # zeros and ones by construction
    targets, numbers = all_targets(batch)
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
        number, value = first_of(outside, targets, numbers)
        raise DescriptionError(
            f"{batch.key}: the target of sample {number} must {allowed} for {name_of(loss)}, got {value:g}; {fix}"
        )


def check_output_values(loss: GlobalLoss, batch: MicroBatch, output: Tensor, model: nn.Module) -> None:
    """Refuse logits where the loss takes probabilities or their logarithms.

    Raises:
        DescriptionError: An output is outside the values that the loss takes.
    """
    if isinstance(loss.function, _TAKE_LOG_PROBABILITIES):
        probabilities = output.detach().exp()
        over_classes: list[tuple[int, ...]] = [(loss.call.class_dim,)] if output.dim() > loss.call.class_dim else []
        dims_choices = _any_dims(output) if isinstance(loss.function, nn.KLDivLoss) else over_classes
        if not _are_probabilities(probabilities, dims_choices):
            raise DescriptionError(
                f"loss: {name_of(loss)} takes log-probabilities, and exp of the model's output does not add up to 1; "
                "write loss.output: log_softmax for a model that ends in logits"
            )
    if not isinstance(loss.function, nn.BCELoss):
        return
    if torch.is_autocast_enabled(output.device.type):
        raise DescriptionError(
            f"loss: {name_of(loss)} of 16-bit probabilities is no number to train on, and torch refuses it on a GPU; "
            "take BCEWithLogitsLoss on logits, or train.precision: fp32"
        )
    # Logits may all lie between 0 and 1 by chance, but not those of inputs 100 times as large.
    seen = [output, *(_far_outputs(model, batch.inputs) if loss.spec.output == "identity" else [])]
    for values in seen:
        outside = (values < 0) | (values > 1)
        if outside.any():
            raise DescriptionError(
                f"loss: {name_of(loss)} takes outputs between 0 and 1, got {values[outside][0].item():.3g}; write "
                "loss.output: sigmoid, or take BCEWithLogitsLoss, for a model that ends in logits"
            )


def _far_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the model's outputs for inputs far outside its data; none if the inputs are not floating-point."""
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        return []
    try:
        with torch.no_grad(), evaluation_mode(model):
            return [model(inputs * scale) for scale in (100.0, -100.0)]
    except Exception:  # user code may fail on such inputs; the real ones were checked before
        return []


def _any_dims(tensor: Tensor) -> list[tuple[int, ...]]:
    """Return the choices of axes over which probabilities may add up to 1.

    They are the class axis, the last axis, all axes after the class axis, and all axes of a sample.
    """
    axes = tuple(range(1, tensor.dim()))
    return [dims for dims in (axes[:1], axes[-1:], axes[1:], axes) if dims]


def _are_probabilities(values: Tensor, dims_choices: list[tuple[int, ...]]) -> bool:
    tolerance = 1e-3 if torch.finfo(values.dtype).bits >= 32 else 5e-2
    sums = [values.double().sum(dims) for dims in dims_choices]
    return bool((values >= 0).all()) and any(bool(((sum_ - 1).abs() < tolerance).all()) for sum_ in sums)


def name_of(loss: GlobalLoss) -> str:
    """Return the import path of a loss, for error texts."""
    return loss.spec.factory.path
