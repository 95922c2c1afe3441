"""The members of a tar file that lies in a store: their headers are read, and what they hold is passed over.

It reads what GNU tar, Python's tarfile and WebDataset write: ustar, GNU and PAX headers. It knows nothing of stores: a
generator yields the ranges that it needs, so that one thread reads many files at once.
"""

import tarfile
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

from cluster.storage.store import ByteRange, StoredObject

T = TypeVar("T")
Reads = Generator[ByteRange, bytes, T]
"""Yields a range of an object and is sent its bytes, again and again; returns a result."""

READ_AHEAD = 2**18
"""The bytes that are read at a time: about as many as a connection of an object store moves while it would wait for
another request."""

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(_BLOCK)
_MOST_PADDING = 2**20
"""Zeros behind the end of a tar file, in bytes: writers fill up their last record."""
_MOST_EXTRA = 2**20
"""Bytes of a long name, or of a PAX header."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a tar file."""

    name: str
    """Bytes that are no UTF-8 are surrogates, as in names of files."""
    kind: Literal["file", "link", "folder", "device"]
    offset: int
    """Of its first byte in the tar file."""
    size: int


class TarReader:
    """Reads the members of a tar file, one after the other.

    Each method is a generator, see ``Reads``.

    Args:
        url: Of the file, for errors.
        file: As a listing describes it.
    """

    def __init__(self, url: str, file: StoredObject) -> None:
        self._url, self._file = url, file
        self._next = 0
        """The position of the next header."""
        self._begin, self._buffer = 0, b""
        self._for_all: dict[str, bytes] = {}
        """The records of global PAX headers."""

    def next_member(self) -> Reads[TarMember | None]:
        """Reads the header of the next member; None: there is no other.

        Raises:
            ValueError: The file is damaged, truncated, compressed or no tar file, or the member is sparse.
        """
        long_name, records = b"", dict(self._for_all)
        while True:
            begin = self._next
            block = yield from self._read(begin, _BLOCK, "a header")
            if block == _END:
                yield from self._check_end(begin)
                return None
            header = self._parse(block)
            self._next = begin + _BLOCK
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                extra = yield from self._extra(header.size)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = extra.partition(b"\0")[0]
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extra = yield from self._extra(header.size)
                records |= self._records(extra)
            elif header.type == tarfile.XGLTYPE:
                extra = yield from self._extra(header.size)
                self._for_all |= self._records(extra)
                records = self._for_all | records
            else:
                return self._member(header, long_name, records)

    def content(self, member: TarMember) -> Reads[bytes]:
        """Reads what a member holds."""
        content = yield from self._read(member.offset, member.size, member.name)
        return content

    def _member(self, header: tarfile.TarInfo, long_name: bytes, records: dict[str, bytes]) -> TarMember:
        named = records.get("path", long_name)
        name = named.decode("utf-8", "surrogateescape") if named else header.name
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records):
            raise ValueError(f"{self._url}: {name} is stored as a sparse file; write it without tar's --sparse")
        size = self._number(records["size"]) if "size" in records else header.size
        offset = self._next
        # Only members of a known kind that are no files have no content, whatever their size.
        if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES:
            self._next = offset + _padded(size)
        if offset + size > self._file.size and self._next > offset:
            self._fail(f"{name} ends at byte {offset + size}")
        if header.isreg():
            return TarMember(name, "file", offset, size)
        return TarMember(name, "link" if header.type in _LINKS else "folder" if header.isdir() else "device", offset, 0)

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if self._next:
                raise ValueError(f"{self._url}: is damaged at byte {self._next}, {error}; restore it") from error
            for magic, program in _COMPRESSED.items():
                if block.startswith(magic):
                    raise ValueError(f"{self._url}: is compressed with {program}; {UNPACK}") from error
            raise ValueError(f"{self._url}: is no tar file, {error}; restore it, or name other shards") from error
        if header.size < 0:
            raise ValueError(f"{self._url}: is damaged at byte {self._next}, a size is negative; restore it")
        return header

    def _extra(self, size: int) -> Reads[bytes]:
        """Reads what a header of a header holds, and steps over it."""
        if size > _MOST_EXTRA:
            raise ValueError(f"{self._url}: is damaged at byte {self._next}, a name has {size} bytes; restore it")
        extra = yield from self._read(self._next, size, "a long header")
        self._next += _padded(size)
        return extra

    def _records(self, content: bytes) -> dict[str, bytes]:
        """Returns the records of a PAX header, each ``LENGTH KEY=VALUE`` and a new line."""
        records: dict[str, bytes] = {}
        begin = 0
        while begin < len(content) and content[begin]:
            digits = content[begin : begin + 20].partition(b" ")[0]
            end = begin + self._number(digits)
            key, equals, value = content[begin + len(digits) + 1 : end - 1].partition(b"=")
            if not equals or content[end - 1 : end] != b"\n":
                self._number(b"")
            records[key.decode("utf-8", "surrogateescape")] = value
            begin = end
        return records

    def _number(self, digits: bytes) -> int:
        if not digits.isdigit() or len(digits) > 20:
            raise ValueError(f"{self._url}: is damaged at byte {self._next}, a PAX header is wrong; restore it")
        return int(digits)

    def _check_end(self, begin: int) -> Reads[None]:
        """Raises a ValueError unless only zeros follow."""
        left = self._file.size - begin
        padding = yield from self._read(begin, min(left, _MOST_PADDING), "the end")
        if left > _MOST_PADDING or any(padding):
            raise ValueError(
                f"{self._url}: ends at byte {begin}, but {left} bytes follow; restore it, and join tar files with "
                "tar --concatenate"
            )

    def _read(self, begin: int, size: int, what: str) -> Reads[bytes]:
        if begin + size > self._file.size:
            self._fail(f"{what} ends at byte {begin + size}")
        if begin < self._begin or begin + size > self._begin + len(self._buffer):
            most = min(max(size, READ_AHEAD), self._file.size - begin)
            self._begin, self._buffer = begin, (yield ByteRange(self._file.name, begin, most))
            if len(self._buffer) < most:
                self._fail(f"it ended at byte {begin + len(self._buffer)} when it was read")
        return self._buffer[begin - self._begin : begin - self._begin + size]

    def _fail(self, why: str) -> NoReturn:
        raise ValueError(f"{self._url}: is truncated, it has {self._file.size} bytes and {why}; restore it")


UNPACK = "decompress it, because samples of a compressed file cannot be read by themselves"
"""What to do with a compressed tar file."""


def _padded(size: int) -> int:
    """Returns the bytes of whole blocks that hold ``size`` bytes."""
    return -(-size // _BLOCK) * _BLOCK
