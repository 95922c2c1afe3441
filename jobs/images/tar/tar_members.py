"""The members of a tar file that lies in a store: their headers are read, and what they hold is passed over.

It reads what GNU tar, Python's tarfile and WebDataset write: ustar, GNU and PAX headers. It knows nothing of stores: a
generator yields the ranges that it needs, so that one thread reads many files at once.
"""

import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

from cluster.storage.store import ByteRange
from cluster.storage.stored_objects import StoredObject

T = TypeVar("T")
Reads = Generator[ByteRange, bytes, T]
"""Yields a range of an object and is sent its bytes, again and again; returns a result."""

READ_AHEAD = 2**20
"""The bytes that are read at a time: about as many as a connection of an object store moves while it would wait for
another request."""
READ_BEHIND_LARGE = 2**18
"""The bytes that are read where more than that was stepped over: the next members are probably as large."""

_BLOCK = 512
_END = bytes(_BLOCK)
_MOST_PADDING = 2**20
"""Zeros behind the end of a tar file, in bytes: writers fill up their last record."""
_MOST_EXTRA = 2**20
"""Bytes of a long name, or of a PAX header."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_LARGEST = 2**62
_HEADER = struct.Struct("100s24x12s12x8s1s100x6s82x155s12x")
_FILES = (b"0", b"\0", b"7")
_KINDS: dict[bytes, Literal["link", "folder"]] = {b"1": "link", b"2": "link", b"5": "folder"}
_HAVE_NO_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a tar file."""

    name: str
    """Bytes that are no UTF-8 are surrogates, as in names of files."""
    kind: Literal["file", "link", "folder", "special file"]
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
        long_name, own = b"", dict[str, bytes]()
        while True:
            begin = self._next
            block = yield from self._read(begin, _BLOCK, "a header")
            if block == _END:
                yield from self._check_end(begin)
                return None
            name, size, kind = self._parse(block)
            self._next = begin + _BLOCK
            if kind not in (b"L", b"K", b"x", b"X", b"g"):
                return self._member(long_name or name, size, kind, self._for_all | own)
            extra = yield from self._extra(size)
            if kind == b"L":
                long_name = extra.partition(b"\0")[0]
            elif kind == b"g":
                self._for_all |= self._records(extra)
            elif kind != b"K":  # which has the target of a link
                own |= self._records(extra)

    def content(self, member: TarMember) -> Reads[bytes]:
        """Reads what a member holds."""
        content = yield from self._read(member.offset, member.size, member.name)
        return content

    def _member(self, name: bytes, size: int, kind: bytes, records: dict[str, bytes]) -> TarMember:
        text = (records.get("path") or name).decode("utf-8", "surrogateescape")
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in records):
            raise ValueError(f"{self._url}: {text} is stored as a sparse file; write it without tar's --sparse")
        if "size" in records:
            size = self._decimal(records["size"])
        offset = self._next
        if kind not in _HAVE_NO_CONTENT:
            self._next = offset + _padded(size)
            if offset + size > self._file.size:
                self._fail(f"{text} ends at byte {offset + size}")
        if kind in _FILES and not (kind == b"\0" and text.endswith("/")):
            return TarMember(text, "file", offset, size)
        return TarMember(text, "folder" if kind == b"\0" else _KINDS.get(kind, "special file"), offset, 0)

    def _parse(self, block: bytes) -> tuple[bytes, int, bytes]:
        """Returns the name, size and type of a member."""
        name, size, checksum, kind, magic, prefix = _HEADER.unpack(block)
        if _number(checksum) != sum(block) - sum(checksum) + 8 * ord(" "):
            if self._next:
                raise ValueError(f"{self._url}: is damaged at byte {self._next}, a checksum is wrong; restore it")
            for begin, program in _COMPRESSED.items():
                if block.startswith(begin):
                    raise ValueError(f"{self._url}: is compressed with {program}; {UNPACK}")
            raise ValueError(f"{self._url}: is no tar file; restore it, or name other shards")
        num_bytes = _number(size)
        if not 0 <= num_bytes < _LARGEST:
            raise ValueError(f"{self._url}: is damaged at byte {self._next}, a size is wrong; restore it")
        name = name.partition(b"\0")[0]
        # GNU tar has other fields there, and POSIX a prefix.
        if magic == b"ustar\0" and prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
        return name, num_bytes, kind

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
            end = begin + self._decimal(digits)
            key, equals, value = content[begin + len(digits) + 1 : end - 1].partition(b"=")
            if not equals or content[end - 1 : end] != b"\n":
                self._decimal(b"")
            records[key.decode("utf-8", "surrogateescape")] = value
            begin = end
        return records

    def _decimal(self, digits: bytes) -> int:
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
            stepped_over = begin - self._begin - len(self._buffer)
            ahead = READ_AHEAD if stepped_over <= READ_BEHIND_LARGE else READ_BEHIND_LARGE
            most = min(max(size, ahead), self._file.size - begin)
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


def _number(field: bytes) -> int:
    """Returns what a field of a header holds, octal digits or bytes; -1: neither."""
    if field[0] & 0x80:
        return int.from_bytes(field) - (1 << (8 * len(field) - 1))
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else -1 if digits else 0
    except ValueError:
        return -1
