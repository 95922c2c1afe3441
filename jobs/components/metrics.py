"""torchmetrics over a whole dataset, with the same bits for any number of workers.

torchmetrics reduces states process by process, so the last bits of a float depend on the number of processes. Here each
*batch* plays the role of a process: a metric is reset before each batch, exactly one worker has the batch, and the
metric's own reductions reduce the states of all batches in batch order. The batches do not depend on the workers, so
neither does the result.

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
from jobs.components.metric_values import Matrix, MetricValues
from jobs.components.targets import Builder
from jobs.data.loader import shape_of
from jobs.spec import Target

State = Tensor | list[Tensor]
"""One state of a metric, as ``Metric.add_state`` declares it."""

_BARE_NAMES = [
    torchmetrics, classification, regression, segmentation, clustering, nominal, image, audio, detection, text,
]  # fmt: skip
_SMALL = 2**16
"""Bytes of a state that stays on a GPU until all batches are measured, and is then copied with those of the others."""
_EXACT_ON_INTEGERS = (dim_zero_sum, dim_zero_max, dim_zero_min)
"""Reductions that are exact on integers, and so may be applied to some batches first."""


@dataclass(slots=True)
class PartialMetrics:
    """One worker's states of one metric, as they are sent to rank 0.

    Attributes:
        folded: Integer states, reduced over all batches of the worker.
        by_batch: The other states of each batch, in batch order. Until they are sent, those that have one size stay on
            the device; those that grow with the samples are in the memory of the host.
    """

    folded: dict[str, Tensor] = field(default_factory=dict)
    by_batch: list[dict[str, State]] = field(default_factory=list)


class MetricSet:
    """The metrics of a job.

    It knows no process group: every worker's ``share`` goes to rank 0, whose ``compute`` receives them all.
    """

    def __init__(self, metrics: Mapping[str, torchmetrics.Metric], classes: Sequence[str] | None = None) -> None:
        """Takes over the metrics.

        Args:
            metrics: The metrics by name.
            classes: The names of the dataset's classes, if it has any.
        """
        self._metrics = dict(metrics)
        self._classes = classes
        self._shares = {name: PartialMetrics() for name in metrics}
        for metric in self._metrics.values():
            metric.distributed_available_fn = _never  # otherwise compute() would gather the states of all processes

    def to(self, device: torch.device) -> "MetricSet":
        """Moves the metrics to the device of the outputs."""
        for metric in self._metrics.values():
            metric.to(device)
        return self

    def update(self, output: Any, target: Any) -> None:
        """Measures the next batch of this worker; waits for the GPU only if a metric does.

        Shapes: output and target as ``GlobalLoss.measured`` returns them.
        """
        for name, metric in self._metrics.items():
            _update(metric, output, target)
            _add(self._shares[name], metric)

    def pass_over(self) -> None:
        """Counts the next batch of this worker, which has no samples."""
        for share in self._shares.values():
            share.by_batch.append({})

    def share(self) -> dict[str, PartialMetrics]:
        """Returns the states of all batches since the last call, on the CPU, and starts again."""
        shares, self._shares = self._shares, {name: PartialMetrics() for name in self._metrics}
        for name, share in shares.items():
            _move_to_host(share, self._metrics[name].device)
        return shares

    def compute(self, shares: Sequence[Mapping[str, PartialMetrics]]) -> MetricValues:
        """Computes the metrics over the batches of all workers; leaves out values that are not finite.

        Args:
            shares: The share of every rank, in rank order; of W ranks, rank r measured batches r, r + W, r + 2W, ...
        """
        measured = MetricValues()
        for name, metric in self._metrics.items():
            result = _compute(metric, [of_rank[name] for of_rank in shares])
            measured |= _named(name, result, self._classes)
        return MetricValues(
            {name: value for name, value in measured.numbers.items() if math.isfinite(value)}, measured.matrices
        )

    def try_out(self, output: Any, target: Any) -> set[str]:
        """Measures one small batch for the dry run, and keeps nothing.

        Shapes: output and target as ``GlobalLoss.measured`` returns them.

        Returns:
            The names of the numbers that a validation will measure.

        Raises:
            DescriptionError: A metric does not accept the output and the target, or its result fits no row or matrix.
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
                with warnings.catch_warnings(action="ignore"):  # a few samples lack most classes
                    result = _compute(metric, [share])
            except Exception:  # some metrics need more samples or classes than the dry run has
                names.add(f"val/{name}")
                continue
            try:
                names |= _named(name, result, self._classes).numbers.keys()
            except TypeError as error:
                raise DescriptionError(f"metrics.{name} {error}") from error
        return names


def build_metrics(targets: Mapping[str, Target], builder: Builder, classes: Sequence[str] | None = None) -> MetricSet:
    """Builds the declared metrics; looks up bare names in torchmetrics and its domains.

    Args:
        targets: What to build, by the name of the metric.
        builder: Builds the targets.
        classes: The names of the dataset's classes, if it has any.

    Raises:
        DescriptionError: A name, an argument or its value is wrong, or the object is not a single metric.
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
    """Returns the names of a dataset's classes, if they are all different and in ``classes``, as in torchvision."""
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, (list, tuple)) or len({str(name) for name in classes}) < len(classes):
        return None
    return [str(name) for name in classes]


def _never() -> bool:
    return False


def _update(metric: torchmetrics.Metric, output: Any, target: Any) -> None:
    """Sets the metric's states to those of one batch, measured in float32 even if the forward pass has 16 bits."""
    metric.reset()
    if isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16):
        output = output.float()
    with torch.autocast(metric.device.type, enabled=False):
        metric.update(output, target)


def _add(share: PartialMetrics, metric: torchmetrics.Metric) -> None:
    """Adds copies of the metric's states, those of one batch, to the worker's share."""
    of_batch: dict[str, State] = {}
    for name, value in metric.metric_state.items():
        reduction: Any = metric._reductions[name]
        if isinstance(value, list):
            of_batch[name] = [_begin_copy_to_host(item) for item in value]
        elif reduction in _EXACT_ON_INTEGERS and not (value.is_floating_point() or value.is_complex()):
            parts = [share.folded[name], value] if name in share.folded else [value]
            share.folded[name] = reduction(torch.stack(parts))
        else:
            of_batch[name] = value.clone() if value.nbytes <= _SMALL else _begin_copy_to_host(value)
    share.by_batch.append(of_batch)


def _begin_copy_to_host(value: Tensor) -> Tensor:
    """Returns a copy on the CPU, which is complete once the GPU has done the work on its current stream."""
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)


def _move_to_host(share: PartialMetrics, device: torch.device) -> None:
    """Moves the states of a share to the CPU; waits for the copies under way."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    share.folded = {name: value.cpu() for name, value in share.folded.items()}
    with_samples = [of_batch for of_batch in share.by_batch if of_batch]
    kept = [
        name
        for of_batch in with_samples[:1]
        for name, value in of_batch.items()
        if isinstance(value, Tensor) and value.nbytes <= _SMALL
    ]
    for name in kept:
        on_host = torch.stack([of_batch[name] for of_batch in with_samples]).cpu()  # type: ignore[misc]  # no list
        for of_batch, value in zip(with_samples, on_host):
            of_batch[name] = value.clone()  # a view would be sent with the memory of all


def _compute(metric: torchmetrics.Metric, shares: Sequence[PartialMetrics]) -> Any:
    """Returns a metric's result from the shares of all ranks; uses the CPU, whose kernels repeat their bits.

    Source: torchmetrics ``Metric._sync_dist``, whose reduction this repeats.
    """
    in_order = [
        shares[number % len(shares)].by_batch[number // len(shares)]
        for number in range(sum(len(share.by_batch) for share in shares))
    ]
    batches = [of_batch for of_batch in in_order if of_batch]  # the others have no samples, or all states are folded
    total = metric.clone().to("cpu")
    for name, value in metric.metric_state.items():
        reduction: Any = metric._reductions[name]
        merged: Any
        if isinstance(value, list):
            merged = [item for of_batch in batches for item in of_batch[name]]
        elif any(name in share.folded for share in shares):
            merged = torch.stack([share.folded[name] for share in shares if name in share.folded])
        else:
            merged = torch.stack([of_batch[name] for of_batch in batches])  # type: ignore[misc]  # no list
        # An empty list stays as it is, as in torchmetrics.
        setattr(total, name, merged if reduction is None or len(merged) == 0 else reduction(merged))
    return total.compute()


def _named(name: str, result: Any, classes: Sequence[str] | None) -> MetricValues:
    """Splits a metric's result into named numbers, or returns it as a matrix.

    Shapes: a scalar, numbers per class [K], a matrix [K, K], or a mapping of these.

    Raises:
        TypeError: The result is of another kind.
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
    """Returns the names of ``count`` classes: those of the dataset if their number fits, else 0, 1, 2, ..."""
    return list(classes) if classes is not None and len(classes) == count else [str(number) for number in range(count)]
