"""A dataset of images that an index lists: a sample is read from a store, decoded, transformed and normalised."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cluster.storage.store import ByteRange, MissingObject
from jobs.images.data_stores import data_store
from jobs.images.decoding import BadSample, decode_image
from jobs.images.indexing.index import Index, Place
from jobs.images.kept_blocks import KeptBlocks
from jobs.images.labelled_images import Transform, normalised, per_channel
from jobs.images.read_cost import ReadCost, range_of, read_cost, row_group_bytes, runs_of

ReadSamples = Callable[[Index, Sequence[int]], list[bytes | BadSample]]
"""Reads the encoded images of samples of an index, with few requests; an error in place of each that is not there.

It is pickled to loader processes. Raises StorageError if the store does not answer.
"""


class IndexedImages(Dataset[tuple[Tensor, Any]]):
    """A map-style dataset of (image, label).

    Args:
        index: Lists the samples.
        read: Reads them.
        chosen_N: The numbers of the samples of this dataset in the index, int64 or a range; None: all.
        transform: Applied to the decoded image, uint8.
        mean: One number per channel to subtract from the float32 image, if given.
        std: One number per channel to divide by after that, if given.

    Shapes:
        A sample is (image_3HW, label), float32; a label is an int, or without classes a float32 [targets].
    """

    def __init__(
        self,
        index: Index,
        read: ReadSamples,
        chosen_N: np.ndarray | range | None = None,
        transform: Transform | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.index = index
        self.read = read
        self._chosen_N = chosen_N
        self._transform = transform
        self.mean_C11, self.std_C11 = per_channel(mean), per_channel(std)
        self._blocks: KeptBlocks | None = None

    def __len__(self) -> int:
        return len(self.index) if self._chosen_N is None else len(self._chosen_N)

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label; empty: labels are numbers to predict."""
        return self.index.classes

    @property
    def targets(self) -> Tensor:
        """The label of each sample. Shapes: int64 [samples], or float32 [samples, targets]."""
        labels = self.index.labels
        return torch.from_numpy(labels.copy() if self._chosen_N is None else labels[self._chosen_N])

    @property
    def numbers(self) -> np.ndarray:
        """The number of each sample in the index. Shapes: int64 [samples]."""
        chosen = range(len(self.index)) if self._chosen_N is None else self._chosen_N
        return np.arange(chosen.start, chosen.stop, chosen.step) if isinstance(chosen, range) else chosen

    def __getitem__(self, number: int) -> tuple[Tensor, Any]:
        (content,) = self.fetch([number])
        return self.decoded(number, content)

    def fetch(self, numbers: Sequence[int]) -> list[bytes | BadSample]:
        """Reads the encoded images of samples, with few requests; an error in place of each that is not there.

        Raises:
            StorageError: The store does not answer.
        """
        return self._read_all(numbers) if self._blocks is None else self._blocks.fetch(numbers, self._read_all)

    def fetch_alone(self, number: int) -> bytes | BadSample:
        """Reads one encoded image out of the order of ``data.shuffle``: without its block, and without using it up.

        Raises:
            StorageError: The store does not answer.
        """
        (content,) = self._read_all([number])
        return content

    @property
    def shares_objects(self) -> bool:
        """Whether objects hold several samples, so that neighbours can be read together."""
        return self.index.num_objects < len(self.index)

    def read_cost(self, batches: Iterable[Sequence[int]]) -> ReadCost:
        """Returns what it costs to read batches of samples, each together; objects must hold several samples."""
        return read_cost(self.index, ([self._number(number) for number in numbers] for numbers in batches))

    @property
    def row_group_bytes(self) -> int:
        """The most bytes of row groups of Parquet files that a process holds; 0: samples lie in other files."""
        return row_group_bytes(self.index)

    def in_blocks(self, block: int, most: int) -> "IndexedImages":
        """Returns this dataset for samples that are fetched in the order of ``data.shuffle``.

        It reads whole blocks of neighbours, and keeps their samples until they are used, ``most`` of them; but not
        where each sample is an object of its own, so that a block would save no request.
        """
        if not self.shares_objects:
            return self
        other = copy.copy(self)
        other._blocks = KeptBlocks(len(self), block, most)
        return other

    def decoded(self, number: int, content: bytes | BadSample) -> tuple[Tensor, Any]:
        """Returns a sample that was fetched.

        Raises:
            BadSample: It was not there, or is no image.
        """
        if isinstance(content, BadSample):
            raise content
        own = self._number(number)
        label = self.index.labels[own]
        image_3HW = decode_image(content, self.index.url_of(own))
        if self._transform is not None:
            image_3HW = self._transform(image_3HW)
        image_3HW = normalised(image_3HW, self.mean_C11, self.std_C11)
        return image_3HW, int(label) if self.classes else torch.from_numpy(label.copy())

    def _read_all(self, numbers: Sequence[int]) -> list[bytes | BadSample]:
        return self.read(self.index, [self._number(number) for number in numbers])

    def _number(self, number: int) -> int:
        return int(number if self._chosen_N is None else self._chosen_N[number])


def read_ranges(index: Index, numbers: Sequence[int]) -> list[bytes | BadSample]:
    """Reads samples that are whole objects, or ranges of them.

    Samples that lie one behind the other are read together.

    Raises:
        StorageError: The store does not answer.
    """
    places = [index.place(number) for number in numbers]
    runs = runs_of(places)
    contents: dict[int, bytes | BadSample] = {}
    store = data_store(index.source.url)
    ranges = [range_of([places[each] for each in run]) for run in runs]
    for run, wanted, found in zip(runs, ranges, store.read_ranges(ranges)):
        for each in run:
            contents[each] = _cut(index, places[each], wanted, found)
    return [contents[each] for each in range(len(places))]


def _cut(index: Index, place: Place, wanted: ByteRange, found: bytes | MissingObject) -> bytes | BadSample:
    """Returns the bytes of a sample out of those that were read."""
    url = f"{index.source.url.rstrip('/')}/{place}"
    if isinstance(found, MissingObject):
        return BadSample("is gone; restore it", url)
    if place.length < 0:
        if place.size not in (-1, len(found)):
            return BadSample(f"had {place.size} bytes when it was listed, has {len(found)} now; restore it", url)
        return found
    begin = place.offset - wanted.offset
    content = found[begin : begin + place.length]
    if len(content) < place.length:
        return BadSample("its object ends before it does; restore it", url)
    return content
