"""Columns of Parquet files in a store, read by ranges: the footer of a file, then the chunks of the columns asked for.

The store makes all requests, with its time limits and retries; pyarrow decodes what they brought, in the thread that
asks. So nothing else of a file is read, and a process that was forked needs none of pyarrow's threads.
"""

import io
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import listed, nearest, one_line
from cluster.storage.store import ByteRange, MissingObject, Store

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAGIC = b"PAR1"
_TAIL = 2**16
"""Bytes at the end of a file that usually hold all of its footer."""
_AT_ONCE = 2**26
"""Bytes of column chunks that are read before they are decoded."""
_GROUPS_AT_ONCE = 1024
"""Row groups of which column chunks are read before they are decoded."""


@dataclass(frozen=True, slots=True)
class Footer:
    """What a Parquet file says of itself."""

    name: str
    """Of the file in its store."""
    size: int
    """Of the file, in bytes."""
    metadata: "pq.FileMetaData"
    schema: "pa.Schema"

    @property
    def num_groups(self) -> int:
        """The number of row groups."""
        return int(self.metadata.num_row_groups)

    @property
    def num_rows(self) -> int:
        """The number of rows of the file."""
        return int(self.metadata.num_rows)

    def rows_in(self, group: int) -> int:
        """Returns the number of rows of a row group."""
        return int(self.metadata.row_group(group).num_rows)

    def chunk(self, group: int, leaf: str) -> "pq.ColumnChunkMetaData":
        """Returns what the footer says of a column in a row group.

        Args:
            group: The number of the row group.
            leaf: The column; the field of a struct is ``COLUMN.FIELD``.
        """
        row_group = self.metadata.row_group(group)
        # The Parquet column of a list has more parts: COLUMN.list.element.
        return next(
            chunk
            for chunk in map(row_group.column, range(row_group.num_columns))
            if chunk.path_in_schema == leaf or chunk.path_in_schema.startswith(f"{leaf}.")
        )

    def range_of(self, group: int, leaf: str) -> ByteRange:
        """Returns where a column of a row group lies."""
        chunk = self.chunk(group, leaf)
        begin = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            begin = min(begin, chunk.dictionary_page_offset)
        return ByteRange(self.name, begin, chunk.total_compressed_size)

    def class_names(self, column: str) -> list[str] | None:
        """Returns the names of the classes that Hugging Face's ``datasets`` wrote for a column; None: it wrote none."""
        try:
            features = json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[column]["names"]
        except (KeyError, TypeError, ValueError):  # of another tool, or of another feature
            return None
        return list(map(str, names)) if isinstance(names, list) else None


def read_footers(store: Store, files: Mapping[str, int]) -> list[Footer | str]:
    """Reads the footers of files with one request each, or two if they are long; the requests are concurrent.

    Args:
        store: Holds the files.
        files: The size of each, by name.

    Returns:
        For each file its footer, or why it cannot be read, to follow its URL and a colon.

    Raises:
        StorageError: The store does not answer.
    """
    # One byte more than there was, to notice a file that grew.
    begins = {name: max(0, size - _TAIL) for name, size in files.items()}
    ranges = [ByteRange(name, begins[name], size - begins[name] + 1) for name, size in files.items()]
    tails = dict(zip(files, store.read_ranges(ranges)))
    problems = {name: _problem(tail, files[name] - begins[name]) for name, tail in tails.items()}
    lengths = {name: _footer_size(tails[name]) for name, problem in problems.items() if not problem}
    long = [name for name, length in lengths.items() if files[name] - begins[name] < length <= files[name]]
    ranges = [ByteRange(name, files[name] - lengths[name], lengths[name]) for name in long]
    tails.update(zip(long, store.read_ranges(ranges)))
    return [problems[name] or _parsed(name, size, tails[name]) for name, size in files.items()]


def _problem(tail: bytes | MissingObject, expected: int) -> str:
    """Returns why the end of a file cannot hold its footer; empty: it may."""
    if isinstance(tail, MissingObject):
        return "is gone; restore it"
    if len(tail) != expected:
        return f"is {'longer' if len(tail) > expected else 'shorter'} than when it was listed; restore it"
    if not tail.endswith(_MAGIC):
        return "is no Parquet file; leave it out, or repair it"
    return ""


def _footer_size(tail: bytes | MissingObject) -> int:
    assert isinstance(tail, bytes), "a missing file is a problem"
    return int.from_bytes(tail[-8:-4], "little") + 8


def _parsed(name: str, size: int, tail: bytes | MissingObject) -> Footer | str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(tail, MissingObject):
        return "is gone; restore it"
    try:
        metadata = pq.read_metadata(pa.BufferReader(tail))
        return Footer(name, size, metadata, metadata.schema.to_arrow_schema())
    except MemoryError as error:
        raise _lack_of_memory(name) from error
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read as Parquet, {one_line(error)}; repair or remove it"


def decode_chunks(footer: Footer, group: int, chunks: Mapping[str, bytes]) -> "pa.Table":
    """Decodes columns of a row group.

    Args:
        footer: Of the file.
        group: The number of the row group.
        chunks: By the name of a column, the bytes of its chunk.

    Raises:
        ValueError: They are damaged; it says how, to follow a URL and a comma.
        MemoryError: This host has too little memory; the message names the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = _PartsOfFile({footer.range_of(group, leaf).offset: content for leaf, content in chunks.items()}, footer.size)
    try:
        # Without a buffer before it, pyarrow asks for each chunk as a whole.
        with pq.ParquetFile(file, metadata=footer.metadata, pre_buffer=False) as parquet:
            table = parquet.read_row_group(group, columns=list(chunks), use_threads=False)
        table.validate(full=True)  # text that is not UTF-8, for one
    except MemoryError as error:
        raise _lack_of_memory(footer.name) from error
    except (pa.ArrowException, OSError) as error:
        raise ValueError(one_line(error)) from error
    return table


def read_columns(
    store: Store, footers: Sequence[Footer], columns: Sequence[str], done: Callable[[int], None] = lambda _: None
) -> list["pa.Table"]:
    """Returns columns of files, read in concurrent requests.

    Args:
        store: Holds the files.
        footers: Of the files.
        columns: Their names.
        done: Called with the number of rows that have been read since it was called last.

    Raises:
        ValueError: A file is gone or damaged; or a column is missing.
        StorageError: The store does not answer.
    """
    import pyarrow as pa

    for footer in footers:
        check_columns(f"{store.url}/{footer.name}", columns, footer.schema.names)
    tables: list[list[pa.Table]] = [[] for _ in footers]
    groups = deque((number, group) for number, footer in enumerate(footers) for group in range(footer.num_groups))
    while groups:
        portion: list[tuple[int, int, list[ByteRange]]] = []
        size = 0
        while groups and (not portion or size < _AT_ONCE) and len(portion) < _GROUPS_AT_ONCE:
            number, group = groups.popleft()
            portion.append((number, group, [footers[number].range_of(group, column) for column in columns]))
            size += sum(each.size or 0 for each in portion[-1][-1])
        contents = iter(store.read_ranges([each for _, _, ranges in portion for each in ranges]))
        for number, group, _ in portion:
            url = f"{store.url}/{footers[number].name}"
            chunks: dict[str, bytes] = {}
            for column in columns:
                content = next(contents)
                if isinstance(content, MissingObject):
                    raise ValueError(f"{url}: is gone; restore it")
                chunks[column] = content
            try:
                tables[number].append(decode_chunks(footers[number], group, chunks))
            except ValueError as error:
                raise ValueError(f"{url}: cannot be read as Parquet, {error}; repair or remove it") from error
        done(sum(footers[number].rows_in(group) for number, group, _ in portion))
    empty = [footer.schema.empty_table().select(list(columns)) for footer in footers]
    return [pa.concat_tables(own) if own else none for own, none in zip(tables, empty)]


def _lack_of_memory(name: str) -> MemoryError:
    """Returns the error for a lack of memory, of which Arrow has an exception of its own: no file is bad for it."""
    return MemoryError(f"{name}: too little memory to decode it; give the process more, or remove the file")


def check_columns(url: str, columns: Sequence[str], known: Sequence[str]) -> None:
    """Raises a ValueError unless a table has each of the columns, once."""
    for column in columns:
        if column not in known:
            raise ValueError(f"{url}: has no column {column!r}{nearest(column, known)}; name one of {listed(known)}")
        if known.count(column) > 1:
            raise ValueError(f"{url}: has {known.count(column)} columns {column!r}; rename all but one")


class _PartsOfFile(io.RawIOBase):
    """A file of which some parts are in memory; reading any other is an error.

    Args:
        parts: Their bytes, by the offset of the first.
        size: Of the file.
    """

    def __init__(self, parts: Mapping[int, bytes], size: int) -> None:
        self._parts, self._size, self._at = parts, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        for begin, content in self._parts.items():
            if begin <= self._at and 0 <= size <= begin + len(content) - self._at:
                first, self._at = self._at - begin, self._at + size
                return content[first : first + size]  # no copy if it is all of them
        raise OSError(f"a column should end at byte {self._at + size}, and does not")

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
