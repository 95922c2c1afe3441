"""The documents of datasets: pure functions from an index, labels and inspected samples to plain values."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.images.indexing.index import Index
from launcher.planning.built_index import place_of

if TYPE_CHECKING:
    from jobs.images.inspection import ImageFacts  # it imports torch, and the command must not

_QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


@dataclass(frozen=True, slots=True)
class InspectedImage:
    """An encoded image that was read."""

    number: int
    """Of the sample in its index."""
    num_bytes: int
    facts: "ImageFacts | None"
    """None: its header cannot be read, or it is not there."""
    problem: str | None = None
    """Why it cannot be decoded; None: it can."""


def summarise_index(index: Index, numbers: np.ndarray, inspected: Sequence[InspectedImage]) -> dict[str, Any]:
    """Return the document of a dataset whose samples lie in an index.

    Args:
        index: The index.
        numbers: The number of each sample in it.
        inspected: Some of the samples.

    Shapes: numbers int64 [samples].
    """
    source, labels = index.source, index.labels[numbers]
    return {
        "source": {
            "format": source.format,
            "url": source.url,
            "place": place_of(source),
            "options": dict(source.options),
        },  # fmt: skip
        "samples": len(numbers),
        **summarise_labels(labels, index.classes),
        "passed_over": {
            reason: {"count": count, "first": first} for reason, (count, first) in sorted(index.passed_over.items())
        },
        "sampled": summarise_images(index, inspected),
        "shapes": None,
    }


def summarise_images(index: Index, inspected: Sequence[InspectedImage]) -> dict[str, Any]:
    """Return the document of images that were read: quantiles of their sizes, formats, modes, and what is broken."""
    images = [each.facts for each in inspected if each.facts is not None]
    return {
        "samples": len(inspected),
        "bytes": _quantiles(each.num_bytes for each in inspected if each.facts is not None),
        "width": _quantiles(facts.width for facts in images),
        "height": _quantiles(facts.height for facts in images),
        "formats": _counts(facts.format for facts in images),
        "modes": _counts(facts.mode for facts in images),
        "with_frames": sum(facts.num_frames > 1 for facts in images),
        "rotated": sum(facts.is_rotated for facts in images),
        "broken": broken_samples(index, {each.number: each.problem for each in inspected if each.problem}),
    }


def broken_samples(index: Index, problems: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the document of broken samples, in the order of the index.

    Args:
        index: The index that they lie in.
        problems: By their numbers, what is wrong with them.
    """
    return [{"url": index.url_of(number), "problem": problem} for number, problem in sorted(problems.items())]


def summarise_labels(labels: np.ndarray | None, names: Sequence[str] | None) -> dict[str, Any]:
    """Return ``classes``, ``imbalance`` and ``targets`` of a dataset; what does not apply is None.

    Args:
        labels: Of each sample; None: they are not listed.
        names: Of the classes; None or empty: they have none.

    Shapes: labels integers [samples], or numbers [samples, ...].
    """
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iub":
        targets = None if labels is None or not labels.size else _range(labels)
        return {"classes": None, "imbalance": None, "targets": targets}
    values, counts = np.unique(labels, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist()))
    known = {label: str(name) for label, name in enumerate(names or ())}
    classes = [
        {"name": known.get(label, str(label)), "count": found.get(label, 0)} for label in sorted({*known, *found})
    ]
    smallest, largest = (pick((each["count"] for each in classes), default=0) for pick in (min, max))
    return {"classes": classes, "imbalance": largest / smallest if smallest else None, "targets": None}


def _range(labels: np.ndarray) -> dict[str, Any]:
    return {
        "shape": list(labels.shape[1:]),
        "type": str(labels.dtype),
        "min": float(labels.min()),
        "mean": float(labels.mean()),
        "max": float(labels.max()),
    }


def _quantiles(values: Iterable[int]) -> dict[str, float] | None:
    numbers = list(values)
    if not numbers:
        return None
    return dict(zip(_QUANTILES, np.quantile(numbers, list(_QUANTILES.values())).tolist()))


def _counts(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value occurs, the most frequent first."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
