"""Parquet files with the bytes of images, as Hugging Face's ``datasets`` and others write them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.storage.store import MissingObject, Store
from cluster.storage.stored_objects import StoredObject
from jobs.images.indexed_images import IndexedImages
from jobs.images.indexing.index import Index, IndexBuilder, Source
from jobs.images.indexing.index_files import open_index
from jobs.images.indexing.listing_progress import ListingProgress
from jobs.images.labelled_images import Split, Transform, check_per_channel, check_split
from jobs.images.object_urls import ObjectKind, find_objects, split_urls
from jobs.images.splits import check_val_fraction, drawn, split_of
from jobs.images.tables.parquet_columns import Footer, decode_chunks, read_columns, read_footers
from jobs.images.tables.row_groups import ReadRowGroups, image_column, image_leaf
from jobs.images.tables.table_labels import LabelColumns, labels_of

_FILES = ObjectKind(name="Parquet file", suffixes=(".parquet", ".pq"), hidden=(".", "_"), is_below=True)
"""What is hidden is so for Spark and pyarrow too."""
_SPLITS = "splits"
"""In the details of an index: the first sample of each split, and the one behind its last, where names of files say
them. Files of train alone are divided further."""
_AT_ONCE = 32
"""Files whose footers and labels are read together."""


def parquet_images(
    urls: str | os.PathLike[str] | Sequence[str],
    split: Split | None = None,
    transform: Transform | None = None,
    *,
    image: str = "image",
    label: str | Sequence[str] = "label",
    classes: int | Sequence[str] | None = None,
    val_fraction: float = 0.1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> IndexedImages:
    """Images in Parquet files, at any URL.

    If names of files say which hold ``train`` and which ``val`` (or ``validation``, ``valid``, ``dev``), as in
    ``train-00000-of-00002.parquet`` or ``validation/0.parquet``, these are the splits, and files of a test split are
    passed over. Otherwise, also if all files are of ``train``, the SHA-256 of the file's name, without its folders, and
    the number of the row decides the split of an image.

    Args:
        urls: A file, a folder (with all below it), names with braces (``train-{00000..00009}.parquet``), a pattern such
            as ``s3://bucket/data/**/train-*.parquet``, or a list of these; all in one bucket.
        split: ``train`` or ``val``; None takes all images of files without splits.
        transform: Applied to a uint8 image_3HW.
        image: The column of images: bytes, or a struct with a field ``bytes``.
        label: The column of labels: whole numbers or names of classes, or numbers to predict. A list of columns holds
            numbers to predict.
        classes: The names of the classes, which may give those of ``datasets`` another order, or their number; None:
            those that ``datasets`` wrote, else the sorted names that occur, else ``0`` to the largest number. Give them
            if train and val are separate files that are named one by one, and a name may occur in one only.
        val_fraction: The fraction of images in ``val``, in (0, 1); ignored if names say the splits.
        mean: One number for each of the three channels, subtracted from the image in [0, 1].
        std: One number for each of the three channels, which divides the difference.

    Shapes:
        A sample is (image_3HW, label), float32; a label is an int, or float32 [targets].

    Raises:
        ValueError: The files hold something else; an image or a label is missing; or an argument is wrong.
        StorageError: The store does not answer.
    """
    check_split(split, None)
    check_per_channel(3, mean=mean, std=std)
    check_val_fraction(val_fraction)
    root, rests = split_urls(urls, _FILES)
    columns = label if isinstance(label, str) else list(label)
    names = classes if classes is None or isinstance(classes, int) else list(classes)
    options = {"urls": rests, "image": image, "label": columns, "classes": names}
    index = open_index(Source("parquet", root, options), partial(_build, rests, image, columns, names))
    return IndexedImages(index, ReadRowGroups(image), _chosen(index, split, val_fraction), transform, mean, std)


def _chosen(index: Index, split: Split | None, val_fraction: float) -> np.ndarray | range | None:
    splits: dict[str, list[int]] = index.details.get(_SPLITS, {})
    if split is None and len(splits) == 2:
        raise ValueError(f"split must be train or val, got None; {index.source.url} holds files of both")
    if split is None:
        return None
    if not splits:
        return drawn(index, split, val_fraction)
    if split not in splits:
        raise ValueError(f"{index.source.url}: holds files of val alone, got split={split}; name others in urls")
    chosen = range(*splits[split])
    if not chosen:
        raise ValueError(f"{index.source.url}: its files of {split} have no rows; name others in urls")
    return chosen


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a file, without their images."""

    file: StoredObject
    in_groups: list[int]
    """The number of rows of each row group."""
    labels: LabelColumns


def _build(
    rests: Sequence[str],
    image: str,
    label: str | list[str],
    classes: int | list[str] | None,
    store: Store,
    builder: IndexBuilder,
) -> None:
    """Adds the rows of files to an index; it reads their footers and labels, and no image."""
    files = _of_splits(store, find_objects(store, rests, _FILES, builder), builder)
    builder.progress.expect(len(files), "files")
    rows = [
        each
        for begin in range(0, len(files), _AT_ONCE)
        for each in _read(store, files[begin : begin + _AT_ONCE], image, label, builder.progress)
    ]
    if not any(sum(each.in_groups) for each in rows):
        raise ValueError(f"{store.url}/{files[0].name}: has no rows, nor has any other file; name others in urls")
    builder.classes, labels = labels_of([each.labels for each in rows], label, classes)
    num_train = 0
    for each, own in zip(rows, labels):
        builder.add_container(
            each.file.name,
            each.file.size,
            each.file.version,
            offsets=np.repeat(np.arange(len(each.in_groups)), each.in_groups),
            lengths=np.concatenate([np.arange(0), *map(np.arange, each.in_groups)]),
            labels=own,
            keys=list(map(str, range(sum(each.in_groups)))),
        )
        if split_of(each.file.name) == "train":
            num_train = builder.num_samples
    val = {"val": [num_train, builder.num_samples]}
    present = {split_of(each.name) for each in files}
    if present == {"train", "val"}:
        builder.details[_SPLITS] = {"train": [0, num_train], **val}
    elif present == {"val"}:
        builder.details[_SPLITS] = val


def _read(
    store: Store, files: Sequence[StoredObject], image: str, label: str | list[str], progress: ListingProgress
) -> Iterator[_Rows]:
    """Yields the rows of files that are read together."""
    footers = []
    for file, footer in zip(files, read_footers(store, {file.name: file.size for file in files})):
        if isinstance(footer, str):
            raise ValueError(f"{store.url}/{file.name}: {footer}")
        _check_images(store, footer, image)
        footers.append(footer)
    files_of_row = len(files) / max(1, sum(footer.num_rows for footer in footers))
    columns = [label] if isinstance(label, str) else label
    tables = read_columns(store, footers, columns, lambda num: progress.listed(num, num * files_of_row))
    for file, footer, table in zip(files, footers, tables):
        names = footer.class_names(label) if isinstance(label, str) else None
        where = partial("{}/{}#{}".format, store.url, file.name)
        labels = LabelColumns(f"{store.url}/{file.name}", table, where, names)
        yield _Rows(file, [footer.rows_in(group) for group in range(footer.num_groups)], labels)


def _of_splits(store: Store, found: Sequence[StoredObject], builder: IndexBuilder) -> list[StoredObject]:
    """Returns the files of the splits, those of train first; beside both, files of a test split are passed over."""
    splits = {each.name: split_of(each.name) for each in found}
    present = set(splits.values())
    if len(present) == 1:
        return list(found)
    if not {"train", "val"} <= present or None in present:
        named = {split or "no split": name for name, split in splits.items()}
        listed = ", ".join(f"{name} of {split}" for split, name in sorted(named.items()))
        raise ValueError(
            f"{store.url}: must hold files of train and val, or of one split, got {listed}; name those of one split in "
            "urls, such as train-*.parquet"
        )
    for name, split in splits.items():
        if split == "test":
            builder.pass_over("of the test split", name)
    return [each for split in ("train", "val") for each in found if splits[each.name] == split]


def _check_images(store: Store, footer: Footer, image: str) -> None:
    """Raises a ValueError that names the first row without an image, if the footer says that there is one."""
    import pyarrow.compute as pc

    leaf = image_leaf(f"{store.url}/{footer.name}", footer.schema, image)
    first_row = 0
    for group in range(footer.num_groups):
        statistics = footer.chunk(group, leaf).statistics
        # A file without these numbers is checked when a row is read.
        if statistics is not None and statistics.has_null_count and statistics.null_count:
            (content,) = store.read_ranges([footer.range_of(group, leaf)])
            if isinstance(content, MissingObject):
                raise content
            row = pc.index(pc.is_null(image_column(decode_chunks(footer, group, {leaf: content}))), True).as_py()
            raise ValueError(
                f"{store.url}/{footer.name}#{first_row + row}: has no image in {leaf}; write its bytes there, or "
                "remove the row"
            )
        first_row += footer.rows_in(group)
