"""Which samples of an index belong to a split."""

import math

import numpy as np

from jobs.images.index import Index
from jobs.images.labelled_images import Split


def check_val_fraction(val_fraction: float) -> None:
    """Raises a ValueError unless a fraction leaves samples for both splits."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}; write a share such as 0.1")


def drawn(index: Index, split: Split, val_fraction: float) -> np.ndarray:
    """Returns the samples of a split by the SHA-256 of their names, so that no sample decides where another one is.

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
