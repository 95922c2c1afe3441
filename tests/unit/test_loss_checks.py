"""What a loss cannot take is one line with what to write instead, and what it can take passes."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import DescriptionError
from jobs.components.build import listed_targets
from jobs.components.losses import GlobalLoss, build_loss
from jobs.components.targets import Builder
from jobs.spec import LossSpec, Target
from launcher.planning.loss_checks import MicroBatch, check_fit, check_mean

SAMPLES, CLASSES = 6, 4
LABELS = [0, 1, 2, 3, 0, 1]


class Dataset:
    """Six of eight samples make the batch; the last two only stand in ``targets``."""

    def __init__(self, targets: Any = None) -> None:
        if targets is not None:
            self.targets = targets

    def __len__(self) -> int:
        return SAMPLES + 2


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Any:
        return self.function(inputs)


def identity(inputs: Tensor) -> Tensor:
    return inputs


def sigmoid(inputs: Tensor) -> Tensor:
    return inputs.sigmoid()


def log_softmax(inputs: Tensor) -> Tensor:
    return inputs.log_softmax(1)


def softmax(inputs: Tensor) -> Tensor:
    return inputs.softmax(1)


def maps(inputs: Tensor) -> Tensor:
    return inputs[:, :, None, None].expand(-1, -1, 2, 3) * torch.linspace(0.5, 1, 6).view(2, 3)


def heatmaps(inputs: Tensor) -> Tensor:
    return maps(inputs).flatten(2).log_softmax(2).view(-1, CLASSES, 2, 3)


def column(inputs: Tensor) -> Tensor:
    return inputs[:, :1]


def scalar(inputs: Tensor) -> Tensor:
    return inputs[:, 0]


def by_chance_in_range(inputs: Tensor) -> Tensor:
    return 0.5 + 0.1 * inputs.tanh() + 0.01 * inputs


def refuses_other_inputs(inputs: Tensor) -> Tensor:
    if inputs.abs().max() > 50:
        raise ValueError("no such image")
    return inputs.sigmoid()


def pair(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, inputs + 1


def alignments(inputs: Tensor) -> Tensor:
    return inputs.expand(5, *inputs.shape).log_softmax(2)


def labels(dtype: torch.dtype = torch.int64, *shape: int) -> Tensor:
    values = torch.tensor(LABELS, dtype=dtype)
    return values.view(-1, *[1] * len(shape)).expand(-1, *shape)


def bits(*shape: int) -> Tensor:
    return labels(torch.float32, *shape) % 2


def one_hot() -> Tensor:
    return nn.functional.one_hot(labels(), CLASSES).float()


def build(name: str, args: Mapping[str, Any] | None = None, **sees: Any) -> GlobalLoss:
    return build_loss(LossSpec(factory=Target(name, args or {}), **sees), Builder()).to(torch.device("cpu"))


def check(
    loss: GlobalLoss, head: Callable[[Tensor], Any], target: Any, listed: Any = None, autocast: bool = False
) -> None:
    model = Lambda(head)
    inputs = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(inputs)
        batch = MicroBatch("data.train", Dataset(listed), list(range(SAMPLES)), inputs, target, output)
        check_fit(loss, batch, model)


def own(output: Tensor, target: Tensor) -> Tensor:
    return (output.sum() - target.sum()).square()


OWN = f"{__name__}.own"
SEQUENCES = [torch.ones(SAMPLES, 2).long(), torch.full((SAMPLES,), 5), torch.full((SAMPLES,), 2)]


@pytest.mark.parametrize(
    ("loss", "head", "target"),
    [
        (build("CrossEntropyLoss"), identity, labels()),
        (build("CrossEntropyLoss", {"weight": [1.0] * CLASSES}), maps, labels(torch.int64, 2, 3)),
        (build("CrossEntropyLoss", {"ignore_index": 3}), identity, labels()),
        (build("CrossEntropyLoss"), identity, one_hot()),
        (build("CrossEntropyLoss", target="one_hot"), identity, labels()),
        (build("CrossEntropyLoss", target="index"), identity, labels(torch.uint8)),
        (build("NLLLoss"), log_softmax, labels()),
        (build("NLLLoss", output="log_softmax"), maps, labels(torch.int64, 2, 3)),
        (build("MultiMarginLoss", {"weight": [1.0] * CLASSES}), identity, labels()),
        (build("KLDivLoss"), log_softmax, one_hot()),
        (build("KLDivLoss"), heatmaps, torch.full((SAMPLES, CLASSES, 2, 3), 1 / 6)),
        (build("KLDivLoss", {"log_target": True}), log_softmax, torch.randn(SAMPLES, CLASSES).log_softmax(1)),
        (build("KLDivLoss", output="log_softmax", target="one_hot"), identity, labels()),
        (build("BCELoss", {"weight": [2.0]}), sigmoid, one_hot()),
        (build("BCELoss"), softmax, one_hot()),
        (build("BCELoss"), refuses_other_inputs, one_hot()),
        (build("BCELoss", output="sigmoid", target="float"), column, labels() % 2),
        (build("BCEWithLogitsLoss", {"pos_weight": [1.0] * CLASSES}), identity, one_hot()),
        (build("BCEWithLogitsLoss", target="one_hot"), identity, labels()),
        (build("BCEWithLogitsLoss", {"pos_weight": [[[2.0]]] * CLASSES}), maps, bits(CLASSES, 2, 3)),
        (build("BCEWithLogitsLoss", {"pos_weight": [2.0]}), scalar, bits()),
        (build("MSELoss", output="softmax", target="one_hot"), identity, labels()),
        (build("MSELoss", target="float"), scalar, torch.randn(SAMPLES).double()),
        (build("L1Loss"), identity, labels(torch.int64, CLASSES)),
        (build("MultiLabelMarginLoss"), identity, labels(torch.int64, CLASSES)),
        (build("SoftMarginLoss"), identity, 2 * one_hot() - 1),
        (build("CosineEmbeddingLoss"), pair, 2 * bits() - 1),
        (build("GaussianNLLLoss"), pair, torch.randn(SAMPLES, CLASSES)),
        (build("CTCLoss"), alignments, SEQUENCES),
        (build(OWN), identity, torch.full((SAMPLES,), 99)),
        (build(OWN), pair, ["a word"] * SAMPLES),
        (build(OWN, output="sigmoid", target="float"), scalar, torch.full((SAMPLES,), 99)),
    ],
    ids=lambda case: case.spec.factory.path.rpartition(".")[2] if isinstance(case, GlobalLoss) else "",
)
def test_what_fits_passes(loss: GlobalLoss, head: Any, target: Any) -> None:
    check(loss, head, target)


CASES: dict[str, tuple[GlobalLoss, Any, Any, str]] = {
    "a softmax before cross entropy": (
        build("CrossEntropyLoss", output="softmax"), identity, labels(),
        "loss.output must not be softmax for CrossEntropyLoss, which takes logits; remove loss.output",
    ),
    "a sigmoid twice": (
        build("BCEWithLogitsLoss", output="sigmoid"), identity, one_hot(),
        "loss.output must not be sigmoid for BCEWithLogitsLoss, which takes logits; remove loss.output",
    ),
    "a softmax of one number": (
        build("MSELoss", output="softmax"), scalar, bits(),
        "loss.output softmax is a function of one tensor with classes in dimension 1, got [6] torch.float32 from the "
        "model; apply it in the model",
    ),
    "a sigmoid of a pair": (
        build(OWN, output="sigmoid"), pair, bits(),
        "loss.output sigmoid is a function of one tensor, got tuple from the model; apply it in the model",
    ),
    "one_hot of words": (
        build(OWN, target="one_hot"), identity, ["a word"] * SAMPLES,
        "loss.target one_hot is made of one tensor, got a target of list and an output of [6, 4] torch.float32; "
        "remove loss.target",
    ),
    "one_hot of fractions": (
        build("MSELoss", target="one_hot"), identity, bits(),
        "loss.target one_hot is made of class numbers, got [6] torch.float32; give integers in data.train, or remove "
        "loss.target",
    ),
    "one_hot for one output": (
        build("MSELoss", target="one_hot"), column, labels(),
        "loss.target one_hot needs an output with one value per class in dimension 1, got [6, 1] torch.float32 for a "
        "target of [6] torch.int64; give the model as many outputs as there are classes",
    ),
    "one_hot of an ignored label": (
        build("KLDivLoss", output="log_softmax", target="one_hot"), identity, labels() - 1,
        "data.train: the label of sample 0 must lie between 0 and 3, the model's classes, got -1; give the model as "
        "many classes as the data has",
    ),
    "index of fractions": (
        build("CrossEntropyLoss", target="index"), identity, labels(torch.float32),
        "loss.target index is made of class numbers, got [6] torch.float32; give integers in data.train, or remove "
        "loss.target",
    ),
    "too few outputs": (
        build("CosineEmbeddingLoss"), identity, bits(),
        "model must return 2 tensors for CosineEmbeddingLoss, got [6, 4] torch.float32; return them as a tuple",
    ),
    "no lengths for CTC": (
        build("CTCLoss"), alignments, labels(),
        "data.train: a target for CTCLoss is (targets, input_length, target_length), got [6] torch.int64; return the "
        "three as a tuple",
    ),
    "labels outside the classes": (
        build("CrossEntropyLoss"), identity, labels() + 1,
        "data.train: the label of sample 3 must lie between 0 and 3, the model's classes, got 4; give the model as "
        "many classes as the data has",
    ),
    "labels that are ignored without a word": (
        build("CrossEntropyLoss"), identity, torch.tensor([0, 1, -100, 2, 3, 0]),
        "data.train: the label of sample 2 is -100, which CrossEntropyLoss ignores, and the mean is taken over all; "
        "write loss.ignore_index: -100 to take it over the others",
    ),
    "labels of 32 bits": (
        build("CrossEntropyLoss"), identity, labels(torch.int32),
        "loss: CrossEntropyLoss takes class numbers of 64 bits, got [6] torch.int32; write loss.target: index",
    ),
    "class numbers as fractions": (
        build("CrossEntropyLoss"), identity, labels(torch.float32),
        "loss: CrossEntropyLoss takes class numbers, or probabilities of the output's shape [6, 4], got [6] "
        "torch.float32; give integers in data.train",
    ),
    "probabilities for the likelihood": (
        build("NLLLoss", target="one_hot"), log_softmax, labels(),
        "loss: NLLLoss takes class numbers, got [6, 4] torch.float32; remove loss.target",
    ),
    "too few class weights": (
        build("CrossEntropyLoss", {"weight": [1.0, 2.0, 3.0]}), identity, labels(),
        "loss.weight must be 4 numbers, one per class of the model's output, got 3; make them as many",
    ),
    "too many class weights": (
        build("MultiMarginLoss", {"weight": [1.0] * 5}), identity, labels(),
        "loss.weight must be 4 numbers, one per class of the model's output, got 5; make them as many",
    ),
    "too few weights of positives": (
        build("BCEWithLogitsLoss", {"pos_weight": [1.0, 2.0]}), identity, one_hot(),
        "loss.pos_weight must broadcast to [4], the model's output for a sample, got 2; make them as many, or write "
        "one",
    ),
    "weights of the places in a batch": (
        build("BCELoss", {"weight": [1.0] * SAMPLES}), lambda x: scalar(x).sigmoid(), bits(),
        "loss.weight must broadcast to [], the model's output for a sample, got 6; make them as many, or write one",
    ),
    "class numbers for a loss of numbers": (
        build("MSELoss"), identity, labels(),
        "loss: MSELoss takes output and target of one shape, got [6, 4] and [6]; write loss.target: one_hot",
    ),
    "a column beside a row": (
        build("BCEWithLogitsLoss"), column, bits(),
        "loss: BCEWithLogitsLoss takes output and target of one shape, got [6, 1] and [6]; write loss.target: float",
    ),
    "images of another size": (
        build("L1Loss"), maps, torch.rand(SAMPLES, CLASSES, 2, 1),
        "loss: L1Loss takes output and target of one shape, got [6, 4, 2, 3] and [6, 4, 2, 1]; make the model's output "
        "and the target of data.train the same shape",
    ),
    "axes in another order": (
        build("L1Loss", target="float"), maps, torch.rand(SAMPLES, 2, 3, CLASSES),
        "loss: L1Loss takes output and target of one shape, got [6, 4, 2, 3] and [6, 2, 3, 4]; make the model's output "
        "and the target of data.train the same shape",
    ),
    "a mean beside a target for each": (
        build("GaussianNLLLoss"), pair, bits(),
        "loss: GaussianNLLLoss takes output and target of one shape, got [6, 4] and [6]; make the model's output and "
        "the target of data.train the same shape",
    ),
    "numbers of 64 bits": (
        build("MSELoss"), scalar, bits().double(),
        "loss: MSELoss takes targets of the output's type, torch.float32, got torch.float64; write loss.target: float",
    ),
    "integers for probabilities": (
        build("BCEWithLogitsLoss"), scalar, labels() % 2,
        "loss: BCEWithLogitsLoss takes targets of the output's type, torch.float32, got torch.int64; write "
        "loss.target: float",
    ),
    "logits for log-probabilities": (
        build("KLDivLoss"), identity, one_hot(),
        "loss: KLDivLoss takes log-probabilities, and exp of the model's output does not add up to 1; write "
        "loss.output: log_softmax for a model that ends in logits",
    ),
    "probabilities for log-probabilities": (
        build("NLLLoss"), softmax, labels(),
        "loss: NLLLoss takes log-probabilities, and exp of the model's output does not add up to 1; write "
        "loss.output: log_softmax for a model that ends in logits",
    ),
    "log-probabilities over the wrong axis": (
        build("CTCLoss"), lambda x: alignments(x).exp().log_softmax(0), SEQUENCES,
        "loss: CTCLoss takes log-probabilities, and exp of the model's output does not add up to 1; write "
        "loss.output: log_softmax for a model that ends in logits",
    ),
    "class numbers for probabilities": (
        build("KLDivLoss", output="log_softmax"), identity, labels(),
        "loss: KLDivLoss takes output and target of one shape, got [6, 4] and [6]; write loss.target: one_hot",
    ),
    "scores for probabilities": (
        build("KLDivLoss", output="log_softmax"), identity, 2 * one_hot(),
        "loss: KLDivLoss takes probabilities as targets, got numbers of data.train that do not add up to 1; normalize "
        "them, or write loss.log_target: true if they are logarithms",
    ),
    "probabilities for their logarithms": (
        build("KLDivLoss", {"log_target": True}, output="log_softmax"), identity, one_hot(),
        "loss: KLDivLoss takes log-probabilities as targets, got numbers of data.train that do not add up to 1; "
        "normalize them, or remove loss.log_target",
    ),
    "logits for probabilities": (
        build("BCELoss"), lambda x: 12 + 0 * x, one_hot(),
        "loss: BCELoss takes outputs between 0 and 1, got 12; write loss.output: sigmoid, or take BCEWithLogitsLoss, "
        "for a model that ends in logits",
    ),
    "classes for a bit": (
        build("BCEWithLogitsLoss", target="float"), scalar, labels(),
        "data.train: the target of sample 2 must lie between 0 and 1 for BCEWithLogitsLoss, got 2; for class numbers "
        "write loss.target: one_hot and give the model an output per class",
    ),
    "bits for signs": (
        build("SoftMarginLoss"), scalar, bits(),
        "data.train: the target of sample 0 must be 1 or -1 for SoftMarginLoss, got 0; give it so",
    ),
    "bits for signs of pairs": (
        build("CosineEmbeddingLoss"), pair, bits(),
        "data.train: the target of sample 0 must be 1 or -1 for CosineEmbeddingLoss, got 0; give it so",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_one_line_with_the_fix(name: str) -> None:
    loss, head, target, message = CASES[name]

    with pytest.raises(DescriptionError) as caught:
        check(loss, head, target)

    assert str(caught.value) == message


def test_logits_that_lie_between_0_and_1_by_chance_are_logits() -> None:
    """Seen on inputs far from the batch's; the model is as it was afterwards."""
    with pytest.raises(DescriptionError, match=r"^loss: BCELoss takes outputs between 0 and 1, got"):
        check(build("BCELoss"), by_chance_in_range, one_hot())


def test_a_trial_with_far_inputs_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Sigmoid())
    inputs = torch.randn(SAMPLES, CLASSES)
    output = model(inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    check_fit(build("BCELoss"), MicroBatch("data.train", Dataset(), [0], inputs, one_hot(), output), model)

    assert model.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


class TestAutocast:
    def test_probabilities_of_16_bits_are_refused(self) -> None:
        with pytest.raises(DescriptionError, match="^loss: BCELoss of 16-bit probabilities .*train.precision: fp32$"):
            check(build("BCELoss"), sigmoid, one_hot(), autocast=True)

    @pytest.mark.parametrize("name", ["MSELoss", "HuberLoss", "BCEWithLogitsLoss"])
    def test_targets_of_32_bits_are_right(self, name: str) -> None:
        check(build(name), lambda x: x.bfloat16(), one_hot(), autocast=True)

    def test_rounded_log_probabilities_are_log_probabilities(self) -> None:
        check(build("KLDivLoss"), lambda x: log_softmax(x).bfloat16(), one_hot(), autocast=True)


class TestListedTargets:
    """All of them are looked at, if they are what the samples hold."""

    @pytest.mark.parametrize("listed", [[*LABELS, 3, 9], torch.tensor([*LABELS, 3, 9])], ids=["list", "tensor"])
    def test_a_label_beyond_the_batch(self, listed: Any) -> None:
        with pytest.raises(DescriptionError, match=r"^data.train: the label of sample 7 must lie .*, got 9;"):
            check(build("CrossEntropyLoss"), identity, labels(), listed)

    def test_a_number_beyond_the_batch(self) -> None:
        listed = [*bits().tolist(), 1.0, 1.5]

        with pytest.raises(DescriptionError, match=r"^data.train: the target of sample 7 must lie .*, got 1.5;"):
            check(build("BCEWithLogitsLoss"), scalar, bits(), listed)

    def test_an_ignored_label_beyond_the_batch(self) -> None:
        with pytest.raises(DescriptionError, match="^data.train: the label of sample 6 is -100, which"):
            check(build("CrossEntropyLoss"), identity, labels(), [*LABELS, -100, 0])

    def test_what_a_transform_changes_is_not_looked_at(self) -> None:
        """Labels from 1 to 4 that a target_transform lowers by one."""
        check(build("CrossEntropyLoss"), identity, labels(), [label + 1 for label in [*LABELS, 3, 3]])

    def test_a_list_of_another_length_is_not_looked_at(self) -> None:
        check(build("CrossEntropyLoss"), identity, labels(), [*LABELS, 9])

    @pytest.mark.parametrize("listed", [None, ["cat", "dog"], [[1], [2, 3]], [{"box": 1}]], ids=str)
    def test_only_numbers_are_targets(self, listed: Any) -> None:
        assert listed_targets(Dataset(listed)) is None


class PerPositive(nn.Module):
    """A mean over what is positive, as focal losses take it."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        terms = (output - target).square()
        if self.reduction == "mean":
            return terms.sum() / (target > 0).sum()
        return terms.sum() if self.reduction == "sum" else terms


class TestMean:
    def check(self, loss: GlobalLoss, output: Tensor, target: Tensor) -> None:
        numerator, own_denominator = loss.numerator(output, target)
        weigh = loss.target_weights()
        denominator = loss.denominator(own_denominator if weigh is None else weigh(target))
        check_mean(loss, loss.as_written(output, target), numerator, denominator)

    def test_a_mean_over_something_else_is_refused(self) -> None:
        name = f"{__name__}.PerPositive"
        problem = f"loss: {name} gives 0.75 for a micro-batch whose terms have the mean 0.25, and shards"

        with pytest.raises(DescriptionError, match=f"^{re.escape(problem)} .* write loss.reduction: none"):
            self.check(build(name), torch.full((6,), 0.5), bits(1)[:, 0] * torch.tensor([0.0, 1, 0, 1, 0, 0]))

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_its_sum_and_its_terms_are_taken(self, reduction: str) -> None:
        self.check(build(f"{__name__}.PerPositive", {"reduction": reduction}), torch.full((6,), 0.5), bits())

    def test_a_function_has_no_mean_of_its_own(self) -> None:
        self.check(build(OWN), torch.full((6,), 0.5), bits())

    def test_nothing_is_compared_where_every_target_is_ignored(self) -> None:
        ignoring = build("CrossEntropyLoss", {"ignore_index": -100})

        self.check(ignoring, torch.randn(6, CLASSES), torch.full((6,), -100))

    def test_weights_and_rounding_do_not_matter(self) -> None:
        loss = build("CrossEntropyLoss", {"weight": [1.0, 2.0, 3.0, 4.0]})

        self.check(loss, torch.randn(6, CLASSES), labels())
        self.check(build("L1Loss"), torch.randn(60, 40).bfloat16(), torch.randn(60, 40).bfloat16())
