"""Image datasets that ready-made descriptions name: real digits, any image folder, synthetic images.

A dataset is a pure function of its arguments, and a sample of its index and of torch's, Python's and
numpy's random generators, which the launcher seeds for each sample. Nothing here knows of epochs,
shards or workers.

A transform sees an image before it is normalised: uint8 from an image folder (geometric transforms
are fastest on bytes), float32 in [0, 1] otherwise. What it returns is brought to float32 here, so
that a description needs no dtype, which YAML cannot name.
"""

import gzip
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from hashlib import sha256
from importlib.metadata import distribution
from math import isfinite
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

Transform = Callable[[Tensor], Tensor]
"""image_CHW -> image_CHW, possibly of another size."""

Split = Literal["train", "val"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What an image file's name ends with, in either case; files of other names are no images."""


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """A map-style dataset of (image, label): read, transform, bring to float32, normalise.

    Args:
        read: index -> image_CHW; uint8, or float32 in [0, 1].
        targets_N: The label of each sample, 64-bit integers.
        classes: The name of each label.
        transform: Applied to what ``read`` returns.
        mean: Subtracted from each channel of the float image; none: nothing is.
        std: Divides each channel after that; none: nothing is.
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
        self._mean_C11 = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self._std_C11 = None if std is None else torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image_CHW = self._read(index)
        if self._transform is not None:
            image_CHW = self._transform(image_CHW)
        if image_CHW.dtype == torch.uint8:
            image_CHW = image_CHW.to(torch.float32).div_(255)
        if self._mean_C11 is not None:
            image_CHW = image_CHW - self._mean_C11
        if self._std_C11 is not None:
            image_CHW = image_CHW / self._std_C11
        return image_CHW, int(self.targets[index])


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

    Every fifth scan, counted digit by digit, validates: both splits hold all digits alike, and the
    split depends on no random generator.

    Args:
        split: ``train`` or ``val``.
        transform: Applied to a float32 image in [0, 1].
        image_size: Side, in pixels, to which the 8x8 scans are resized.
        labels: ``digit``, ten classes; or ``parity``, whether it is even (0) or odd (1).
        mean: Of the one channel, subtracted from the image in [0, 1].
        std: Of the one channel, by which the difference is divided.

    Shapes:
        A sample is (image_1HW, label) with H = W = ``image_size``.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
    """
    _check_split(split)
    _check_per_channel(1, mean=mean, std=std)
    if labels not in ("digit", "parity"):
        raise ValueError(f"labels must be digit or parity, got {labels!r}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}; write a size such as 32")
    # The file itself: importing sklearn.datasets takes two seconds, in every worker and loader process.
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


def image_folder(
    root: str | os.PathLike[str],
    split: Split | None = None,
    transform: Transform | None = None,
    *,
    val_fraction: float = 0.1,
    num_classes: int | None = None,
    exclude: Collection[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LabelledImages:
    """Images of any size in one folder per class; labels count the folders in the order of their names.

    Where ``root`` holds both ``train/`` and ``val/``, those are the splits, and the labels of both come
    from the folders of ``train/``. Otherwise an image validates when the SHA-256 of its name within
    ``root`` says so: adding or removing images moves no other image across the split.

    Args:
        root: The folder; ``~`` is the home folder.
        split: ``train`` or ``val``; none takes all images of a root without splits.
        transform: Applied to a uint8 image.
        val_fraction: Share of the images that validate, in (0, 1); splits on disk do not heed it.
        num_classes: How many classes there must be; none: any number.
        exclude: Names of folders that are no classes, where there are such.
        mean: Of each of the three channels, subtracted from the image in [0, 1].
        std: Of each of the three channels, by which the difference is divided.

    Shapes:
        A sample is (image_3HW, label), float32.

    Raises:
        ValueError: There is no such folder, it holds no images, or not the classes that it should.
    """
    _check_split(split, None)
    _check_per_channel(3, mean=mean, std=std)
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}; write a share such as 0.1")
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of folder names, got {exclude!r}; write [{exclude}]")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"root must be a folder that holds a folder per class, got {str(root)!r}; it does not exist")
    split_on_disk = (folder / "train").is_dir() and (folder / "val").is_dir()
    if split_on_disk and split is None:
        raise ValueError(f"split must be train or val, got None; {folder} holds both as folders")

    classes = _class_names(folder / "train" if split_on_disk else folder, exclude)
    if num_classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"{folder} must hold num_classes={num_classes} classes, got {len(classes)}; set num_classes, "
            f"or name folders that are none in exclude: {_some(classes)}"
        )
    home = folder / str(split) if split_on_disk else folder
    may_lack_classes = split_on_disk and split == "val"
    strange = set(_class_names(home, exclude)) - set(classes)
    if strange:
        raise ValueError(f"{home} must hold classes of train/ only, got {_some(sorted(strange))}; move them there")

    names: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        own = _image_names(home, class_name)
        if not own and not may_lack_classes:
            raise ValueError(f"{home / class_name} must hold images, got none; add some, or name it in exclude")
        if split is not None and not split_on_disk:
            own = [name for name in own if _validates(name, val_fraction) == (split == "val")]
        names += own
        labels += [label] * len(own)
    if not names:
        raise ValueError(f"{home} must hold images for split={split}, got none; add some, or change val_fraction")
    # A block of bytes takes half the memory of a list of strings, and every loader process has its own.
    read = partial(_read_named, os.fsencode(home), np.array([os.fsencode(name) for name in names]))
    return LabelledImages(read, torch.tensor(labels), classes, transform, mean, std)


def synthetic_images(
    length: int, num_classes: int = 1000, image_size: int = 224, channels: int = 3, seed: int = 0
) -> LabelledImages:
    """Noise on a colour per class, for benchmarks: it costs next to nothing to make and can be learned.

    Args:
        length: Number of samples.
        num_classes: Number of labels; sample i has label i modulo this.
        image_size: Side of an image, in pixels.
        channels: Channels of an image.
        seed: Draws the noise and the colours.

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
    # Half of the range is the class's, half is noise.
    colours_KC11 = torch.rand(num_classes, channels, 1, 1, generator=generator) / 2
    noise_CHW = torch.rand(channels, image_size + 63, image_size + 63, generator=generator) / 2
    read = partial(_read_synthetic, colours_KC11, noise_CHW, image_size)
    targets_N = torch.arange(length) % num_classes
    return LabelledImages(read, targets_N, [str(label) for label in range(num_classes)])


def read_image(path: str | bytes | os.PathLike[str]) -> Tensor:
    """Decodes an image file of 8 bits a channel, turned upright; gray and palette become RGB, alpha is dropped.

    Pillow decodes, as ``torchvision.io.decode_image`` is deprecated since torchvision 0.29.

    Shapes:
        Returns image_3HW, uint8.

    Raises:
        ValueError: The file cannot be decoded; its name is in the message.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{os.fsdecode(path)}: must have 8 bits a channel, got {image.mode}; convert the file")
            ImageOps.exif_transpose(image, in_place=True)
            # A transparent palette goes to RGB by way of RGBA, or Pillow warns.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            return torch.from_numpy(np.array(opaque.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"{os.fsdecode(path)}: cannot be decoded, {error}; repair or remove the file") from error


def _read_row(images_NCHW: Tensor, index: int) -> Tensor:
    return images_NCHW[index]


def _read_named(home: bytes, names_N: np.ndarray, index: int) -> Tensor:
    return read_image(os.path.join(home, names_N[index]))


def _read_synthetic(colours_KC11: Tensor, noise_CHW: Tensor, size: int, index: int) -> Tensor:
    top, left = index % 64, index // 64 % 64  # 4,096 different windows onto the same noise
    return noise_CHW[:, top : top + size, left : left + size] + colours_KC11[index % len(colours_KC11)]


def _check_split(split: object, *also: object) -> None:
    if split not in ("train", "val", *also):
        raise ValueError(f"split must be train or val, got {split!r}")


def _check_per_channel(channels: int, **statistics: Sequence[float] | None) -> None:
    for name, values in statistics.items():
        if values is not None and (len(values) != channels or not all(map(isfinite, values))):
            raise ValueError(f"{name} must hold a finite number for each of {channels} channels, got {list(values)}")
    if not all(value > 0 for value in statistics["std"] or ()):
        raise ValueError(f"std must hold numbers above 0, got {list(statistics['std'] or ())}")


def _class_names(folder: Path, exclude: Collection[str]) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    classes = sorted(set(names) - set(exclude))
    if not classes:
        raise ValueError(f"{folder} must hold a folder of images per class, got no folder; name another root")
    return classes


def _image_names(home: Path, class_name: str) -> list[str]:
    """The images below a class's folder, as sorted names relative to ``home`` with forward slashes."""
    names = []
    for folder, _, files in os.walk(home / class_name, followlinks=True):
        within = Path(folder).relative_to(home).as_posix()
        names += [f"{within}/{file}" for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(names)


def _validates(name: str, val_fraction: float) -> bool:
    first_8_bytes = sha256(os.fsencode(name)).digest()[:8]
    return int.from_bytes(first_8_bytes) < val_fraction * 2**64


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
