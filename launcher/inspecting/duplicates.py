"""Finds samples with equal content, within a dataset and in both: pure functions from digests to documents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.images.indexing.index import Index


@dataclass(frozen=True, slots=True)
class HashedDataset:
    """The samples of a dataset, and the digests of those that are whole."""

    index: Index
    numbers: np.ndarray
    """The number of each sample in the index. Shapes: int64 [samples]."""
    whole: np.ndarray
    """Shapes: RECORD [whole samples of the index]."""


def find_duplicates(datasets: Mapping[str, HashedDataset]) -> dict[str, Any]:
    """Return the document of all groups of samples whose encoded images are equal.

    Groups that lie in more than one dataset come first, because they make a validation look too good; then those with
    different labels; then the largest.

    Args:
        datasets: By split.
    """
    members = [_whole_samples(each) for each in datasets.values()]
    split_of = np.repeat(list(datasets), [len(own) for own in members])
    records = np.concatenate(members)
    _, content_of, copies = np.unique(records["sha256"], return_inverse=True, return_counts=True)
    copied = np.flatnonzero(copies[content_of] > 1)
    copied = copied[np.argsort(content_of[copied], kind="stable")]
    first_of_groups = np.flatnonzero(np.diff(content_of[copied], prepend=-1))
    groups = [_group(datasets, split_of[group], records[group]) for group in np.split(copied, first_of_groups)[1:]]
    groups.sort(key=lambda group: (not group["in_both"], not group["labels_differ"], -len(group["samples"])))
    return {
        "groups": len(groups),
        "samples": len(copied),
        "in_both": sum(group["in_both"] for group in groups),
        "labels_differ": sum(group["labels_differ"] for group in groups),
        "list": groups,
    }


def _whole_samples(dataset: HashedDataset) -> np.ndarray:
    """Return the records of the whole samples of a dataset by number. Shapes: RECORD [at most samples]."""
    own = dataset.whole[np.isin(dataset.whole["number"], dataset.numbers)]
    return own[np.argsort(own["number"], kind="stable")]


def _group(datasets: Mapping[str, HashedDataset], splits: np.ndarray, records: np.ndarray) -> dict[str, Any]:
    """Return the document of samples with the same content. Shapes: splits [n], records RECORD [n]."""
    samples = []
    for split, number in zip(splits.tolist(), records["number"].tolist()):
        index = datasets[split].index
        label = index.labels[number]
        named = index.classes[label] if index.classes else label.tolist()
        samples.append({"key": f"data.{split}", "url": index.url_of(number), "label": named})
    return {
        "sha256": records["sha256"][0].ljust(32, b"\0").hex(),  # numpy has cut zero bytes off
        "in_both": len(set(splits.tolist())) > 1,
        "labels_differ": any(sample["label"] != samples[0]["label"] for sample in samples),
        "samples": samples,
    }
