"""The index of image data: where each sample lies, its label, and the classes, in one columnar file.

It is made once and mapped into the memory of every process, so that no process holds lists of names.
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import one_line
from jobs.images.indexing.index_columns import COLUMNS, DIGITS, OF_OBJECTS, checked_columns, digest_of, draw, types_of
from jobs.images.indexing.listing_progress import ListingProgress

if TYPE_CHECKING:
    import pyarrow as pa

_VERSION = 2


@dataclass(frozen=True, slots=True)
class Source:
    """What an index is made from: data at a URL, and all that decides which samples it has."""

    format: str
    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """JSON."""

    @property
    def id(self) -> str:
        """The same for equal sources."""
        text = json.dumps([self.format, self.url, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies."""

    object: str
    """The name of an object below the source's URL."""
    size: int
    """The bytes of the object; -1: unknown."""
    offset: int
    """Its first byte in the object; of Parquet, the number of its row group."""
    length: int
    """Its bytes; of Parquet, the number of its row in the row group. -1: the sample is the whole object."""
    key: str
    """What names it within its object; empty: it is the whole object."""

    def __str__(self) -> str:
        return f"{self.object}#{self.key}" if self.key else self.object


class IndexBuilder:
    """Collects the objects and samples of a source in arrays.

    Objects and samples keep the order in which they are added.

    Args:
        source: What is listed.
        progress: Who lists tells it how far that is; None: nobody waits.
    """

    def __init__(self, source: Source, progress: ListingProgress | None = None) -> None:
        self.source = source
        self.progress = progress or ListingProgress(source.url, lambda _: None)
        self.classes: Sequence[str] = ()
        """The name of each label; empty: labels are numbers to predict."""
        self.details: dict[str, Any] = {}
        """What a format notes about the samples for itself; JSON."""
        self.passed_over: dict[str, tuple[int, str]] = {}
        """By reason: how many names were passed over, and the first of them by name."""
        self._columns: dict[str, list[pa.Array]] = {name: [] for name in COLUMNS}
        self._num_objects = self._num_samples = 0

    @property
    def num_samples(self) -> int:
        """The number of samples added so far."""
        return self._num_samples

    def add_files(
        self, names: Sequence[str], sizes: Sequence[int], versions: Sequence[str], labels: "Sequence[Any] | np.ndarray"
    ) -> None:
        """Adds objects that are samples.

        Args:
            names: Relative to the source's URL.
            sizes: In bytes; -1: unknown.
            versions: What changes with their content, see ``StoredObject``.
            labels: Of each.

        Shapes: labels int64 [n], or float32 [n, targets] if there are no classes.
        """
        first, num = self._num_objects, len(names)
        self._add_objects(names, sizes, versions)
        self._add_samples(np.arange(first, first + num), np.zeros(num), np.full(num, -1), labels, [""] * num, names)

    def add_container(
        self,
        name: str,
        size: int,
        version: str,
        *,
        offsets: "Sequence[int] | np.ndarray",
        lengths: "Sequence[int] | np.ndarray",
        labels: "Sequence[Any] | np.ndarray",
        keys: Sequence[str],
    ) -> None:
        """Adds an object that holds samples; see ``Place`` for what offsets, lengths and keys mean.

        Shapes: offsets, lengths int64 [n]; labels int64 [n], or float32 [n, targets] if there are no classes.
        """
        number = self._num_objects
        self._add_objects([name], [size], [version])
        # Without its folders: which of them are part of the name depends on the other URLs of the source.
        drawn_by = [f"{posixpath.basename(name)}#{key}" for key in keys]
        self._add_samples(np.full(len(keys), number), offsets, lengths, labels, keys, drawn_by)

    def _add_objects(self, names: Sequence[str], sizes: Sequence[int], versions: Sequence[str]) -> None:
        self._num_objects += len(names)
        self._add("name", [os.fsencode(name) for name in names])
        self._add("size", np.asarray(sizes, np.int64))
        self._add("version", [version.encode() for version in versions])

    def _add_samples(self, objects: Any, offsets: Any, lengths: Any, labels: Any, keys: Any, drawn_by: Any) -> None:
        self._add("object", np.asarray(objects, np.int64))
        self._add("offset", np.asarray(offsets, np.int64))
        self._add("length", np.asarray(lengths, np.int64))
        self._add("key", [os.fsencode(key) for key in keys])
        self._add("draw", np.array([draw(name) for name in drawn_by], np.uint64))
        self._add("label", np.asarray(labels, np.int64 if self.classes else np.float32).reshape(-1))
        self._num_samples += len(keys)

    def _add(self, column: str, values: "np.ndarray | list[bytes]") -> None:
        import pyarrow as pa  # takes 0.3 s, and many jobs have no index

        self._columns[column].append(pa.array(values, pa.large_binary() if isinstance(values, list) else None))

    def sort_files(self, first: int) -> None:
        """Orders the samples from ``first`` on by label, then by name; all samples must be of ``add_files``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        types = types_of(has_classes=bool(self.classes))

        def column(name: str) -> pa.ChunkedArray:
            return pa.chunked_array(self._columns[name], types[name])

        order = pc.sort_indices(
            pa.table({name: column(name).slice(first) for name in ("label", "name")}),
            sort_keys=[("label", "ascending"), ("name", "ascending")],
        )
        for name in (*OF_OBJECTS, "draw", "label"):
            whole = column(name)
            self._columns[name] = [*whole.slice(0, first).chunks, *whole.slice(first).take(order).chunks]
        del whole, order
        pa.default_memory_pool().release_unused()  # Arrow keeps memory that was freed

    def pass_over(self, reason: str, name: str) -> None:
        """Notes what is no sample, for people to see."""
        count, first = self.passed_over.get(reason, (0, name))
        self.passed_over[reason] = (count + 1, min(first, name))

    def sort_classes(self) -> None:
        """Numbers the classes by name, also in the labels that were added."""
        import pyarrow as pa

        order = sorted(range(len(self.classes)), key=self.classes.__getitem__)
        self.classes = [self.classes[old] for old in order]
        new_of_old = np.argsort(order)
        self._columns["label"] = [pa.array(new_of_old[labels.to_numpy()]) for labels in self._columns["label"]]

    def write(self, path: Path) -> "Index":
        """Writes the index to a file, which must not exist, and opens it; nothing is added after that."""
        import pyarrow as pa

        types = types_of(has_classes=bool(self.classes))
        # One by one, for no column is needed twice in memory.
        columns = {name: pa.chunked_array(self._columns.pop(name), types[name]).combine_chunks() for name in COLUMNS}
        described = {
            "version": _VERSION,
            "format": self.source.format,
            "url": self.source.url,
            "options": dict(self.source.options),
            "classes": list(self.classes),
            "details": self.details,
            "passed_over": self.passed_over,
        }
        text = json.dumps(described, sort_keys=True)
        # One row of lists: objects and samples differ in number, and a file has one table.
        table = pa.table({
            name: pa.LargeListArray.from_arrays(pa.array([0, len(column)], pa.int64()), column)
            for name, column in columns.items()
        }).replace_schema_metadata({"index": text, "digest": digest_of(text, columns)})  # fmt: skip
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        del columns, table
        pa.default_memory_pool().release_unused()
        return Index(path)


class Index:
    """An index that a file holds, mapped into memory. A pickle of it holds the path of the file."""

    def __init__(self, path: Path) -> None:
        """Opens an index.

        Raises:
            ValueError: The file is no index, or one of another version of the launcher.
        """
        import pyarrow as pa

        self.path = path
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            described = json.loads(table.schema.metadata[b"index"])
            self.digest: str = table.schema.metadata[b"digest"].decode()
            if described["version"] != _VERSION:
                raise ValueError(f"it is of version {described['version']}, not {_VERSION}")
            self._text = json.dumps(described, sort_keys=True)
            self.source = Source(described["format"], described["url"], described["options"])
            self.classes: tuple[str, ...] = tuple(described["classes"])
            self.details: dict[str, Any] = described["details"]
            """What the format notes about the samples for itself; JSON."""
            self.passed_over: dict[str, tuple[int, str]] = {
                reason: (count, first) for reason, (count, first) in described["passed_over"].items()
            }
            """By reason: how many names were passed over, and the first of them by name."""
            self._columns = checked_columns(table, len(self.classes))
        except (pa.ArrowException, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # else it is Arrow's own: damaged
                raise
            raise ValueError(f"{path}: is no index of data: {one_line(error)}; remove it") from error

    def __reduce__(self) -> tuple[type["Index"], tuple[Path]]:
        return Index, (self.path,)

    def __len__(self) -> int:
        return len(self._columns["object"])

    @cached_property
    def labels(self) -> np.ndarray:
        """Of each sample: its class, int64 [samples]; without classes, its targets, float32 [samples, targets]."""
        values: np.ndarray = self._columns["label"].to_numpy()
        return values if self.classes else values.reshape(len(self), -1)

    @property
    def num_objects(self) -> int:
        """The number of objects that hold the samples."""
        return len(self._columns["name"])

    @property
    def objects(self) -> Mapping[str, "pa.Array"]:
        """The columns of the objects: name, size, version."""
        return {name: self._columns[name] for name in OF_OBJECTS}

    @property
    def object_numbers(self) -> np.ndarray:
        """Of each sample, the number of its object in ``objects``. Shapes: int64 [samples]."""
        numbers: np.ndarray = self._columns["object"].to_numpy()
        return numbers

    @property
    def offsets(self) -> np.ndarray:
        """Of each sample, where it begins in its object; of Parquet, the number of its row group.

        Shapes: int64 [samples].
        """
        offsets: np.ndarray = self._columns["offset"].to_numpy()
        return offsets

    @property
    def draws(self) -> np.ndarray:
        """Of each sample, the first 8 bytes of the SHA-256 of a name, as a number: it depends on no other sample.

        The name is that of its object; in a container, the last part of the container's name, and the sample's key.

        Shapes: uint64 [samples].
        """
        drawn: np.ndarray = self._columns["draw"].to_numpy()
        return drawn

    def place(self, number: int) -> Place:
        """Returns where a sample lies."""
        columns = self._columns
        of_object = columns["object"][number].as_py()
        return Place(
            object=os.fsdecode(columns["name"][of_object].as_py()),
            size=columns["size"][of_object].as_py(),
            offset=columns["offset"][number].as_py(),
            length=columns["length"][number].as_py(),
            key=os.fsdecode(columns["key"][number].as_py()),
        )

    def places(self, numbers_N: np.ndarray) -> Mapping[str, "pa.Array"]:
        """Returns where samples lie: a column for the size and version of their objects, and their offset and length.

        Shapes: int64 [N] -> N values in each column.
        """
        import pyarrow as pa

        numbers = pa.array(numbers_N)
        of_objects = self._columns["object"].take(numbers)
        columns = {name: self._columns[name].take(of_objects) for name in ("size", "version")}
        return columns | {name: self._columns[name].take(numbers) for name in ("offset", "length")}

    def url_of(self, number: int) -> str:
        """Returns the URL of a sample, for people to read."""
        return f"{self.source.url.rstrip('/')}/{self.place(number)}"

    def check(self) -> bool:
        """Returns whether the file holds what was written to it."""
        return self.digest == digest_of(self._text, self._columns)
