"""Gradients that an optimizer reads lie at aligned addresses, with their values and their order in memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from jobs.spec import TrainSpec
from jobs.training.aligned_gradients import AlignedGradients, needs_aligned

BYTES = 64


def parameter_with(gradient: Tensor, offset: int) -> nn.Parameter:
    """A parameter whose gradient is a view of a bucket, ``offset`` numbers behind its beginning."""
    parameter = nn.Parameter(torch.empty_like(gradient))
    bucket = torch.empty(offset + gradient.numel(), dtype=gradient.dtype)
    parameter.grad = bucket.as_strided(gradient.shape, gradient.stride(), offset).copy_(gradient)
    return parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_gradient_at_any_place_of_a_bucket_becomes_aligned(dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 5, dtype=dtype)
    aligned = AlignedGradients()
    for offset in range(1, BYTES // gradient.itemsize):
        parameter = parameter_with(gradient, offset)
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() % BYTES
        aligned.align([parameter])
        assert parameter.grad.data_ptr() % BYTES == 0
        assert torch.equal(parameter.grad, gradient)


def test_the_order_in_memory_stays() -> None:
    gradient = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    parameter = parameter_with(gradient, 1)
    AlignedGradients().align([parameter])
    assert parameter.grad is not None
    assert (parameter.grad.stride(), torch.equal(parameter.grad, gradient)) == (gradient.stride(), True)


def test_an_aligned_gradient_stays_where_it_is_and_none_stays_none() -> None:
    there, frozen = parameter_with(torch.randn(4), 0), nn.Parameter(torch.zeros(4))
    gradient = there.grad
    AlignedGradients().align([there, frozen])
    assert there.grad is gradient
    assert frozen.grad is None


def test_memory_is_used_again() -> None:
    parameter = parameter_with(torch.ones(4), 1)
    aligned = AlignedGradients()
    aligned.align([parameter])
    first = parameter.grad
    assert first is not None
    parameter.grad = torch.full((5,), 2.0)[1:]
    aligned.align([parameter])
    assert parameter.grad is first
    assert first.tolist() == [2.0] * 4


def test_which_jobs_round_by_address() -> None:
    """A subclass may do more than its base."""

    class Own(torch.optim.SGD):
        pass

    parameters = [nn.Parameter(torch.zeros(2, 2))]
    train, sgd = TrainSpec(), torch.optim.SGD(parameters)
    assert not needs_aligned(train, sgd)
    assert not needs_aligned(train, torch.optim.AdamW(parameters))
    assert needs_aligned(train, torch.optim.Adafactor(parameters))
    assert needs_aligned(train, torch.optim.Muon(parameters))
    assert needs_aligned(train, Own(parameters))
    assert needs_aligned(replace(train, clip_norm=1.0), sgd)
    assert not needs_aligned(replace(train, exact=False, clip_norm=1.0), sgd)
