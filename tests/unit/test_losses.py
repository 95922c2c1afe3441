"""Every loss, put together from shards, is what plain torch computes on the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import DescriptionError
from jobs.losses import GlobalLoss, build_loss
from jobs.spec import LossSpec, Target
from jobs.targets import Builder

SHARDS, BATCH, CLASSES = 4, 12, 5
WEIGHT = [0.2, 3.0, 1.0, 0.5, 2.0]


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def logits(*more: int) -> Tensor:
    return torch.randn(BATCH, CLASSES, *more, generator=seeded(), dtype=torch.float64)


def labels(*more: int) -> Tensor:
    return torch.randint(CLASSES, (BATCH, *more), generator=seeded(1))


def some_ignored(*more: int, index: int = -100) -> Tensor:
    """The first shard has nothing that counts, the others have a part."""
    chosen = labels(*more)
    chosen[: BATCH // SHARDS] = index
    chosen[4::3] = index
    return chosen


def values() -> Tensor:
    return torch.rand(BATCH, CLASSES, generator=seeded(2), dtype=torch.float64)


def log_probabilities(*more: int) -> Tensor:
    return logits(*more).log_softmax(dim=1)


def probabilities() -> Tensor:
    return values().softmax(dim=1)


def twice_the_mean_square(output: Tensor, target: Tensor) -> Tensor:
    return 2 * (output - target).square().mean()


def squares(output: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (output - target).square()


class MeanSquare(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * (output - target).square().mean()


Tensors = Callable[[], Tensor]

CASES: list[tuple[str, dict[str, Any], Tensors, Tensors]] = [
    ("CrossEntropyLoss", {}, logits, labels),
    ("CrossEntropyLoss", {"label_smoothing": 0.1}, logits, labels),
    ("CrossEntropyLoss", {"weight": WEIGHT}, logits, labels),
    ("CrossEntropyLoss", {"weight": WEIGHT, "label_smoothing": 0.1}, logits, labels),
    ("CrossEntropyLoss", {"ignore_index": -100}, logits, some_ignored),
    ("CrossEntropyLoss", {"ignore_index": 2}, logits, labels),
    ("CrossEntropyLoss", {"ignore_index": -100, "label_smoothing": 0.1}, logits, some_ignored),
    ("CrossEntropyLoss", {"ignore_index": -100, "weight": WEIGHT}, logits, some_ignored),
    ("CrossEntropyLoss", {"ignore_index": 255, "weight": WEIGHT, "label_smoothing": 0.1},
     lambda: logits(2, 3), lambda: some_ignored(2, 3, index=255)),
    ("CrossEntropyLoss", {}, logits, probabilities),
    ("CrossEntropyLoss", {"weight": WEIGHT, "label_smoothing": 0.1}, logits, probabilities),
    ("NLLLoss", {}, log_probabilities, labels),
    ("NLLLoss", {"weight": WEIGHT}, log_probabilities, labels),
    ("NLLLoss", {"weight": WEIGHT, "ignore_index": -100}, lambda: log_probabilities(3), lambda: some_ignored(3)),
    ("MSELoss", {}, logits, values),
    ("L1Loss", {}, logits, values),
    ("KLDivLoss", {"log_target": False}, log_probabilities, probabilities),
    ("BCEWithLogitsLoss", {}, logits, values),
    ("BCEWithLogitsLoss", {"pos_weight": WEIGHT, "weight": WEIGHT[::-1]}, logits, values),
]  # fmt: skip


def whole_batch(loss: nn.Module, output: Tensor, target: Tensor) -> tuple[float, Tensor]:
    output = output.clone().requires_grad_()
    value = loss(output, target).mean()  # of a scalar: itself; ``reduction: none`` leaves the mean to us
    value.backward()
    assert output.grad is not None
    return value.item(), output.grad


def over_shards(loss: GlobalLoss, output: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """As the loop does it: denominators first where targets decide them, then a backward pass per shard."""
    output = output.clone().requires_grad_()
    shards = list(zip(output.chunk(SHARDS), target.chunk(SHARDS)))
    weights = [loss.target_weight(target) for _, target in shards] if loss.weighs_targets else []
    total = 0.0
    for output_of_shard, target_of_shard in shards:
        numerator, own = loss.numerator(output_of_shard, target_of_shard)
        denominator = float(sum(weights)) if loss.weighs_targets else loss.denominator(own, SHARDS)
        (numerator / denominator).backward()
        total += numerator.item() / denominator
    assert output.grad is not None
    return total, output.grad


def build(name: str, **args: Any) -> GlobalLoss:
    loss = build_loss(LossSpec(factory=Target(name, args)), Builder())
    if isinstance(loss._function, nn.Module):
        loss._function.double()  # for a comparison in which only the arithmetic of the means can differ
    return loss.to(torch.device("cpu"))


def assert_equal(ours: tuple[float, Tensor], torchs: tuple[float, Tensor]) -> None:
    """1e-10: sums of at most a hundred float64 terms in another order, each rounded by 1e-16."""
    assert ours[0] == pytest.approx(torchs[0], rel=1e-10, abs=0)
    torch.testing.assert_close(ours[1], torchs[1], rtol=1e-10, atol=1e-14)


def described(case: Any) -> str:
    return case if isinstance(case, str) else ",".join(case) if isinstance(case, dict) else ""


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # of KLDivLoss, from the plain one
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("name", "args", "output", "target"), CASES, ids=described)
def test_shards_make_the_loss_and_gradient_of_the_whole_batch(
    name: str, args: dict[str, Any], output: Tensors, target: Tensors, reduction: str
) -> None:
    tensors = {key: torch.tensor(value) if isinstance(value, list) else value for key, value in args.items()}
    plain = getattr(nn, name)(**tensors, reduction=reduction).double()

    ours = over_shards(build(name, **args, reduction=reduction), output(), target())

    assert_equal(ours, whole_batch(plain, output(), target()))


def test_batchmean_is_the_mean_over_the_whole_batch() -> None:
    ours = over_shards(build("KLDivLoss", reduction="batchmean"), log_probabilities(), probabilities())

    assert_equal(ours, whole_batch(nn.KLDivLoss(reduction="batchmean"), log_probabilities(), probabilities()))


@pytest.mark.parametrize(
    ("name", "args"), [("twice_the_mean_square", {}), ("squares", {"scale": 2.0}), ("MeanSquare", {"scale": 2.0})]
)
def test_a_loss_of_ones_own_is_averaged(name: str, args: dict[str, Any]) -> None:
    """A function that gives the mean, a function that gives every term, and a class."""
    ours = over_shards(build(f"{__name__}.{name}", **args), logits(), values())

    assert_equal(ours, whole_batch(MeanSquare(2.0), logits(), values()))


def test_the_mean_of_the_shards_means_is_another_number() -> None:
    """So the comparisons above can fail."""
    loss = nn.CrossEntropyLoss(torch.tensor(WEIGHT, dtype=torch.float64))
    shards = list(zip(logits().chunk(SHARDS), labels().chunk(SHARDS)))

    mean_of_means = sum(loss(output, target).item() for output, target in shards) / SHARDS

    assert mean_of_means != pytest.approx(loss(logits(), labels()).item(), rel=1e-3)


class TestTally:
    def test_counts_what_was_predicted_of_what_counts(self) -> None:
        loss = build("CrossEntropyLoss", ignore_index=-100)
        output, target = logits(), some_ignored()
        target[5] = output[5].argmax()

        tally = loss.tally(output, target, torch.tensor(2.5, requires_grad=True))

        hits = [row.argmax() == label for row, label in zip(output, target) if label != -100]
        assert tally.tolist() == [2.5, sum(hits), len(hits)]
        assert (tally.dtype, tally.requires_grad) == (torch.float64, False)

    def test_counts_every_pixel(self) -> None:
        output, target = logits(2, 3), labels(2, 3)

        tally = build("CrossEntropyLoss").tally(output, target, torch.tensor(0.0))

        assert tally.tolist() == [0.0, (output.argmax(dim=1) == target).sum(), BATCH * 6]

    def test_counts_nothing_where_targets_are_no_classes(self) -> None:
        assert build("MSELoss").tally(logits(), values(), torch.tensor(1.0)).tolist() == [1.0, 0.0, 0.0]


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "args", "message"),
        [
            (
                "CrossEntropyLos",
                {},
                "loss._target_ names nothing in torch.nn, got 'CrossEntropyLos' (did you mean 'CrossEntropyLoss'?); "
                "write one of its names, or the import path of your own",
            ),
            (
                "MSELoss",
                {"reductoin": "sum"},
                "loss.reductoin is no argument of MSELoss (did you mean 'reduction'?); "
                "it takes size_average, reduce, reduction",
            ),
            (
                f"{__name__}.squares",
                {"scales": 2},
                "loss.scales is no argument of squares (did you mean 'scale'?); it takes scale",
            ),
            (f"{__name__}.MeanSquare", {}, "loss.scale is missing: MeanSquare needs it; add it"),
        ],
    )
    def test_one_line_says_what_is_wrong(self, name: str, args: dict[str, Any], message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            build(name, **args)
        assert str(caught.value) == message
