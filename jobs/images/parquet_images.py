"""Parquet files with the bytes of images, as Hugging Face's ``datasets`` and others write them."""

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cluster.storage.store import MissingObject, Store, StoredObject
from jobs.images.index import Index, IndexBuilder, Source
from jobs.images.index_files import open_index
from jobs.images.indexed_images import IndexedImages
from jobs.images.labelled_images import Split, Transform, check_per_channel, check_split
from jobs.images.parquet_columns import Footer, decode_chunks, read_columns, read_footers
from jobs.images.parquet_files import file_patterns, find_files, split_of
from jobs.images.row_groups import ReadRowGroups, image_column, image_leaf
from jobs.images.splits import check_val_fraction, drawn
from jobs.images.table_labels import LabelColumns, labels_of

if TYPE_CHECKING:
    import pyarrow as pa


def parquet_images(
    urls: str | os.PathLike[str] | Sequence[str],
    split: Split | None = None,
    transform: Transform | None = None,
    *,
    image: str = "image",
    label: str | Sequence[str] = "label",
    classes: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> IndexedImages:
    """Images in Parquet files, at any URL.

    If names of files say which hold ``train`` and which ``val`` (or ``validation``, ``valid``, ``dev``), as in
    ``train-00000-of-00002.parquet`` or ``validation/0.parquet``, these are the splits, and files of a test split are
    passed over. Otherwise, also if all files are of ``train``, the SHA-256 of the file's name and the number of the row
    decides the split of an image.

    Args:
        urls: A file, a folder (with all below it), a pattern such as ``s3://bucket/data/train-*.parquet``, or a list.
        split: ``train`` or ``val``; None takes all images of files without splits.
        transform: Applied to a uint8 image_3HW.
        image: The column of images: bytes, or a struct with a field ``bytes``.
        label: The column of labels: whole numbers or names of classes, or numbers to predict. A list of columns holds
            numbers to predict.
        classes: The name of each label; None: those that ``datasets`` wrote, else the sorted names that occur, else the
            numbers up to the largest. Give them if train and val are separate calls, and a name may occur in one only.
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
    files = file_patterns(urls)
    columns = label if isinstance(label, str) else list(label)
    names = None if classes is None else list(classes)
    options = {"files": list(files.patterns), "image": image, "label": columns, "classes": names}
    index = open_index(Source("parquet", files.url, options), partial(_build, files.patterns, image, columns, names))
    return IndexedImages(index, ReadRowGroups(image), _chosen(index, split, val_fraction), transform, mean, std)


def _chosen(index: Index, split: Split | None, val_fraction: float) -> np.ndarray | None:
    names = [os.fsdecode(name) for name in index.objects["name"].to_pylist()]
    splits = list(map(split_of, names))
    if not {"train", "val"} <= set(splits):
        if split is None or set(splits) == {split} == {"val"}:
            return None
        if set(splits) == {"val"}:
            raise ValueError(f"{index.source.url}: holds files of val alone, got split=train; name others in urls")
        return drawn(index, split, val_fraction)
    if split is None:
        raise ValueError(f"split must be train or val, got None; {index.source.url} holds files of both")
    return np.flatnonzero(np.array([own == split for own in splits])[index.object_numbers])


def _build(
    patterns: Sequence[str],
    image: str,
    label: str | list[str],
    classes: list[str] | None,
    store: Store,
    builder: IndexBuilder,
) -> None:
    """Adds the rows of files to an index; it reads their footers and labels, and no image."""
    found, others = find_files(store, patterns)
    for name in others:
        builder.pass_over("no Parquet file", name)
    objects = {each.name: each for each in _of_splits(store, found, builder)}
    footers = _footers(store, objects)
    for footer in footers:
        _check_images(store, footer, image)
    tables = read_columns(store, footers, [label] if isinstance(label, str) else label)
    labelled = [_labelled(f"{store.url}/{footer.name}", footer, table, label) for footer, table in zip(footers, tables)]
    builder.classes, labels = labels_of(labelled, label, classes)
    for footer, own in zip(footers, labels):
        rows = [footer.rows_in(group) for group in range(footer.num_groups)]
        builder.add_container(
            footer.name,
            footer.size,
            objects[footer.name].version,
            offsets=np.repeat(np.arange(len(rows)), rows),
            lengths=np.concatenate([np.arange(0), *map(np.arange, rows)]),
            labels=own,
            keys=list(map(str, range(sum(rows)))),
        )


def _labelled(url: str, footer: Footer, table: "pa.Table", label: str | list[str]) -> LabelColumns:
    names = footer.class_names(label) if isinstance(label, str) else None
    return LabelColumns(url, table, lambda row: f"{url}#{row}", names)


def _of_splits(store: Store, found: Sequence[StoredObject], builder: IndexBuilder) -> list[StoredObject]:
    """Returns the files of the splits; those of a test split are none, beside others."""
    splits = {each.name: split_of(each.name) for each in found}
    present = set(splits.values())
    if len(present) == 1 or not present & {"train", "val", "test"}:
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
    return [each for each in found if splits[each.name] != "test"]


def _footers(store: Store, objects: dict[str, StoredObject]) -> list[Footer]:
    footers = []
    for name, footer in zip(objects, read_footers(store, {name: each.size for name, each in objects.items()})):
        if isinstance(footer, str):
            raise ValueError(f"{store.url}/{name}: {footer}")
        footers.append(footer)
    if not any(footer.metadata.num_rows for footer in footers):
        raise ValueError(f"{store.url}/{footers[0].name}: has no rows, nor has any other file; name others in urls")
    return footers


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
