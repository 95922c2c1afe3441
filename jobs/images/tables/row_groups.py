"""Reads the images of row groups of Parquet files; row groups that were read last stay in memory."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from cluster.storage.store import MissingObject, Store
from jobs.images.data_stores import data_store
from jobs.images.decoding import BadSample
from jobs.images.indexing.index import Index, Place
from jobs.images.read_cost import KEPT_ROW_GROUPS, ROW_GROUPS_AT_ONCE
from jobs.images.tables.parquet_columns import Footer, check_columns, decode_chunks, read_footers

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

_FOOTER_BYTES = 2**24
"""Footers that stay in memory."""


def image_leaf(url: str, schema: "pa.Schema", column: str) -> str:
    """Returns the Parquet column that holds the bytes of images: of a struct, its field ``bytes``.

    Raises:
        ValueError: There is no such column, or it holds no bytes.
    """
    import pyarrow as pa

    check_columns(url, [column], schema.names)
    kind = schema.field(column).type
    is_struct = pa.types.is_struct(kind)
    own = kind.field("bytes").type if is_struct and kind.get_field_index("bytes") >= 0 else kind
    if pa.types.is_binary(own) or pa.types.is_large_binary(own):
        return f"{column}.bytes" if is_struct else column
    hint = "name their column in jobs.data.image_table" if pa.types.is_string(own) else "name another column in image"
    raise ValueError(f"{url}: column {column!r} must hold the bytes of images, got {kind}; {hint}")


def image_column(table: "pa.Table") -> "pa.ChunkedArray":
    """Returns the bytes of the images in a table of ``image_leaf`` alone; null where there are none."""
    import pyarrow as pa

    column = table.column(0)
    return column.flatten()[0] if pa.types.is_struct(column.type) else column


class ReadRowGroups:
    """Reads the images of a Parquet index, see ``jobs.images.indexed_images.ReadSamples``.

    It reads the image column of each row group that a sample lies in, and no other column, in concurrent requests. A
    pickle of it holds no images.

    Args:
        image: The column of images.
        kept_bytes: Decoded row groups to keep in memory; the last one stays in any case.

    Thread: one thread at a time; each loader process has its own.
    """

    def __init__(self, image: str, kept_bytes: int = KEPT_ROW_GROUPS) -> None:
        self._image, self._kept_bytes = image, kept_bytes
        self._footers: _Recent[Footer] = _Recent(_FOOTER_BYTES)
        self._columns: _Recent[pa.ChunkedArray] = _Recent(kept_bytes)

    def __reduce__(self) -> tuple[type["ReadRowGroups"], tuple[str, int]]:
        return ReadRowGroups, (self._image, self._kept_bytes)

    def __call__(self, index: Index, numbers: Sequence[int]) -> list[bytes | BadSample]:
        """Reads samples; an error in place of each that is not there.

        Raises:
            StorageError: The store does not answer.
        """
        places = [index.place(number) for number in numbers]
        of_groups: dict[_Group, list[int]] = {}
        for number, place in enumerate(places):
            of_groups.setdefault((index.digest, place.object, place.offset), []).append(number)
        contents: dict[int, bytes | BadSample] = {}
        for group, column in self._read(index, {group: places[own[0]] for group, own in of_groups.items()}):
            for number in of_groups[group]:
                found = column if isinstance(column, str) else _row(column, places[number].length)
                url = f"{index.source.url.rstrip('/')}/{places[number]}"
                contents[number] = BadSample(found, url) if isinstance(found, str) else found
        return [contents[number] for number in range(len(places))]

    def _read(self, index: Index, places: "dict[_Group, Place]") -> "Iterator[tuple[_Group, pa.ChunkedArray | str]]":
        """Yields the images of each row group, or why there are none; those in memory come first.

        Only ``ROW_GROUPS_AT_ONCE`` and what is kept are in memory at a time.
        """
        new = [group for group in sorted(places) if group not in self._columns]
        # Before any new one takes the place of one of them.
        yield from [(group, self._columns[group]) for group in places if group in self._columns]
        store = data_store(index.source.url)
        footers = self._read_footers(store, {group: places[group] for group in new})
        ready: list[tuple[_Group, Footer, str]] = []
        for group in new:
            footer = footers[group[:2]]
            if isinstance(footer, str):
                yield group, f"its file {footer}"
            elif not group[2] < footer.num_groups:
                yield group, "its file has fewer row groups than when it was listed; restore it"
            else:
                try:
                    ready.append((group, footer, image_leaf(f"{store.url}/{footer.name}", footer.schema, self._image)))
                except ValueError as error:
                    yield group, f"its file has changed since it was listed, {error}"
        for portion in _portions(ready):
            ranges = [footer.range_of(number, leaf) for (_, _, number), footer, leaf in portion]
            for (group, footer, leaf), content in zip(portion, store.read_ranges(ranges)):
                yield group, self._decoded(group, footer, leaf, content)

    def _decoded(
        self, group: "_Group", footer: Footer, leaf: str, content: bytes | MissingObject
    ) -> "pa.ChunkedArray | str":
        if isinstance(content, MissingObject):
            return "its file is gone; restore it"
        try:
            column = image_column(decode_chunks(footer, group[2], {leaf: content}))
        except ValueError as error:
            return f"its row group cannot be read, {error}; repair or restore the file"
        self._columns.keep(group, column, column.nbytes)
        return column

    def _read_footers(self, store: Store, places: "dict[_Group, Place]") -> dict[tuple[str, str], Footer | str]:
        files = {group[:2]: place for group, place in places.items()}
        new = {place.object: place.size for file, place in files.items() if file not in self._footers}
        found = dict(zip(new, read_footers(store, new)))
        footers: dict[tuple[str, str], Footer | str] = {}
        for file in files:
            footers[file] = self._footers[file] if file in self._footers else found[file[1]]
        for file, footer in footers.items():
            if isinstance(footer, Footer):
                self._footers.keep(file, footer, footer.metadata.serialized_size)
        return footers


_Group = tuple[str, str, int]
"""The digest of an index, the name of an object, the number of a row group."""


def _row(column: "pa.ChunkedArray", row: int) -> bytes | str:
    """Returns an image of a row group, or why there is none."""
    if not row < len(column):
        return "its row group has fewer rows than when it was listed; restore the file"
    content: bytes | None = column[row].as_py()
    return "has no image; write its bytes there, or remove the row" if content is None else content


def _portions(groups: Iterable[tuple[_Group, Footer, str]]) -> Iterator[list[tuple[_Group, Footer, str]]]:
    """Yields groups to read at once: ``ROW_GROUPS_AT_ONCE`` bytes of them, or one that is larger."""
    portion: list[tuple[_Group, Footer, str]] = []
    size = 0
    for group, footer, leaf in groups:
        own = footer.range_of(group[2], leaf).size or 0
        if portion and size + own > ROW_GROUPS_AT_ONCE:
            yield portion
            portion, size = [], 0
        portion.append((group, footer, leaf))
        size += own
    if portion:
        yield portion


class _Recent(Generic[T]):
    """Values that were used last, up to a number of bytes; the last one stays in any case."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._values: OrderedDict[tuple[object, ...], tuple[T, int]] = OrderedDict()

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return key in self._values

    def __getitem__(self, key: tuple[object, ...]) -> T:
        self._values.move_to_end(key)
        return self._values[key][0]

    def keep(self, key: tuple[object, ...], value: T, size: int) -> None:
        """Adds a value, and drops those whose use is longest ago."""
        self._bytes -= self._values.pop(key, (value, 0))[1]
        self._values[key] = value, size
        self._bytes += size
        while self._bytes > self._most_bytes and len(self._values) > 1:
            _, (_, dropped) = self._values.popitem(last=False)
            self._bytes -= dropped
