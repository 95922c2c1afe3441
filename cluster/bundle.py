"""A bundle: the code of a run as one zip file, named by its digest, and its unpacking on a node.

The same files give the same bytes on every machine: entries are sorted by name, dates and modes are fixed, and nothing
is compressed, because versions of zlib compress differently. So the digest is that of the file itself, and the file can
be checked without being parsed. This module does not know which files belong to a bundle.
"""

import hashlib
import io
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.errors import StorageError, one_line

MAX_BYTES = 32 << 20
"""Of all files of a bundle together: code, not data."""
MAX_FILES = 10_000

_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest that a zip file can express."""
_UNIX = 3


@dataclass(frozen=True, slots=True)
class CodeFile:
    """One file of a bundle."""

    data: bytes
    executable: bool


@dataclass(frozen=True, slots=True)
class Bundle:
    """The code of a run."""

    sha256: str
    """Of the bytes, in lower-case hexadecimal."""
    data: bytes
    """A zip file."""
    names: tuple[str, ...]
    """The files in it, sorted: relative paths with forward slashes."""


def make_bundle(files: Mapping[str, CodeFile]) -> Bundle:
    """Packs files into a bundle; the names are relative paths with forward slashes."""
    names, buffer = tuple(sorted(files)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name, _DATE)
            info.create_system = _UNIX
            info.external_attr = (stat.S_IFREG | _mode(files[name])) << 16
            archive.writestr(info, files[name].data)
    data = buffer.getvalue()
    return Bundle(hashlib.sha256(data).hexdigest(), data, names)


def check_digest(sha256: str) -> None:
    """Makes sure that a text is a digest, and so a plain name: it may come from a document that others could write.

    Raises:
        StorageError: It is not.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise StorageError(f"code {sha256!r}: is no SHA-256 digest; submit the run again")


def unpack(data: bytes, sha256: str, below: Path) -> Path:
    """Unpacks a bundle into the folder ``below/<sha256>``, which is whole or absent at any time.

    A folder that is there already is used as it is. Any number of processes may unpack the same bundle at once. A
    process that is killed leaves an unfinished folder beside, which nobody uses.

    Args:
        data: The zip file.
        sha256: Its digest, from a source that is trusted.
        below: Where this user alone can write; it need not exist.

    Returns:
        The folder, for an import path. Files have the mode 0644 or 0755.

    Raises:
        StorageError: The bytes have another digest, are no bundle, or cannot be written.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StorageError(f"code {sha256}: the bytes are not those that were packed; submit the run again")
    target = below / sha256
    if target.is_dir():
        return target
    files = _read_zip(data, sha256)
    try:
        below.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{sha256}-unfinished-", dir=below))
        try:
            _write(files, unfinished)
            _rename(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"code {sha256}: cannot be unpacked into {below}, {error.strerror}; make room or give access there"
        ) from error
    return target


def _mode(file: CodeFile) -> int:
    return 0o755 if file.executable else 0o644


def _write(files: Mapping[str, CodeFile], folder: Path) -> None:
    """Writes files with their modes, whatever the umask, through to the disk: a rename may outlive a loss of power."""
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as out:
            out.write(file.data)
            out.flush()
            os.fchmod(out.fileno(), _mode(file))
            os.fsync(out.fileno())
    for parent, _, _ in os.walk(folder):
        os.chmod(parent, 0o755)


def _rename(unfinished: Path, target: Path) -> None:
    """Renames a folder, unless another process has done so first."""
    try:
        os.rename(unfinished, target)
    except OSError:
        if not target.is_dir():
            raise


def _read_zip(data: bytes, sha256: str) -> dict[str, CodeFile]:
    """The files of a bundle by name, if it is one that ``make_bundle`` could have made."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            problem = _problem(entries)
            if problem:
                raise StorageError(f"code {sha256}: {problem}; submit the run again")
            return {
                entry.filename: CodeFile(archive.read(entry), bool(entry.external_attr >> 16 & stat.S_IXUSR))
                for entry in entries
            }
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error) as error:
        raise StorageError(f"code {sha256}: is no zip file, {one_line(error)}; submit the run again") from error


def _problem(entries: list[zipfile.ZipInfo]) -> str | None:
    """What is wrong with a bundle, by its list of entries; no entry has been read."""
    size = sum(entry.file_size for entry in entries)
    if size > MAX_BYTES or len(entries) > MAX_FILES:
        return f"declares {size:,} bytes in {len(entries):,} files, the limits are {MAX_BYTES:,} and {MAX_FILES:,}"
    seen: set[str] = set()
    for entry in entries:
        name = entry.orig_filename  # zipfile cuts its ``filename`` off at a NUL
        path = PurePosixPath(name)
        if not path.parts or ".." in path.parts or path.is_absolute() or str(path) != name or "\0" in name:
            return f"holds the name {name!r}, which is not a plain relative path"
        if name in seen:
            return f"holds {name!r} twice"
        if not stat.S_ISREG(entry.external_attr >> 16):
            return f"holds {name!r}, which is not a regular file"
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            return f"holds {name!r} compressed or encrypted"
        seen.add(name)
    return None
