"""Image folders: a dataset of image files, one folder per class, on this machine or at any URL."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cluster.errors import listed
from cluster.storage.store import Store
from cluster.storage.stored_objects import StoredObject
from jobs.images.folders.class_folders import FOLDERS, IMAGE_SUFFIXES, LocalFolders
from jobs.images.folders.stored_class_folders import StoredFolders
from jobs.images.indexed_images import IndexedImages, read_ranges
from jobs.images.indexing.index import Index, IndexBuilder, Source
from jobs.images.indexing.index_files import open_index
from jobs.images.labelled_images import Split, Transform, check_per_channel, check_split
from jobs.images.splits import SPLIT_WORDS, check_val_fraction, drawn

_ADDED_AT_ONCE = 2**12
"""Images that are added to an index together."""


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
) -> IndexedImages:
    """A folder of images of any size, with one folder per class; labels number the classes by name, from 0.

    If ``root`` holds both ``train/`` and ``val/``, these are the splits, and the classes of both are the folders of
    ``train/``. Otherwise the SHA-256 of an image's name within ``root`` decides its split, so adding or removing images
    moves no other image to the other split.

    Hidden files and folders are passed over at every depth, and so are folders that systems leave, such as
    ``__MACOSX`` or ``lost+found``. On this machine links are followed, and a folder that several paths lead to counts
    once; SFTP follows links to files only.

    The folder is listed once, whatever the splits: they share an index.

    Args:
        root: The folder: a path, in which ``~`` is the home folder, or a URL such as ``s3://bucket/images``.
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
        StorageError: The URL is wrong, or its store does not answer.
    """
    check_split(split, None)
    check_per_channel(3, mean=mean, std=std)
    check_val_fraction(val_fraction)
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of folder names, got {exclude!r}; write [{exclude}]")
    url = Store(os.fspath(root)).url
    if os.path.isabs(url) and not os.path.isdir(url):
        raise ValueError(f"root must be a folder that holds a folder per class, got {str(root)!r}; it does not exist")
    left_out = sorted({str(name) for name in exclude})
    options = {"exclude": left_out, "suffixes": list(IMAGE_SUFFIXES)}
    index = open_index(Source("image_folder", url, options), partial(_build, left_out))
    divided = {name: range(*ends) for name, ends in index.details["splits"].items()}
    if divided and split is None:
        raise ValueError(f"split must be train or val, got None; {url} holds both as folders")
    _check_classes(index, url, divided, split, num_classes)
    chosen_N: np.ndarray | range | None = None
    if split is not None:
        chosen_N = divided[split] if divided else drawn(index, split, val_fraction)
    return IndexedImages(index, read_ranges, chosen_N, transform, mean, std)


def _check_classes(
    index: Index, url: str, divided: Mapping[str, range], split: Split | None, num_classes: int | None
) -> None:
    """Raises a ValueError unless a split has the classes that it must have, each with images."""
    classes = index.classes
    if num_classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"{url} must hold num_classes={num_classes} classes, got {len(classes)}; set num_classes, "
            f"or name folders that are none in exclude: {listed(classes)}"
        )
    if divided and split == "val":
        if strange := index.details["only_in_val"]:
            raise ValueError(f"{url}/val must hold classes of train/ only, got {listed(strange)}; move them there")
        if not divided["val"]:
            raise ValueError(f"{url}/val must hold images, got none; add some")
        return
    labels_N = index.labels[: divided["train"].stop] if divided else index.labels
    empty = np.flatnonzero(np.bincount(labels_N, minlength=len(classes)) == 0)
    if len(empty):
        folder = f"{url}/train/{classes[empty[0]]}" if divided else f"{url}/{classes[empty[0]]}"
        raise ValueError(f"{folder} must hold images, got none; add some, or name it in exclude")


def _build(exclude: Sequence[str], store: Store, builder: IndexBuilder) -> None:
    """Adds the images of all class folders, those of train/ before those of val/, class by class.

    Raises:
        ValueError: The folder is empty or cannot be read, or has no class; a link leads nowhere; or two classes have
            the same folder.
        StorageError: The store does not answer.
    """
    url = store.url
    folders: LocalFolders | StoredFolders
    if os.path.isabs(url):
        folders = LocalFolders(Path(url), exclude, builder.pass_over, builder.progress)
    else:
        folders = StoredFolders(store, exclude, builder.pass_over, builder.progress)
        if folders.is_empty:
            raise ValueError(f"root must be a folder that holds a folder per class, got {url!r}; it does not exist")
    is_divided = folders.has("train") and folders.has("val")
    home = "train/" if is_divided else ""
    classes = folders.class_names(home)
    where = f"{url}/{home}".rstrip("/")
    if not classes:
        raise ValueError(f"{where} must hold a folder of images per class, got no folder; name another root")
    if not is_divided and all(name.lower() in SPLIT_WORDS for name in classes):
        raise ValueError(
            f"{url} must hold train/ and val/, or a folder per class, got {listed(classes)}; rename those, or "
            "name one of them as root"
        )
    builder.classes = classes
    labels = {name: label for label, name in enumerate(classes)}
    in_val = folders.class_names("val/") if is_divided else []
    known_in_val = [name for name in in_val if name in labels]
    builder.progress.expect(len(classes) + len(known_in_val), FOLDERS)
    _add(builder, labels, folders.images(home, classes))
    builder.details = {"splits": {}, "only_in_val": []}
    if is_divided:
        num_train = builder.num_samples
        _add(builder, labels, folders.images("val/", known_in_val))
        builder.details = {
            "splits": {"train": [0, num_train], "val": [num_train, builder.num_samples]},
            "only_in_val": [name for name in in_val if name not in labels],
        }


def _add(builder: IndexBuilder, labels: Mapping[str, int], found: Iterable[tuple[str, Sequence[StoredObject]]]) -> None:
    """Adds images, with their classes, in the order of classes and of names; an index of few names has few parts."""
    first, waiting = builder.num_samples, list[tuple[str, int, str, int]]()

    def add() -> None:
        if waiting:
            builder.add_files(*zip(*waiting))
            waiting.clear()

    for class_name, images in found:
        for image in images:
            waiting.append((image.name, image.size, image.version, labels[class_name]))
            if len(waiting) == _ADDED_AT_ONCE:
                add()
    add()
    builder.sort_files(first)
