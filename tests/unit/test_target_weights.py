"""The weight of targets: what torch's mean divides by, in one set of bits."""

import pickle

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jobs.components.losses import GlobalLoss, build_loss
from jobs.components.target_weights import TargetWeights
from jobs.components.targets import Builder
from jobs.spec import LossSpec, Target

WEIGHT = [0.1, 3.0, 0.7, 1e-3, 2.0]


def loss(**args: object) -> GlobalLoss:
    return build_loss(LossSpec(factory=Target("CrossEntropyLoss", args)), Builder()).to(torch.device("cpu"))


def weigh(target: Tensor, **args: object) -> float:
    weights = loss(**args).target_weights()
    assert weights is not None
    return pickle.loads(pickle.dumps(weights))(target)  # noqa: S301  # as a loader process receives it


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_it_is_what_the_mean_divides_by(dtype: torch.dtype) -> None:
    target_N23 = torch.randint(5, (400, 2, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = torch.randn(400, 5, 2, 3, dtype=torch.float64)
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    term, mean = (
        cross_entropy(logits, target_N23.long(), weight, ignore_index=2, reduction=how) for how in ("sum", "mean")
    )

    assert weigh(target_N23, weight=WEIGHT, ignore_index=2) == pytest.approx(float(term / mean), rel=1e-6)
    assert weigh(target_N23, ignore_index=2) == int((target_N23 != 2).sum())
    assert weigh(torch.full((3,), 2), weight=WEIGHT, ignore_index=2) == 0.0


def test_the_order_of_targets_changes_no_bit() -> None:
    target_N = torch.randint(3, (100_003,), generator=torch.Generator().manual_seed(0))
    weights = TargetWeights(-100, (0.1, 1 / 3, 0.7))
    orders = [target_N, target_N.sort().values, target_N.flip(0)]

    assert len({weights(order) for order in orders}) == 1
    weight_K = torch.tensor(weights.of_class, dtype=torch.float64)
    assert len({float(weight_K[order].cumsum(0)[-1]) for order in orders}) > 1, "it would change those of a plain sum"


def test_probabilities_count_as_samples() -> None:
    assert weigh(torch.full((6, 5, 2), 0.2), weight=WEIGHT) == 12.0


@pytest.mark.parametrize("wrong", [5, -1, 10**12])
def test_a_target_that_is_no_class_is_named(wrong: int) -> None:
    with pytest.raises(IndexError, match=f"target {wrong} is no class: the loss has weights for 5 classes"):
        weigh(torch.tensor([0, wrong, 1]), weight=WEIGHT)


def test_a_loss_that_weighs_no_targets_has_none() -> None:
    assert loss().target_weights() is None
    assert loss(weight=WEIGHT, reduction="sum").target_weights() is None
