"""Tar shards in WebDataset's layout: a dataset of the images in tar files of any store."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from cluster.storage.store import ByteRange, MissingObject, Store
from jobs.images.indexed_images import IndexedImages, read_ranges
from jobs.images.indexing.index import IndexBuilder, Source
from jobs.images.indexing.index_files import open_index
from jobs.images.indexing.listing_progress import ListingProgress
from jobs.images.labelled_images import Split, Transform, check_per_channel, check_split
from jobs.images.object_urls import ObjectKind, find_objects, split_urls
from jobs.images.sample_labels import SampleLabels, finite_numbers
from jobs.images.splits import check_val_fraction, drawn
from jobs.images.tar.tar_members import UNPACK, Reads
from jobs.images.tar.tar_samples import Layout, ShardSamples, read_samples

_SHARDS = ObjectKind(
    name="tar file",
    suffixes=(
        ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4",
    ),
    hidden=(".",),
    is_below=False,
)  # fmt: skip
"""With the names of compressed ones, so that they are an error."""
_IMAGES = "jpg;jpeg;png;webp"
_AT_ONCE = 32
"""Shards that are read at a time."""
_MB = 1e6


def tar_shards(
    urls: str | os.PathLike[str] | Sequence[str],
    split: Split | None = None,
    transform: Transform | None = None,
    *,
    image: str = _IMAGES,
    label: str | None = None,
    targets: Sequence[str] = (),
    classes: int | Sequence[str] | None = None,
    val_fraction: float = 0.1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> IndexedImages:
    """The images of tar shards as WebDataset, img2dataset and others write them; they may lie in any store.

    A sample is the members of a shard that follow each other and share a key: their name up to the first dot of its
    last part. Samples keep the order of the URLs, then of the shard. A sample without an image or without a label is an
    error. Passed over are folders, links, hidden members, and members that belong to no image and no label.

    The headers are read once, for the index of the run, from 32 shards at a time. A request reads 1 MiB, and the next
    one begins at the first header beyond: so a shard takes a request for each MiB of small images, but only one, of
    256 KiB, for each image above 1 MiB.

    Args:
        urls: A shard, a folder of shards, names with braces (``s3://bucket/train-{000000..000146}.tar``), a pattern
            with ``*``, or a list of these; all in one bucket.
        split: ``train`` or ``val``; None takes all samples. The SHA-256 of a sample's key and of the last part of
            its shard's name decides.
        transform: Applied to a uint8 image_3HW.
        image: The extension of the member that is the image, or several with ``;``, of which a sample's first counts.
        label: The key of the ``.json`` that holds the label, an integer or a name; None: the ``.cls`` holds an integer.
        targets: Keys of the ``.json`` that hold numbers to predict, in place of a label.
        classes: The names of the classes, or their number; None: the sorted names that the labels have, or ``0`` to
            the largest integer. Name them if ``train`` and ``val`` have other URLs, where a class may be missing.
        val_fraction: The fraction of samples in ``val``, in (0, 1).
        mean: One number for each of the three channels, subtracted from the image in [0, 1].
        std: One number for each of the three channels, which divides the difference.

    Shapes:
        A sample is (image_3HW, label), float32; a label is an int, or with ``targets`` a float32 [targets].

    Raises:
        ValueError: A shard is missing, damaged or compressed, a sample or a label is wrong, or an argument is.
        StorageError: The store cannot be read.
    """
    check_split(split, None)
    check_per_channel(3, mean=mean, std=std)
    check_val_fraction(val_fraction)
    layout = _layout(image, label, targets, classes)
    root, rests = split_urls(urls, _SHARDS)
    options = {
        "urls": rests,
        "image": list(layout.images),
        "keys": list(layout.keys),
        "targets": len(targets),
        "classes": classes if classes is None or isinstance(classes, int) else list(classes),
    }
    labels = None if targets else SampleLabels(classes)
    index = open_index(Source("tar", root, options), partial(_build, rests=rests, layout=layout, labels=labels))
    chosen_N = None if split is None else drawn(index, split, val_fraction)
    return IndexedImages(index, read_ranges, chosen_N, transform, mean, std)


def _layout(image: str, label: str | None, targets: Sequence[str], classes: int | Sequence[str] | None) -> Layout:
    images = [each.strip().lstrip(".").lower() for each in image.split(";")] if isinstance(image, str) else []
    if not all(images) or not images:
        raise ValueError(f"image must name extensions, got {image!r}; write jpg, or jpg;png")
    if isinstance(targets, str) or not all(isinstance(key, str) for key in targets):
        raise ValueError(f"targets must be a list of keys, got {targets!r}; write [{targets}]")
    if targets and not (label is None and classes is None):
        raise ValueError("targets must stand without label and classes; remove one or the other")
    keys = targets or ([] if label is None else [label])
    return Layout(tuple(images), tuple(keys))


def _build(
    store: Store, builder: IndexBuilder, rests: Sequence[str], layout: Layout, labels: SampleLabels | None
) -> None:
    """Adds the samples of all shards to an index; a ``Build``, but for its arguments."""
    shards = find_objects(store, rests, _SHARDS, builder)
    for shard in shards:
        if not shard.name.lower().endswith(".tar"):
            raise ValueError(f"{store.url}/{shard.name}: is compressed; {UNPACK}")
    num_samples = 0
    if labels is not None:
        builder.classes = labels.classes  # it grows
    builder.progress.expect(sum(shard.size for shard in shards) / _MB, "MB")
    for found in _run(store, (read_samples(store.url, shard, layout) for shard in shards), builder.progress):
        shard = found.shard
        builder.progress.listed(len(found.keys))
        for reason, name in found.passed_over:
            builder.pass_over(reason, name)
        if not found.keys:
            builder.pass_over("shard without samples", shard.name)
            continue
        num_samples += len(found.keys)
        builder.add_container(
            shard.name,
            shard.size,
            shard.version,
            offsets=found.offsets,
            lengths=found.lengths,
            labels=_labels(store.url, found, layout, labels),
            keys=found.keys,
        )
    if not num_samples:
        what = f".{layout.images[0]} and .{layout.label}"
        raise ValueError(f"{store.url}: has no samples with {what} in {len(shards)} shards; name others in urls")
    if labels is not None and labels.need_sorting:
        builder.sort_classes()


def _labels(store_url: str, found: ShardSamples, layout: Layout, labels: SampleLabels | None) -> np.ndarray:
    """Shapes: int64 [samples], or float32 [samples, targets]."""
    converted = []
    for key, values in zip(found.keys, found.values):
        try:
            converted.append(finite_numbers(values) if labels is None else labels.label(values[0]))
        except ValueError as error:
            held = f"its {', '.join(layout.keys)}" if layout.keys else "its .cls"
            raise ValueError(f"{store_url}/{found.shard.name}#{key}: {held} {error}") from error
    return np.array(converted, np.float32 if labels is None else np.int64)


class _Scan:
    """A shard that is being read."""

    def __init__(self, reads: Reads[ShardSamples]) -> None:
        self._reads = reads
        self.position = 0
        """How much of it was read or stepped over, in bytes."""
        self.result: ShardSamples | None = None
        self.wanted: ByteRange
        self.go_on(None)

    def go_on(self, content: bytes | None) -> None:
        """Takes the bytes that were wanted; then it is known which are wanted next, or the result."""
        try:
            self.wanted = next(self._reads) if content is None else self._reads.send(content)
            self.position = self.wanted.offset
        except StopIteration as stop:
            self.result = stop.value
            self.position = stop.value.shard.size


def _run(store: Store, reads: Iterable[Reads[ShardSamples]], progress: ListingProgress) -> Iterator[ShardSamples]:
    """Reads shards at the same time, and yields their samples in order.

    Raises:
        MissingObject: A shard was deleted after it was listed.
    """
    waiting, scans = iter(reads), deque[_Scan]()
    while True:
        while len(scans) < _AT_ONCE and (own := next(waiting, None)) is not None:
            scans.append(_Scan(own))
        if not scans:
            return
        active = [scan for scan in scans if scan.result is None]
        for scan, content in zip(active, store.read_ranges([scan.wanted for scan in active])):
            if isinstance(content, MissingObject):
                raise content
            before = scan.position
            scan.go_on(content)
            progress.listed(0, (scan.position - before) / _MB)
        while scans and (result := scans[0].result) is not None:
            scans.popleft()
            yield result
