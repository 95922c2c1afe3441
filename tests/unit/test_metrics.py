"""Metrics put together from the shares of workers: torchmetrics' own value, and one set of bits for any workers."""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor

from cluster.errors import DescriptionError
from jobs.components.metric_values import Matrix, MetricValues
from jobs.components.metrics import MetricSet, build_metrics, class_names
from jobs.components.targets import Builder
from jobs.spec import Target

SAMPLES, BATCH, CLASSES = 45, 6, 5
"""The last of 8 batches has 3 samples; of 3 workers, two have 3 batches and one has 2."""

Pair = tuple[Any, Any]


class Span(torchmetrics.Metric):
    """A metric of one's own: a reduction of its own, a list without one, and a sum that its integer cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squares", torch.zeros(2), dist_reduce_fx=lambda stacked: stacked.pow(2).sum(0).sqrt())
        self.add_state("sizes", [], dist_reduce_fx=None)
        self.add_state("total", torch.zeros((), dtype=torch.int8), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        self.squares += torch.stack([output.float().norm(), target.float().norm()])
        self.sizes.append(torch.tensor(len(target)))
        self.total += output.numel()

    def compute(self) -> dict[str, Any]:
        sizes = [int(size) for size in self.sizes]
        assert CLASSES * sum(sizes) == self.total
        output, target = self.squares
        return {"output": output, "target": target, "last": sizes[-1]}


class Mean(torchmetrics.Metric):
    """Averages batches, a short one like any other: which is what its author asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.zeros(()), dist_reduce_fx="mean")

    def update(self, output: Tensor, _: Tensor) -> None:
        self.mean = output.float().mean()

    def compute(self) -> Tensor:
        return self.mean


class Noise(torchmetrics.Metric):
    """What it computes has a shape that was asked for."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.shape = shape

    def update(self, output: Tensor, _: Tensor) -> None:
        self.count += len(output)

    def compute(self) -> Tensor:
        return torch.zeros(self.shape)


def here(name: str, **args: Any) -> Target:
    return Target(f"{__name__}.{name}", args)


def batches_of(output: Tensor, target: Tensor) -> list[Pair]:
    return list(zip(output.split(BATCH), target.split(BATCH)))


def classified() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    logits_NK = torch.randn(SAMPLES, CLASSES, generator=generator)
    logits_NK[torch.arange(SAMPLES), labels_N] += 1
    return logits_NK, labels_N


def regressed() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values_N = 3 * torch.randn(SAMPLES, generator=generator)
    return values_N + torch.randn(SAMPLES, generator=generator), values_N


def built(target: Target, classes: list[str] | None = None) -> MetricSet:
    return build_metrics({"it": target}, Builder(), classes)


def measured_by(make: Callable[[], MetricSet], batches: list[Pair], workers: int) -> MetricValues:
    """What ``workers`` workers come to, each with a set of its own."""
    sets = [make() for _ in range(workers)]
    for rank, metrics in enumerate(sets):
        for output, target in batches[rank::workers]:
            metrics.update(output, target)
    return sets[0].compute([metrics.share() for metrics in sets])


def bits(measured: MetricValues) -> dict[str, bytes]:
    return {name: struct.pack("d", value) for name, value in measured.numbers.items()}


def flat(result: Any) -> Iterator[float]:
    yield from torch.as_tensor(result, dtype=torch.float64).reshape(-1).tolist()


K = {"num_classes": CLASSES}
CLASS_METRICS = [
    Target("MulticlassAccuracy", K | {"average": "micro"}),
    Target("MulticlassAccuracy", K | {"average": "micro", "top_k": 2}),
    Target("MulticlassRecall", K | {"average": "none"}),
    Target("MulticlassConfusionMatrix", K),
    Target("torchmetrics.classification.MulticlassF1Score", K | {"average": "macro"}),
    Target("Accuracy", K | {"task": "multiclass"}),
    Target("MulticlassAUROC", K | {"average": "none"}),
    Target("MulticlassAveragePrecision", K | {"thresholds": 20}),
    Target("MulticlassCalibrationError", K),
    Target("MulticlassCohenKappa", K),
]
VALUE_METRICS = [
    Target("MeanAbsoluteError"),
    Target("MeanSquaredError", {"squared": False}),
    Target("R2Score"),
    Target("PearsonCorrCoef"),
    Target("KendallRankCorrCoef"),
    Target("ExplainedVariance"),
    Target("ConcordanceCorrCoef"),
]
EVERY = [(target, classified) for target in CLASS_METRICS] + [(target, regressed) for target in VALUE_METRICS]


def name_of(value: Any) -> str:
    if isinstance(value, Target):
        return "-".join(
            [value.path.rpartition(".")[2], *(str(value.args[a]) for a in ("average", "top_k") if a in value.args)]
        )
    return ""


@pytest.mark.parametrize(("target", "data"), EVERY, ids=name_of)
def test_shares_come_to_what_torchmetrics_computes(target: Target, data: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Floats are added up batch by batch here and all at once there: equal to a few units in the last place."""
    output, truth = data()
    alone = Builder().build(target, "metric", bare_names=[torchmetrics, torchmetrics.classification])
    alone.update(output, truth)

    measured = measured_by(lambda: built(target), batches_of(output, truth), workers=3)

    values = [value for matrix in measured.matrices.values() for row in matrix.values for value in row]
    assert [*measured.numbers.values(), *values] == pytest.approx(list(flat(alone.compute())), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("target", "data"), [*EVERY, (here("Span"), classified), (here("Mean"), regressed)], ids=name_of
)
def test_any_number_of_workers_gives_the_same_bits(target: Target, data: Callable[[], tuple[Tensor, Tensor]]) -> None:
    batches = batches_of(*data())

    alone, *others = (measured_by(lambda: built(target), batches, workers) for workers in (1, 2, 3, 4))

    assert alone.numbers or alone.matrices
    for other in others:
        assert bits(other) == bits(alone)
        assert other == alone


def test_the_sums_would_differ_without_an_order() -> None:
    """What the test above compares is worth it: a plain sum of these floats does depend on who adds what."""
    sums = [float((output - target).abs().sum()) for output, target in batches_of(*regressed())]
    of_three = [torch.tensor(sums[rank::3]).sum() for rank in range(3)]
    assert float(torch.stack(of_three).sum()) != float(torch.tensor(sums).sum())


def test_workers_without_a_batch() -> None:
    batches = batches_of(*classified())[:2]
    for target in (CLASS_METRICS[2], CLASS_METRICS[6], here("Span")):
        assert measured_by(lambda: built(target), batches, 4) == measured_by(lambda: built(target), batches, 1)  # noqa: B023


def test_a_metric_of_ones_own() -> None:
    logits_NK, labels_N = classified()
    batches = batches_of(logits_NK, labels_N)

    measured = measured_by(lambda: built(here("Span")), batches, workers=2)

    assert measured.numbers["val/it/last"] == SAMPLES % BATCH
    assert measured.numbers["val/it/output"] == pytest.approx(float(logits_NK.norm()))


def test_a_set_measures_anew_each_time() -> None:
    metrics = built(Target("MeanAbsoluteError"))
    results = []
    for batch in batches_of(*regressed())[:2]:
        metrics.update(*batch)
        results.append(metrics.compute([metrics.share()]))
    first, second = batches_of(*regressed())[:2]
    assert results[0].numbers["val/it"] == pytest.approx(float((first[0] - first[1]).abs().mean()))
    assert results[1].numbers["val/it"] == pytest.approx(float((second[0] - second[1]).abs().mean()))


def test_half_precision_is_measured_in_full() -> None:
    logits_NK, labels_N = classified()
    rounded_NK = logits_NK.bfloat16()
    half, full = built(Target("MulticlassHingeLoss", K)), built(Target("MulticlassHingeLoss", K))
    with torch.autocast("cpu", torch.bfloat16):
        half.update(rounded_NK, labels_N)
    full.update(rounded_NK.float(), labels_N)
    assert half.compute([half.share()]) == full.compute([full.share()])


class TestNames:
    @pytest.mark.parametrize(
        ("target", "classes", "names"),
        [
            (Target("MulticlassF1Score", K), None, ["val/it"]),
            (CLASS_METRICS[2], None, [f"val/it/{number}" for number in range(CLASSES)]),
            (CLASS_METRICS[2], list("abcde"), [f"val/it/{name}" for name in "abcde"]),
            (CLASS_METRICS[2], list("abc"), [f"val/it/{number}" for number in range(CLASSES)]),
            (here("Span"), list("abcde"), ["val/it/output", "val/it/target", "val/it/last"]),
        ],
    )
    def test_numbers(self, target: Target, classes: list[str] | None, names: list[str]) -> None:
        batches = batches_of(*classified())
        assert list(measured_by(lambda: built(target, classes), batches, 1).numbers) == names
        assert built(target, classes).try_out(*batches[0]) == set(names)

    def test_a_matrix_is_no_number(self) -> None:
        logits_NK, labels_N = classified()
        measured = measured_by(
            lambda: built(CLASS_METRICS[3], list("abcde")), batches_of(logits_NK, labels_N), workers=2
        )
        counts = [
            [int(((labels_N == true) & (logits_NK.argmax(1) == said)).sum()) for said in range(CLASSES)]
            for true in range(CLASSES)
        ]
        assert measured == MetricValues({}, {"val/it": Matrix(list("abcde"), counts)})

    def test_what_is_not_finite_is_left_out(self) -> None:
        """A correlation with a constant is 0 / 0."""
        metrics = built(Target("PearsonCorrCoef"))
        metrics.update(torch.ones(4), torch.arange(4.0))
        shares = [metrics.share()]
        with pytest.warns(UserWarning, match="variance"):
            assert metrics.compute(shares) == MetricValues()

    @pytest.mark.parametrize(
        ("classes", "names"),
        [(["cat", "dog"], ["cat", "dog"]), ([3, 8], ["3", "8"]), (["a", "a"], None), (None, None), ("abc", None)],
    )
    def test_names_of_classes(self, classes: Any, names: list[str] | None) -> None:
        class Dataset:
            pass

        dataset = Dataset()
        dataset.classes = classes  # type: ignore[attr-defined]
        assert class_names(dataset) == names
        assert class_names(object()) is None


class TestWrong:
    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (Target("MulticlasAccuracy", K), "metrics.it._target_ names nothing in torchmetrics or "),
            (Target("MulticlassAccuracy", K | {"topk": 5}), "metrics.it: MulticlassAccuracy raised ValueError: "),
            (Target("MulticlassConfusionMatrix"), "metrics.it.num_classes is missing: "),
            (Target("torch.nn.ReLU"), "metrics.it must be a torchmetrics.Metric, got ReLU of torch.nn.ReLU"),
            (
                Target("torchmetrics.MetricCollection", {"metrics": {"a": Target("torchmetrics.MeanMetric")}}),
                "metrics.it must be a torchmetrics.Metric, got MetricCollection",
            ),
            (
                Target("torchmetrics.wrappers.MinMaxMetric", {"base_metric": Target("torchmetrics.MeanMetric")}),
                "metrics.it must be a metric with states of its own, got the wrapper ",
            ),
        ],
        ids=name_of,
    )  # fmt: skip
    def test_a_description(self, target: Target, message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            built(target)
        assert str(caught.value).startswith(message)

    def test_the_nearest_name_is_named(self) -> None:
        with pytest.raises(DescriptionError, match="did you mean 'MulticlassAccuracy'"):
            built(Target("MulticlasAccuracy", K))

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (Target("MulticlassAccuracy", {"num_classes": 3}), "metrics.it: MulticlassAccuracy of output [6, 5] "),
            (here("Noise", shape=[2, 3]), "metrics.it must come to a number, one number per class, "),
            (here("Noise", shape=[2, 2, 2]), "metrics.it must come to a number, one number per class, "),
            (Target("MulticlassROC", K), "metrics.it must come to a number, one number per class, "),
        ],
        ids=name_of,
    )
    def test_a_trial(self, target: Target, message: str) -> None:
        with pytest.raises(DescriptionError) as caught:
            built(target).try_out(*batches_of(*classified())[0])
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)

    def test_what_needs_more_samples_than_a_trial_has_is_taken_for_a_number(self) -> None:
        metrics = built(Target("CalinskiHarabaszScore"))
        assert metrics.try_out(torch.randn(2, 3), torch.tensor([0, 0])) == {"val/it"}
