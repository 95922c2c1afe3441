"""The class of image datasets in memory, and what all image datasets do with an image.

A dataset is a pure function of its arguments. A sample is a function of its index and of torch's, Python's and numpy's
random generators, which the launcher seeds for each sample. Datasets know nothing of epochs, shards or workers.

A transform receives an image before it is normalised: uint8 from an image folder, because geometric transforms are
fastest on bytes, float32 in [0, 1] from other datasets. The dataset converts its result to float32, because YAML cannot
name a dtype.
"""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

Transform = Callable[[Tensor], Tensor]
"""Shapes: image_CHW -> image_CHW, possibly of another size."""

Split = Literal["train", "val"]


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """A map-style dataset of (image, label): reads, transforms, converts to float32, normalises.

    Args:
        read: index -> image_CHW, uint8 or float32 in [0, 1].
        targets_N: The label of each sample, int64.
        classes: The name of each label.
        transform: Applied to what ``read`` returns.
        mean: One number per channel to subtract from the float32 image, if given.
        std: One number per channel to divide by after that, if given.

    Shapes:
        A sample is (image_CHW, label), float32.
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        targets_N: Tensor,
        classes: Sequence[str],
        transform: Transform | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.targets = targets_N
        self.classes = tuple(classes)
        self._read = read
        self._transform = transform
        self.mean_C11, self.std_C11 = per_channel(mean), per_channel(std)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image_CHW = self._read(index)
        if self._transform is not None:
            image_CHW = self._transform(image_CHW)
        return normalised(image_CHW, self.mean_C11, self.std_C11), int(self.targets[index])


def normalised(image_CHW: Tensor, mean_C11: Tensor | None, std_C11: Tensor | None) -> Tensor:
    """Returns an image as float32, in [0, 1] if it was uint8, minus ``mean_C11`` and divided by ``std_C11``."""
    if image_CHW.dtype == torch.uint8:
        image_CHW = image_CHW.to(torch.float32).div_(255)
    if mean_C11 is not None:
        image_CHW = image_CHW - mean_C11
    return image_CHW if std_C11 is None else image_CHW / std_C11


def per_channel(values: Sequence[float] | None) -> Tensor | None:
    """Returns a number per channel as a tensor. Shapes: [C] -> [C, 1, 1]."""
    return None if values is None else torch.tensor(values).view(-1, 1, 1)


def check_split(split: object, *also: object) -> None:
    """Raises a ValueError unless ``split`` is ``train``, ``val`` or one of ``also``."""
    if split not in ("train", "val", *also):
        raise ValueError(f"split must be train or val, got {split!r}")


def check_per_channel(channels: int, **statistics: Sequence[float] | None) -> None:
    """Raises a ValueError unless each of ``mean`` and ``std`` is None or has a valid number for each channel."""
    for name, values in statistics.items():
        if values is not None and (len(values) != channels or not all(map(isfinite, values))):
            raise ValueError(f"{name} must hold a finite number for each of {channels} channels, got {list(values)}")
    if not all(value > 0 for value in statistics["std"] or ()):
        raise ValueError(f"std must hold numbers above 0, got {list(statistics['std'] or ())}")
