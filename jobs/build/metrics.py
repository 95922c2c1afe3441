"""Metrics of torchmetrics over a whole dataset, with the same bits for any number of workers.

torchmetrics adds states up process by process, so that the last bits of a float depend on how many there are.
Here every *batch* is what a process is there: a metric is reset before each batch, which exactly one worker has,
and the states of all batches are reduced in the order of the batches by the metric's own reductions. Batches do
not depend on the workers; so neither does what is computed from them.

Importing this module imports torchmetrics, which takes a second or two; only jobs that declare metrics do.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torchmetrics import audio, classification, clustering, detection, image, nominal, regression, segmentation, text
from torchmetrics.utilities import dim_zero_max, dim_zero_min, dim_zero_sum

from cluster.errors import DescriptionError, one_line
from jobs.data.loader import shape_of
from jobs.build.metric_values import Matrix, MetricValues
from jobs.spec import Target
from jobs.build.targets import Builder

State = Tensor | list[Tensor]
"""One state of a metric, as ``Metric.add_state`` declares them."""

_BARE_NAMES = [
    torchmetrics, classification, regression, segmentation, clustering, nominal, image, audio, detection, text,
]  # fmt: skip
_IN_ANY_GROUPING = (dim_zero_sum, dim_zero_max, dim_zero_min)
"""Reductions that may be taken of parts first, where they are exact: of integers."""


@dataclass(slots=True)
class PartialMetrics:
    """What the batches of one worker add to one metric; travels between processes.

    Attributes:
        folded: States of integers, over all batches of the worker.
        by_batch: The other states, batch by batch.
    """

    folded: dict[str, Tensor] = field(default_factory=dict)
    by_batch: list[dict[str, State]] = field(default_factory=list)


class MetricSet:
    """The metrics of a job. Knows no process group: shares leave it on every worker and meet in one of them."""

    def __init__(self, metrics: Mapping[str, torchmetrics.Metric], classes: Sequence[str] | None = None) -> None:
        """Takes over the metrics; ``classes``: the names of the dataset's classes, if it has any."""
        self._metrics = dict(metrics)
        self._classes = classes
        self._shares = {name: PartialMetrics() for name in metrics}
        for metric in self._metrics.values():
            metric.distributed_available_fn = _never  # compute() would ask all processes for their states

    def to(self, device: torch.device) -> "MetricSet":
        """Moves the metrics, to where outputs are."""
        for metric in self._metrics.values():
            metric.to(device)
        return self

    def update(self, output: Any, target: Any) -> None:
        """Takes the next batch of this worker."""
        for name, metric in self._metrics.items():
            _update(metric, output, target)
            _add(self._shares[name], metric)

    def share(self) -> dict[str, PartialMetrics]:
        """What came of the batches since the last call, on the CPU."""
        shares, self._shares = self._shares, {name: PartialMetrics() for name in self._metrics}
        for share in shares.values():
            share.folded = {state: value.cpu() for state, value in share.folded.items()}
        return shares

    def compute(self, shares: Sequence[Mapping[str, PartialMetrics]]) -> MetricValues:
        """The metrics over the batches of all workers; a value that is not finite is left out.

        Args:
            shares: Of every rank, in rank order; rank r has had the batches r, r + W, r + 2W, ...
        """
        measured = MetricValues()
        for name, metric in self._metrics.items():
            result = _compute(metric, [of_rank[name] for of_rank in shares])
            measured |= _named(name, result, self._classes)
        return MetricValues(
            {name: value for name, value in measured.numbers.items() if math.isfinite(value)}, measured.matrices
        )

    def try_out(self, output: Any, target: Any) -> set[str]:
        """Measures one small batch, and forgets it.

        Returns:
            The names of the numbers that a validation will come to.

        Raises:
            DescriptionError: A metric does not take such outputs and targets, or comes to what no row can hold.
        """
        names: set[str] = set()
        for name, metric in self._metrics.items():
            try:
                _update(metric, output, target)
            except Exception as error:  # torchmetrics raises several kinds, and a metric may be the user's own
                raise DescriptionError(
                    f"metrics.{name}: {type(metric).__name__} of output {shape_of(output)} and target "
                    f"{shape_of(target)} raised {type(error).__name__}: {one_line(error)}; "
                    "make metric, model and data.val fit"
                ) from error
            share = PartialMetrics()
            _add(share, metric)
            try:
                with warnings.catch_warnings(action="ignore"):  # much is missing from a few samples
                    result = _compute(metric, [share])
            except Exception:  # some need more samples than a trial has, or of more classes
                names.add(f"val/{name}")
                continue
            try:
                names |= _named(name, result, self._classes).numbers.keys()
            except TypeError as error:
                raise DescriptionError(f"metrics.{name} {error}") from error
        return names


def build_metrics(targets: Mapping[str, Target], builder: Builder, classes: Sequence[str] | None = None) -> MetricSet:
    """A bare name is looked up in torchmetrics and its domains.

    Raises:
        DescriptionError: A name, an argument or its value is wrong, or it is no single metric.
    """
    metrics = {}
    for name, target in targets.items():
        key = f"metrics.{name}"
        metric = builder.build(target, key, bare_names=_BARE_NAMES)
        if not isinstance(metric, torchmetrics.Metric):
            raise DescriptionError(f"{key} must be a torchmetrics.Metric, got {type(metric).__name__} of {target.path}")
        inner = [part for part in metric.modules() if part is not metric and isinstance(part, torchmetrics.Metric)]
        if inner or not metric.metric_state:
            raise DescriptionError(
                f"{key} must be a metric with states of its own, got the wrapper {target.path}; "
                "declare each metric by itself"
            )
        metrics[name] = metric
    return MetricSet(metrics, classes)


def class_names(dataset: Any) -> list[str] | None:
    """The names of a dataset's classes, if it has them as torchvision's have, and no two are the same."""
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, (list, tuple)) or len({str(name) for name in classes}) < len(classes):
        return None
    return [str(name) for name in classes]


def _never() -> bool:
    return False


def _update(metric: torchmetrics.Metric, output: Any, target: Any) -> None:
    """Gives the metric the states of one batch alone. Measured in full precision, whatever the forward pass has."""
    metric.reset()
    if isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16):
        output = output.float()
    with torch.autocast(metric.device.type, enabled=False):
        metric.update(output, target)


def _add(share: PartialMetrics, metric: torchmetrics.Metric) -> None:
    """Adds the states of a batch, as copies: the metric goes on with its own."""
    of_batch: dict[str, State] = {}
    for name, value in metric.metric_state.items():
        reduction: Any = metric._reductions[name]
        if isinstance(value, list):
            of_batch[name] = [item.to("cpu", copy=True) for item in value]
        elif reduction in _IN_ANY_GROUPING and not (value.is_floating_point() or value.is_complex()):
            parts = [share.folded[name], value] if name in share.folded else [value]
            share.folded[name] = reduction(torch.stack(parts))
        else:
            of_batch[name] = value.to("cpu", copy=True)
    share.by_batch.append(of_batch)


def _compute(metric: torchmetrics.Metric, shares: Sequence[PartialMetrics]) -> Any:
    """Computes from the shares of all ranks, on the CPU, whose kernels give the same bits every time.

    Source: torchmetrics ``Metric._sync_dist``, of which this is the reduction.
    """
    batches = [
        shares[number % len(shares)].by_batch[number // len(shares)]
        for number in range(sum(len(share.by_batch) for share in shares))
    ]
    total = metric.clone().to("cpu")
    for name, value in metric.metric_state.items():
        reduction: Any = metric._reductions[name]
        merged: Any
        if isinstance(value, list):
            merged = [item for of_batch in batches for item in of_batch[name]]
        elif name in shares[0].folded:
            merged = torch.stack([share.folded[name] for share in shares if name in share.folded])
        else:
            merged = torch.stack([of_batch[name] for of_batch in batches])  # type: ignore[misc]  # no list
        # A list without items has nothing to reduce, and torchmetrics leaves it as it is too.
        setattr(total, name, merged if reduction is None or len(merged) == 0 else reduction(merged))
    return total.compute()


def _named(name: str, result: Any, classes: Sequence[str] | None) -> MetricValues:
    """Takes a result apart into numbers that have names, or a matrix.

    Raises:
        TypeError: It is none of the kinds that a row or a picture can show.
    """
    if isinstance(result, Mapping):
        measured = MetricValues()
        for key, value in result.items():
            measured |= _named(f"{name}/{key}", value, classes)
        return measured
    if isinstance(result, (int, float)):
        return MetricValues({f"val/{name}": float(result)})
    if isinstance(result, Tensor) and result.numel() == 1:
        return MetricValues({f"val/{name}": float(result)})
    if isinstance(result, Tensor) and result.dim() == 1:
        return MetricValues(
            {f"val/{name}/{of}": float(value) for of, value in zip(_labels(len(result), classes), result.tolist())}
        )
    if isinstance(result, Tensor) and result.dim() == 2 and result.shape[0] == result.shape[1]:
        rows = [[value if math.isfinite(value) else None for value in row] for row in result.tolist()]
        return MetricValues(matrices={f"val/{name}": Matrix(_labels(len(rows), classes), rows)})
    raise TypeError(
        f"must come to a number, one number per class, a mapping of those, or a square matrix, got {shape_of(result)}; "
        "declare another metric, or another average of this one"
    )


def _labels(count: int, classes: Sequence[str] | None) -> list[str]:
    return list(classes) if classes is not None and len(classes) == count else [str(number) for number in range(count)]
