"""Every loss, put together from shards, is what plain torch computes on the whole batch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as torch's own documentation has it
from torch import Tensor, nn

from cluster.errors import DescriptionError
from jobs.components.losses import GlobalLoss, build_loss
from jobs.components.targets import Builder
from jobs.spec import LossSpec, Target

FEATURES, WIDTH, CLASSES = 7, 30, 5
WEIGHT = [0.2, 3.0, 1.0, 0.5, 2.0]
GLOBAL_BATCH = 12

# Of the plain side: KLDivLoss warns of what its mean is, NLLLoss2d of its age.
pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning"),
    pytest.mark.filterwarnings("ignore:.NLLLoss2d. has been deprecated:FutureWarning"),
]


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# ---- what a model makes of the 30 numbers that a linear layer gives for a sample ----


def logits(values_NW: Tensor) -> Tensor:
    return values_NW[:, :CLASSES]


def maps(values_NW: Tensor) -> Tensor:
    return values_NW.view(-1, CLASSES, 2, 3)


def column(values_NW: Tensor) -> Tensor:
    return values_NW[:, :1]


def log_probabilities(values_NW: Tensor) -> Tensor:
    return logits(values_NW).log_softmax(1)


def log_probability_maps(values_NW: Tensor) -> Tensor:
    return maps(values_NW).log_softmax(1)


def probabilities(values_NW: Tensor) -> Tensor:
    return logits(values_NW).sigmoid()


def two_vectors(values_NW: Tensor) -> tuple[Tensor, ...]:
    return values_NW[:, :5], values_NW[:, 5:10]


def three_vectors(values_NW: Tensor) -> tuple[Tensor, ...]:
    return values_NW[:, :5], values_NW[:, 5:10], values_NW[:, 10:15]


def mean_and_variance(values_NW: Tensor) -> tuple[Tensor, ...]:
    return logits(values_NW), values_NW[:, 5:10].exp()


def two_scores(values_NW: Tensor) -> tuple[Tensor, ...]:
    return values_NW[:, 0], values_NW[:, 1]


def alignments(values_NW: Tensor) -> Tensor:
    return values_NW.view(-1, 6, CLASSES).transpose(0, 1)


def log_alignments(values_NW: Tensor) -> Tensor:
    return alignments(values_NW).log_softmax(2)


# ---- targets of n samples ----


def labels(n: int, *more: int) -> Tensor:
    return torch.randint(CLASSES, (n, *more), generator=seeded(1))


def label_maps(n: int) -> Tensor:
    return labels(n, 2, 3)


def some_ignored(n: int, *more: int, index: int = -100) -> Tensor:
    """One of two shards, two of four and a validation batch have nothing that counts, the others have a part."""
    chosen = labels(n, *more)
    chosen[:6] = index
    chosen[7::3] = index
    return chosen


def some_255(n: int) -> Tensor:
    return some_ignored(n, 2, 3, index=255)


def numbers(n: int) -> Tensor:
    return torch.randn(n, CLASSES, generator=seeded(2), dtype=torch.float64)


def fractions(n: int) -> Tensor:
    return torch.rand(n, CLASSES, generator=seeded(2), dtype=torch.float64)


def shares(n: int) -> Tensor:
    return numbers(n).softmax(1)


def counts(n: int) -> Tensor:
    return labels(n, CLASSES).double()


def signs(n: int, *more: int) -> Tensor:
    return 2.0 * (labels(n, *more) % 2) - 1.0


def sign_vectors(n: int) -> Tensor:
    return signs(n, CLASSES)


def label_lists(n: int) -> Tensor:
    """The classes of a sample, ended by -1."""
    return torch.stack([torch.tensor([label, (label + 2) % 5, -1, -1, -1]) for label in labels(n).tolist()])


def bits(n: int) -> Tensor:
    return labels(n) % 2


def sequences(n: int) -> list[Tensor]:
    """Targets from 1 (0 is the blank), input lengths, target lengths, of which some are 0."""
    targets_NS = labels(n, 3) % (CLASSES - 1) + 1
    return [targets_NS, torch.full((n,), 6), torch.arange(n) % 4]


# ---- losses of one's own ----


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


class WeightedSquare(nn.Module):
    """With reductions and class weights, as torch's have them."""

    weight: Tensor

    def __init__(self, weight: Tensor, reduction: str = "mean") -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        terms = self.weight * (output - target).square()
        return terms if self.reduction == "none" else getattr(terms, self.reduction)()


class CallableSquare:
    """No module of torch's."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        terms = (output - target).square()
        return terms if self.reduction == "none" else getattr(terms, self.reduction)()


class IgnoringCrossEntropy(nn.CrossEntropyLoss):
    """Counts as its base, and ignores without being told to."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(ignore_index=-1, reduction=reduction)


class TwoDistances(nn.Module):
    """Without numbers to train, and so no loss with weights of its own."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().sum(1)


# ---- the table ----


def as_tensor(value: Any) -> Any:
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value


@dataclass(frozen=True)
class Case:
    name: str
    args: Mapping[str, Any]
    head: Callable[[Tensor], Any]
    target: Callable[[int], Any]
    plainly: Callable[[Any, Any, Any], Tensor] = lambda loss, output, target: loss(output, target)
    """How a program without this product would call the loss."""
    sees: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        name = self.name.rpartition(".")[2]
        return "-".join([name, *self.args, self.head.__name__, self.target.__name__, *self.sees.values()])


def cases(name: str, head: Any, target: Any, *several_args: Mapping[str, Any], **more: Any) -> list[Case]:
    return [Case(name, args, head, target, **more) for args in several_args or ({},)]


IGNORE = {"ignore_index": -100}
SMOOTH = {"label_smoothing": 0.1}
SHARES = {"weight": WEIGHT}

TORCHS: list[Case] = [
    *cases("CrossEntropyLoss", logits, labels, {}, SMOOTH, SHARES, SHARES | SMOOTH, {"ignore_index": 2}),
    *cases("CrossEntropyLoss", logits, some_ignored, IGNORE, IGNORE | SMOOTH, IGNORE | SHARES,
           IGNORE | SHARES | SMOOTH),
    *cases("CrossEntropyLoss", maps, label_maps, {}, SHARES),
    *cases("CrossEntropyLoss", maps, some_255, {"ignore_index": 255}, {"ignore_index": 255} | SHARES | SMOOTH),
    *cases("CrossEntropyLoss", logits, shares, {}, SMOOTH, SHARES | SMOOTH),
    *cases("CrossEntropyLoss", logits, labels, {}, SHARES, SHARES | SMOOTH, sees={"target": "one_hot"},
           plainly=lambda loss, output, target: loss(output, F.one_hot(target, CLASSES).double())),
    *cases("CrossEntropyLoss", logits, lambda n: labels(n).int(), SHARES, sees={"target": "index"},
           plainly=lambda loss, output, target: loss(output, target.long())),
    *cases("NLLLoss", log_probabilities, labels, {}, SHARES, {"ignore_index": 2}),
    *cases("NLLLoss", log_probabilities, some_ignored, IGNORE, IGNORE | SHARES),
    *cases("NLLLoss", log_probability_maps, some_255, {"ignore_index": 255} | SHARES),
    *cases("NLLLoss", logits, labels, SHARES, sees={"output": "log_softmax"},
           plainly=lambda loss, output, target: loss(output.log_softmax(1), target)),
    *cases("NLLLoss2d", log_probability_maps, label_maps, {}, SHARES),
    *cases("L1Loss", logits, numbers),
    *cases("L1Loss", column, bits, sees={"target": "float"},
           plainly=lambda loss, output, target: loss(output, target.double()[:, None])),
    *cases("MSELoss", logits, numbers),
    *cases("MSELoss", logits, labels, sees={"output": "softmax", "target": "one_hot"},
           plainly=lambda loss, output, target: loss(output.softmax(1), F.one_hot(target, CLASSES).double())),
    *cases("SmoothL1Loss", logits, numbers, {}, {"beta": 0.5}),
    *cases("HuberLoss", logits, numbers, {}, {"delta": 0.5}),
    *cases("KLDivLoss", log_probabilities, shares),
    *cases("KLDivLoss", log_probabilities, lambda n: shares(n).log(), {"log_target": True}),
    *cases("KLDivLoss", maps, label_maps, sees={"output": "log_softmax", "target": "one_hot"},
           plainly=lambda loss, output, target: loss(
               output.log_softmax(1), F.one_hot(target, CLASSES).movedim(3, 1).double())),
    *cases("BCELoss", probabilities, fractions, {}, SHARES),
    *cases("BCELoss", column, bits, sees={"output": "sigmoid", "target": "float"},
           plainly=lambda loss, output, target: loss(output.sigmoid()[:, 0], target.double())),
    *cases("BCEWithLogitsLoss", logits, fractions, {}, SHARES, {"pos_weight": WEIGHT}, {"pos_weight": WEIGHT} | SHARES),
    *cases("PoissonNLLLoss", logits, counts, {}, {"full": True}),
    *cases("PoissonNLLLoss", probabilities, counts, {"log_input": False}),
    *cases("SoftMarginLoss", logits, sign_vectors),
    *cases("HingeEmbeddingLoss", logits, sign_vectors, {}, {"margin": 0.3}),
    *cases("MultiLabelMarginLoss", logits, label_lists),
    *cases("MultiLabelSoftMarginLoss", logits, fractions, {}, SHARES),
    *cases("MultiMarginLoss", logits, labels, {}, SHARES, {"p": 2, "margin": 0.5}),
    *cases("CosineEmbeddingLoss", two_vectors, signs, {}, {"margin": 0.2},
           plainly=lambda loss, output, target: loss(output[0], output[1], target)),
    *cases("MarginRankingLoss", two_scores, signs, {}, {"margin": 0.2},
           plainly=lambda loss, output, target: loss(output[0], output[1], target)),
    *cases("TripletMarginLoss", three_vectors, labels, {}, {"swap": True, "p": 1.0},
           plainly=lambda loss, output, _: loss(*output)),
    *cases("TripletMarginWithDistanceLoss", three_vectors, labels, {},
           {"distance_function": Target(f"{__name__}.TwoDistances")},
           plainly=lambda loss, output, _: loss(*output)),
    *cases("GaussianNLLLoss", mean_and_variance, numbers, {}, {"full": True},
           plainly=lambda loss, output, target: loss(output[0], target, output[1])),
    *cases("CTCLoss", log_alignments, sequences, {}, {"zero_infinity": True},
           plainly=lambda loss, output, target: loss(output, *target)),
    *cases("CTCLoss", alignments, sequences, sees={"output": "log_softmax"},
           plainly=lambda loss, output, target: loss(output.log_softmax(2), *target)),
]  # fmt: skip

OWN: list[Case] = [
    *cases(f"{__name__}.WeightedSquare", logits, numbers, SHARES),
    *cases(f"{__name__}.CallableSquare", logits, numbers),
    *cases(f"{__name__}.IgnoringCrossEntropy", logits, lambda n: some_ignored(n, index=-1)),
]

REFUSED = {
    "AdaptiveLogSoftmaxWithLoss": "has weights of its own",
    "LinearCrossEntropyLoss": "has weights of its own",
}


def build(name: str, args: Mapping[str, Any], **sees: Any) -> GlobalLoss:
    loss = build_loss(LossSpec(factory=Target(name, args), **sees), Builder())
    return loss.to(torch.device("cpu"), torch.float64)  # only the arithmetic of the means can differ then


def plain(case: Case, reduction: str) -> Any:
    """The loss as a program without this product would build it."""
    args = {
        name: TwoDistances() if isinstance(value, Target) else as_tensor(value) for name, value in case.args.items()
    }
    owner = globals() if "." in case.name else vars(nn)
    return owner[case.name.rpartition(".")[2]](**args, reduction=reduction)


def net() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(FEATURES, WIDTH, dtype=torch.float64)


def inputs(n: int) -> Tensor:
    return torch.randn(n, FEATURES, generator=seeded(0), dtype=torch.float64)


def split(batch: Any, size: int) -> list[Any]:
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    return [list(parts) for parts in zip(*(split(part, size) for part in batch))]


def gradient_of(model: nn.Linear) -> Tensor:
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    return torch.cat([model.weight.grad.flatten(), model.bias.grad])


def whole_batch(case: Case, loss: Any, n: int) -> tuple[float, Tensor]:
    model = net()
    # Of a scalar: itself; ``reduction: none`` leaves the mean to us.
    value = case.plainly(loss, case.head(model(inputs(n))), case.target(n)).mean()
    value.backward()
    return value.item(), gradient_of(model)


def over_shards(case: Case, loss: GlobalLoss, n: int, shards: int) -> tuple[float, Tensor]:
    """As the loop does it: denominators first where targets decide them, then a backward pass per shard."""
    model = net()
    micro_batches = list(zip(split(inputs(n), n // shards), split(case.target(n), n // shards)))
    weigh = loss.target_weights()
    weight = sum(weigh(target) for _, target in micro_batches) if weigh else None
    total = 0.0
    for inputs_of_shard, target in micro_batches:
        numerator, own = loss.numerator(case.head(model(inputs_of_shard)), target)
        denominator = loss.denominator(own, shards) if weight is None else weight
        (numerator / denominator).backward()
        total += numerator.item() / denominator
    return total, gradient_of(model)


@torch.no_grad()
def over_a_dataset(case: Case, loss: GlobalLoss, n: int, batch_size: int) -> float:
    """As validation does it: sums over batches of which the last is smaller."""
    model, weigh = net(), loss.target_weights()
    total = weight = 0.0
    for inputs_of_batch, target in zip(split(inputs(n), batch_size), split(case.target(n), batch_size)):
        numerator, own = loss.numerator(case.head(model(inputs_of_batch)), target)
        total += numerator.item()
        weight += weigh(target) if weigh else own
    return total / loss.denominator(weight)


def reductions(case: Case) -> list[str]:
    return ["mean", "sum", "none", *(["batchmean"] if case.name == "KLDivLoss" else [])]


REDUCED = [
    pytest.param(case, reduction, id=f"{case}-{reduction}") for case in TORCHS + OWN for reduction in reductions(case)
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal(ours: tuple[float, Tensor], torchs: tuple[float, Tensor]) -> None:
    """1e-10: sums of at most a few hundred float64 terms in another order, each rounded by 1e-16."""
    assert ours[0] == pytest.approx(torchs[0], rel=1e-10, abs=0)
    torch.testing.assert_close(ours[1], torchs[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("case", "reduction"), REDUCED)
def test_shards_make_the_loss_and_gradient_of_the_whole_batch(case: Case, reduction: str) -> None:
    loss = build(case.name, {**case.args, "reduction": reduction}, **case.sees)
    whole = whole_batch(case, plain(case, reduction), GLOBAL_BATCH)

    for shards in (2, 4):
        assert_equal(over_shards(case, loss, GLOBAL_BATCH, shards), whole)


@pytest.mark.parametrize(("case", "reduction"), REDUCED)
def test_batches_make_the_loss_of_a_dataset_that_does_not_divide_by_them(case: Case, reduction: str) -> None:
    loss = build(case.name, {**case.args, "reduction": reduction}, **case.sees)

    value = over_a_dataset(case, loss, n=17, batch_size=4)

    whole_value, _ = whole_batch(case, plain(case, reduction), 17)
    assert value == pytest.approx(whole_value, rel=1e-10, abs=0)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("twice_the_mean_square", {}),
        ("squares", {"scale": 2.0}),
        ("MeanSquare", {"scale": 2.0}),
    ],
)
def test_a_loss_of_ones_own_is_averaged(name: str, args: dict[str, Any]) -> None:
    """A function that gives the mean, a function that gives every term, and a class."""
    case = Case(f"{__name__}.{name}", args, logits, numbers)
    loss = build(case.name, args)

    assert_equal(over_shards(case, loss, GLOBAL_BATCH, shards=4), whole_batch(case, MeanSquare(2.0), GLOBAL_BATCH))
    assert over_a_dataset(case, loss, 17, 4) == pytest.approx(whole_batch(case, MeanSquare(2.0), 17)[0], rel=1e-10)


@pytest.mark.parametrize(
    "structure",
    [lambda x: {"mask": x}, lambda x: [x, x], lambda x: ["a word"] * len(x), lambda _: []],
    ids=["mapping", "pair", "words", "nothing"],
)
def test_the_mean_of_ones_own_weighs_its_samples_whatever_the_target_is(structure: Any) -> None:
    loss = GlobalLoss(lambda output, _: output.mean(), LossSpec(factory=Target("own.loss")))
    output = torch.arange(5.0)

    sums = [loss.numerator(part, structure(part)) for part in output.split(3)]

    assert (sum(float(total) for total, _ in sums), sum(own for _, own in sums)) == (10.0, 5)


def test_every_loss_of_torch_is_in_the_table_or_refused() -> None:
    in_torch = {name for name in dir(nn) if "Loss" in name}

    assert in_torch - {case.name for case in TORCHS} - set(REFUSED) == set()


def test_the_mean_of_the_shards_means_is_another_number() -> None:
    """So the comparisons above can fail."""
    loss = nn.CrossEntropyLoss(torch.tensor(WEIGHT, dtype=torch.float64))
    output = logits(net()(inputs(12)))

    mean_of_means = sum(loss(*shard).item() for shard in zip(output.chunk(4), labels(12).chunk(4))) / 4

    assert mean_of_means != pytest.approx(loss(output, labels(12)).item(), rel=1e-3)


def test_a_sum_of_16_bit_terms_is_no_16_bit_number() -> None:
    loss = build("L1Loss", {})

    total, _ = loss.numerator(torch.full((1001, 1), 1.0, dtype=torch.bfloat16), torch.zeros(1001, 1).bfloat16())

    assert float(total) == 1001  # bfloat16 knows 1000 and 1004


class TestWeights:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("name", "argument"),
        [("CrossEntropyLoss", "weight"), ("BCEWithLogitsLoss", "pos_weight"), (f"{__name__}.WeightedSquare", "weight")],
    )
    def test_a_list_becomes_a_tensor_of_the_models_type(self, name: str, argument: str, dtype: torch.dtype) -> None:
        loss = build_loss(LossSpec(factory=Target(name, {argument: WEIGHT})), Builder())

        loss.to(torch.device("cpu"), dtype)

        torch.testing.assert_close(getattr(loss.function, argument), torch.tensor(WEIGHT, dtype=dtype), rtol=0, atol=0)

    def test_a_list_for_a_function_becomes_one_too(self) -> None:
        loss = build("torch.nn.functional.cross_entropy", {"weight": WEIGHT})
        output = logits(net()(inputs(12)))

        total, samples = loss.numerator(output, labels(12))

        mean = F.cross_entropy(output, labels(12), torch.tensor(WEIGHT, dtype=torch.float64))
        assert total.item() / samples == pytest.approx(mean.item())

    def test_on_another_device(self) -> None:
        meta = torch.device("meta")
        of_class: Any = build("CrossEntropyLoss", SHARES).to(meta).function
        of_function: Any = build("torch.nn.functional.cross_entropy", SHARES).to(meta).function

        assert of_class.weight.device == of_function.keywords["weight"].device == meta


class TestSees:
    @pytest.mark.parametrize(
        ("kind", "output_shape", "target", "seen"),
        [
            ("one_hot", [3, 2], torch.tensor([1, 0, 1]), torch.tensor([[0.0, 1], [1, 0], [0, 1]])),
            ("one_hot", [1, 2, 3], torch.tensor([[1, 0, 1]]), torch.tensor([[[0.0, 1, 0], [1, 0, 1]]])),
            ("float", [3], torch.tensor([1, 0, 1]), torch.tensor([1.0, 0, 1])),
            ("float", [3, 1], torch.tensor([True, False, True]), torch.tensor([[1.0], [0], [1]])),
            ("float", [2, 4], torch.arange(8).view(2, 1, 2, 2), torch.arange(8.0).view(2, 4)),
            ("float", [2, 2, 3], torch.arange(12).view(2, 3, 2), torch.arange(12.0).view(2, 3, 2)),
            ("float", [2, 3], torch.arange(6).view(3, 2), torch.arange(6.0).view(3, 2)),
            ("index", [3, 2], torch.tensor([1, 0, 1], dtype=torch.uint8), torch.tensor([1, 0, 1])),
            (None, [3, 2], torch.tensor([1, 0, 1], dtype=torch.uint8), torch.tensor([1, 0, 1], dtype=torch.uint8)),
        ],
        ids=["one_hot", "one_hot map", "float", "column", "flat", "other axes", "other samples", "index", "as it is"],
    )
    def test_a_target_as_declared(self, kind: Any, output_shape: list[int], target: Tensor, seen: Tensor) -> None:
        """Reshaped where that mixes no samples and exchanges no axes; what is left unequal the plan refuses."""
        _, ours = build("MSELoss", {}, target=kind).sees(torch.randn(output_shape), target)

        torch.testing.assert_close(ours, seen, rtol=0, atol=0)

    def test_targets_keep_their_digits_under_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            _, target = build("MSELoss", {}, target="float").sees(torch.zeros(1).bfloat16(), torch.tensor([1001]))

        assert (target.item(), target.dtype) == (1001.0, torch.float32)

    def test_a_metric_gets_the_losss_output_and_class_numbers(self) -> None:
        output, target = torch.randn(3, 2), torch.tensor([1, 0, 1])

        seen_output, seen_target = build("MSELoss", {}, output="softmax", target="one_hot").measured(output, target)

        torch.testing.assert_close(seen_output, output.softmax(1))
        assert seen_target is target
        assert build("BCELoss", {}, target="float").measured(output[:, 0], target)[1].dtype == torch.float32


class TestTally:
    def test_counts_what_was_predicted_of_what_counts(self) -> None:
        loss = build("CrossEntropyLoss", IGNORE)
        output, target = logits(net()(inputs(12))), some_ignored(12)
        target[6] = output[6].argmax()

        tally = loss.tally(output, target, torch.tensor(2.5, requires_grad=True))

        hits = [row.argmax() == label for row, label in zip(output, target) if label != -100]
        assert tally.tolist() == [2.5, sum(hits), len(hits)]
        assert (tally.dtype, tally.requires_grad) == (torch.float64, False)

    def test_counts_every_pixel(self) -> None:
        output, target = maps(net()(inputs(12))), label_maps(12)

        tally = build("CrossEntropyLoss", {}).tally(output, target, torch.tensor(0.0))

        assert tally.tolist() == [0.0, (output.argmax(dim=1) == target).sum(), 12 * 6]

    def test_counts_class_numbers_that_the_loss_sees_as_one_hot(self) -> None:
        output, target = logits(net()(inputs(12))), labels(12)

        tally = build("BCELoss", {}, output="sigmoid", target="one_hot").tally(output, target, torch.tensor(0.0))

        assert tally.tolist() == [0.0, (output.argmax(dim=1) == target).sum(), 12]

    @pytest.mark.parametrize(
        ("kind", "output", "target"),
        [
            (None, torch.randn(4, 5), torch.rand(4, 5)),
            ("float", torch.randn(4, 3), torch.tensor([0, 1, 1, 0])),
            (None, torch.randn(4, 1), torch.tensor([0, 1, 1, 0])),
            (None, torch.randn(4), torch.tensor([0, 1, 1, 0])),
            (None, torch.randn(4, 5, 8, 8), torch.zeros(4, 2, 2).long()),
            (None, (torch.randn(4, 5), torch.randn(4, 5)), torch.tensor([1, -1, 1, 1])),
        ],
        ids=["numbers", "declared numbers", "one column", "one dimension", "another size", "two outputs"],
    )
    def test_counts_nothing_where_targets_are_no_classes(self, kind: Any, output: Any, target: Tensor) -> None:
        tally = build("MSELoss", {}, target=kind).tally(output, target, torch.tensor(1.0))

        assert tally.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("args", "unsaid"),
    [({}, True), (IGNORE, False), (SHARES, False), ({"reduction": "sum"}, False), ({"reduction": "none"}, False)],
    ids=str,
)
def test_ignored_targets_have_to_be_said_where_a_mean_is_taken_over_all(args: dict[str, Any], unsaid: bool) -> None:
    """Weights divide by what counts anyway; a sum by nothing, and ``none`` by all, as torch does."""
    assert build("CrossEntropyLoss", args).ignores_unsaid(3, 4) is unsaid
    assert not build("CrossEntropyLoss", args).ignores_unsaid(4, 4)


def test_what_a_loss_makes_of_a_batch_alone_can_be_asked() -> None:
    loss = build("MSELoss", {"reduction": "sum"})

    alone = loss.as_written(torch.full((2, 2), 3.0), torch.zeros(2, 2))
    terms, _ = loss.numerator(torch.full((2, 2), 3.0), torch.zeros(2, 2))

    assert alone is not None
    assert alone.item() == terms.item() == 36.0
    assert build(f"{__name__}.squares", {}).as_written(torch.zeros(2), torch.zeros(2)) is None


class Counting(nn.Module):
    """A loss that counts its calls, and weighs by the count."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls = self.calls + 1
        loss = self.calls * (output - target)
        return loss if self.reduction == "none" else loss.mean()


def test_a_batch_alone_leaves_no_trace_in_a_loss_with_buffers() -> None:
    loss = build(f"{__name__}.Counting", {})
    alone = loss.as_written(torch.ones(4), torch.zeros(4))
    total, count = loss.numerator(torch.ones(4), torch.zeros(4))
    assert alone is not None
    assert alone.item() == total.item() / count == 1


def half_mean(output: Tensor, target: Tensor) -> Tensor:
    return (output.half() - target.half()).abs().mean()


def test_a_mean_in_float16_is_multiplied_in_float32() -> None:
    """In float16 the sum over 128 samples would be infinite, and in bfloat16 keep three digits."""
    total, count = build(f"{__name__}.half_mean", {}).numerator(torch.full((128,), 1000.0), torch.zeros(128))
    assert (total.dtype, total.item(), count) == (torch.float32, 128000.0, 128)


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
            (
                "MSELoss",
                {"reduction": "avg"},
                "loss.reduction must be one of mean, sum, none, got 'avg'; write one of them",
            ),
            (
                "MSELoss",
                {"reduction": "batchmean"},
                "loss.reduction must be one of mean, sum, none, got 'batchmean'; write one of them",
            ),
            (
                "KLDivLoss",
                {"reduction": "avg"},
                "loss.reduction must be one of mean, sum, none, batchmean, got 'avg'; write one of them",
            ),
            (
                "CrossEntropyLoss",
                {"weight": [1.0, "two"]},
                "loss.weight must be a list of finite numbers, got [1.0, 'two']; write one number per class",
            ),
            (
                "BCEWithLogitsLoss",
                {"pos_weight": [1.0, float("nan")]},
                "loss.pos_weight must be a list of finite numbers, got [1.0, nan]; write one number per class",
            ),
            (
                "fractions.Fraction",
                {},
                "loss._target_ must be a loss that can be called with (output, target), got fractions.Fraction; "
                "give it __call__",
            ),
        ],
    )
    def test_one_line_says_what_is_wrong(self, name: str, args: dict[str, Any], message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            build(name, args)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("AdaptiveLogSoftmaxWithLoss", {"in_features": 7, "n_classes": 5, "cutoffs": [2]}),
            ("LinearCrossEntropyLoss", {"in_features": 7, "num_classes": 5}),
            ("Linear", {"in_features": 7, "out_features": 5}),
        ],
    )
    def test_a_loss_with_weights_to_train_is_refused(self, name: str, args: dict[str, Any]) -> None:
        if not hasattr(nn, name):
            pytest.skip(f"this version of torch has no {name}")

        with pytest.raises(DescriptionError, match=f"^loss._target_ {name} has weights of its own, which no optimizer"):
            build(name, args)
