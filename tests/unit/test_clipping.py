"""Clipping by norm: torch's bits in float32, and no overflow in 16 bits."""

import pytest
import torch
from torch import Tensor, nn

from jobs.training.step import clip_norm


def weights_with(*gradients: Tensor) -> list[nn.Parameter]:
    weights = []
    for gradient in gradients:
        weights.append(nn.Parameter(torch.zeros_like(gradient)))
        weights[-1].grad = gradient.clone()
    return weights


def gradients_of(weights: list[nn.Parameter]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]


def test_float32_has_the_bits_of_torch() -> None:
    gradients = torch.randn(3, 5), torch.randn(7).double(), torch.randn(2, 2)
    ours, torchs = weights_with(*gradients), weights_with(*gradients)
    for weights in (ours, torchs):
        weights.append(nn.Parameter(torch.ones(2)))  # frozen: it has no gradient
    clip_norm(ours, 0.5)
    nn.utils.clip_grad_norm_(torchs, 0.5)
    assert all(mine.equal(theirs) for mine, theirs in zip(gradients_of(ours), gradients_of(torchs)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_norm_that_16_bits_do_not_hold_scales_the_gradient(dtype: torch.dtype) -> None:
    """It is 100,000; infinite in float16, it would scale the gradient to 0."""
    weights = weights_with(torch.full((1_000_000,), 100, dtype=dtype))
    clip_norm(weights, 1000.0)
    [gradient] = gradients_of(weights)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, torch.ones_like(gradient))
