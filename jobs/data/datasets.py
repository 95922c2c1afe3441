"""Datasets that need no files of the user: handwritten digits and synthetic images."""

import gzip
from collections.abc import Sequence
from functools import partial
from importlib.metadata import distribution
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from jobs.images.labelled_images import LabelledImages, Split, Transform, check_per_channel, check_split


def digits(
    split: Split,
    transform: Transform | None = None,
    image_size: int = 32,
    *,
    labels: Literal["digit", "parity"] = "digit",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LabelledImages:
    """The 1,797 scans of handwritten digits that scikit-learn ships: 1,437 to train, 360 to validate.

    Every fifth scan of each digit belongs to ``val``, so both splits hold the digits in equal proportions, and the
    split depends on no random generator.

    Args:
        split: ``train`` or ``val``.
        transform: Applied to a float32 image_1HW in [0, 1].
        image_size: The side in pixels to which the 8x8 scans are resized.
        labels: ``digit``: ten classes; ``parity``: even (0) or odd (1).
        mean: One number, subtracted from the image in [0, 1].
        std: One number, which divides the difference.

    Shapes:
        A sample is (image_1HW, label), float32, with H = W = ``image_size``.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
    """
    check_split(split)
    check_per_channel(1, mean=mean, std=std)
    if labels not in ("digit", "parity"):
        raise ValueError(f"labels must be digit or parity, got {labels!r}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}; write a size such as 32")
    # Read the file directly: importing sklearn.datasets takes two seconds in every worker and loader process.
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    with gzip.open(str(path), "rt") as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))
    scans_N188, targets_N = rows[:, :-1].view(-1, 1, 8, 8) / 16, rows[:, -1]

    validates_N = torch.zeros(len(targets_N), dtype=torch.bool)
    validates_N[torch.argsort(targets_N, stable=True)[::5]] = True
    chosen_N = validates_N if split == "val" else ~validates_N
    images_N1HW = interpolate(scans_N188[chosen_N], size=(image_size, image_size), mode="bilinear")
    read = partial(_read_row, images_N1HW)
    if labels == "parity":
        return LabelledImages(read, targets_N[chosen_N] % 2, ("even", "odd"), transform, mean, std)
    return LabelledImages(read, targets_N[chosen_N], "0123456789", transform, mean, std)


def synthetic_images(
    length: int, num_classes: int = 1000, image_size: int = 224, channels: int = 3, seed: int = 0
) -> LabelledImages:
    """Noise on one colour per class, for benchmarks: cheap to compute, and it can be learned.

    Args:
        length: Number of samples.
        num_classes: Number of labels; sample i has label i modulo ``num_classes``.
        image_size: The side of an image in pixels.
        channels: Number of channels of an image.
        seed: Seeds the noise and the colours.

    Shapes:
        A sample is (image_CHW, label) with C = ``channels``, H = W = ``image_size``, float32 in [0, 1].
    """
    for name, value in (
        ("length", length),
        ("num_classes", num_classes),
        ("image_size", image_size),
        ("channels", channels),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    generator = torch.Generator().manual_seed(seed)
    # Class colour and noise each span half of the range.
    colours_KC11 = torch.rand(num_classes, channels, 1, 1, generator=generator) / 2
    noise_CHW = torch.rand(channels, image_size + 63, image_size + 63, generator=generator) / 2
    read = partial(_read_synthetic, colours_KC11, noise_CHW, image_size)
    targets_N = torch.arange(length) % num_classes
    return LabelledImages(read, targets_N, [str(label) for label in range(num_classes)])


def _read_row(images_NCHW: Tensor, index: int) -> Tensor:
    return images_NCHW[index]


def _read_synthetic(colours_KC11: Tensor, noise_CHW: Tensor, size: int, index: int) -> Tensor:
    top, left = index % 64, index // 64 % 64  # one of 4,096 windows of the same noise
    return noise_CHW[:, top : top + size, left : left + size] + colours_KC11[index % len(colours_KC11)]
