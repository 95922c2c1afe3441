"""What the command asks of the process that reads the data, and what that answers; without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.spec import JobSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The content of the task of the process that builds the datasets."""

    spec: JobSpec
    splits: tuple[Literal["train", "val"], ...]
    """Of ``train`` and ``val``."""
    num_sampled: int
    """How many samples of each to read."""
    with_samples: bool
    """Say where the samples of each lie, as far as an index lists them."""
    with_sheet: bool
    """Draw samples of ``train`` as training gets them, too."""


@dataclass(frozen=True, slots=True)
class IndexReader:
    """How to read samples, for processes without the dataset."""

    index_path: Path
    read: bytes
    """A pickle of the function that reads them, a ``ReadSamples``: only those processes import what it needs."""


@dataclass(frozen=True, slots=True)
class IndexedSamples:
    """The samples of a dataset that lie in an index."""

    reader: IndexReader
    numbers: np.ndarray
    """The number of each sample in the index. Shapes: int64 [samples]."""


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What is known of a dataset without reading all of it."""

    document: dict[str, Any]
    """For ``--json``, see ``launcher.inspecting.summary``."""
    indexed: IndexedSamples | None
    """None: it has no index, so nobody knows where its samples lie; or that was not asked."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A sample of a contact sheet."""

    pixels: np.ndarray | None
    """None: the sample cannot be read. Shapes: uint8 [H, W, 3]."""
    caption: str
    """Its class, or its target in short."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """The first samples of a run, as its first steps get them."""

    tiles: tuple[Tile, ...]
    numbers: tuple[int, ...]
    """Of the samples in the dataset."""
    last_step: int
    """The step that the last of them belongs to, from 1."""
    scaling: str
    """How values became pixels."""
    broken: tuple[dict[str, str], ...]
    """``url`` and ``problem`` of the samples that are broken."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the process that builds the datasets has found."""

    datasets: Mapping[str, DatasetFacts] = field(default_factory=dict)
    """By split."""
    sheet: Sheet | None = None
