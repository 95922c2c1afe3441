"""Image folders: a dataset of image files, one folder per class."""

import os
from collections.abc import Collection, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.images.class_folders import class_names, image_names
from jobs.images.decoding import read_image
from jobs.images.labelled_images import LabelledImages, Split, Transform, check_per_channel, check_split

_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")
"""Names of folders that hold a split. A root with no others has no class folders."""


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
    """A folder of images of any size, with one folder per class; labels number the classes by name, from 0.

    If ``root`` holds both ``train/`` and ``val/``, these are the splits, and the classes of both are the folders of
    ``train/``. Otherwise the SHA-256 of an image's name within ``root`` decides its split, so adding or removing images
    moves no other image to the other split.

    Hidden files and folders are passed over at every depth, and so are folders that systems leave, such as
    ``__MACOSX`` or ``lost+found``. Links are followed; a folder that several paths lead to counts once.

    Args:
        root: The folder; ``~`` is the home folder.
        split: ``train`` or ``val``; None takes all images of a root without splits.
        transform: Applied to a uint8 image_3HW.
        val_fraction: The fraction of images in ``val``, in (0, 1); ignored if ``root`` holds the splits.
        num_classes: The number of classes that there must be; None: any number.
        exclude: Names of folders that are not classes.
        mean: One number for each of the three channels, subtracted from the image in [0, 1].
        std: One number for each of the three channels, which divides the difference.

    Shapes:
        A sample is (image_3HW, label), float32.

    Raises:
        ValueError: The folder does not exist, cannot be read, or lacks images, classes or a split; a link leads
            nowhere; two classes have the same folder; or an argument is wrong.
    """
    check_split(split, None)
    check_per_channel(3, mean=mean, std=std)
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

    classes = class_names(folder / "train" if split_on_disk else folder, exclude)
    if not split_on_disk and all(name.lower() in _SPLITS for name in classes):
        raise ValueError(
            f"{folder} must hold train/ and val/, or a folder per class, got {_first_names(classes)}; rename those, or "
            "name one of them as root"
        )
    if num_classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"{folder} must hold num_classes={num_classes} classes, got {len(classes)}; set num_classes, "
            f"or name folders that are none in exclude: {_first_names(classes)}"
        )
    home = folder / str(split) if split_on_disk else folder
    may_lack_classes = split_on_disk and split == "val"
    present = class_names(home, exclude)
    strange = set(present) - set(classes)
    if strange:
        raise ValueError(
            f"{home} must hold classes of train/ only, got {_first_names(sorted(strange))}; move them there"
        )

    names: list[str] = []
    labels: list[int] = []
    images = image_names(home, present)
    for label, class_name in enumerate(classes):
        own = images.get(class_name, [])
        if not own and not may_lack_classes:
            raise ValueError(f"{home / class_name} must hold images, got none; add some, or name it in exclude")
        if split is not None and not split_on_disk:
            own = [name for name in own if _validates(name, val_fraction) == (split == "val")]
        names += own
        labels += [label] * len(own)
    if not names:
        raise ValueError(f"{home} must hold images for split={split}, got none; add some, or change val_fraction")
    # An array of bytes takes half the memory of a list of strings, and every loader process has a copy.
    read = partial(_read_named, os.fsencode(home), np.array([os.fsencode(name) for name in names]))
    return LabelledImages(read, torch.tensor(labels), classes, transform, mean, std)


def _read_named(home: bytes, names_N: np.ndarray, index: int) -> Tensor:
    return read_image(os.path.join(home, names_N[index]))


def _validates(name: str, val_fraction: float) -> bool:
    """Returns whether an image belongs to ``val``, by the SHA-256 of its name."""
    first_8_bytes = sha256(os.fsencode(name)).digest()[:8]
    return int.from_bytes(first_8_bytes) < val_fraction * 2**64


def _first_names(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
