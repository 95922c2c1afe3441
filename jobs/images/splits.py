"""Which samples of an index belong to a split, and that the splits of a job fit together."""

import math
import re
from typing import Any, Literal

import numpy as np

from cluster.errors import DescriptionError
from jobs.images.indexed_images import IndexedImages
from jobs.images.indexing.index import Index
from jobs.images.labelled_images import Split

SPLIT_WORDS: dict[str, Literal["train", "val", "test"]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""How names of files and folders say which split they hold, as Hugging Face's ``datasets`` reads them."""


def check_val_fraction(val_fraction: float) -> None:
    """Raises a ValueError unless a fraction leaves samples for both splits."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}; write a share such as 0.1")


def split_of(name: str) -> Literal["train", "val", "test"] | None:
    """Returns the split that the name of a file, or else that of a folder around it, says."""
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def drawn(index: Index, split: Split, val_fraction: float) -> np.ndarray:
    """Returns the samples of a split by the SHA-256 of names, so that no sample decides where another one is.

    ``Index.draws`` says which names.

    Shapes: int64 [chosen].

    Raises:
        ValueError: There is none.
    """
    is_val_N = index.draws < np.uint64(math.ceil(val_fraction * 2**64))
    chosen = np.flatnonzero(is_val_N if split == "val" else ~is_val_N)
    if not len(chosen):
        raise ValueError(
            f"{index.source.url}: none of its {len(index)} samples is drawn for split={split}; change val_fraction"
        )
    return chosen


def check_same_classes(train_set: Any, val_set: Any) -> None:
    """Raises a DescriptionError if a class has another number in ``data.val`` than in ``data.train``."""
    if not (isinstance(train_set, IndexedImages) and isinstance(val_set, IndexedImages)):
        return
    train, val = train_set.classes, val_set.classes
    if val != train[: len(val)]:
        number = next((n for n, (one, other) in enumerate(zip(train, val)) if one != other), min(len(train), len(val)))
        names = [repr(names[number]) if number < len(names) else "none" for names in (val, train)]
        raise DescriptionError(
            f"data.val: class {number} is {names[0]}, but {names[1]} in data.train; {_how_to_agree(train_set, val_set)}"
        )


def _how_to_agree(train_set: IndexedImages, val_set: IndexedImages) -> str:
    """Returns how to give two datasets the same classes: those of folders are their names."""
    folders = [each.index.source.format == "image_folder" for each in (train_set, val_set)]
    if all(folders):
        return (
            "give both one root that holds these folders as train/ and val/, with split: train and split: val, or name "
            "what is no class in exclude"
        )
    if any(folders):
        return f"write the names of the folders in {'data.val' if folders[0] else 'data.train'}: classes: [...]"
    longest = max(train_set.classes, val_set.classes, key=len)
    if longest == tuple(map(str, range(len(longest)))):
        return f"write their number in both: classes: {len(longest)}"
    return "write the same classes in both: classes: [...]"
