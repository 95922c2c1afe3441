"""A bundle: the code of a run as one zip file, named by its digest, and its unpacking on a node.

The same files give the same bytes on every machine: entries are sorted by name, dates and modes are fixed, and nothing
is compressed, because versions of zlib compress differently. So the digest is that of the file itself, and the file can
be checked without being parsed. This module does not know which files belong to a bundle.
"""

import ctypes
import hashlib
import io
import os
import re
import shutil
import stat
import struct
import tempfile
import uuid
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.errors import StorageError, one_line
from cluster.host.scratch import owner

MAX_BYTES = 32 << 20
"""Of all files of a bundle together: code, not data."""
MAX_FILES = 10_000
UNFINISHED, DAMAGED = "-unfinished-", "-damaged-"
"""What follows the digest in the names of folders beside the unpacked bundles."""

_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest that a zip file can express."""
_UNIX = 3
_READ_ONLY = 0o555
_TRIES = 20
_COMPILED = "__pycache__"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
    """Unpacks a bundle into the folder ``below/<sha256>``, which is read-only, and whole or absent at any time.

    A folder that is intact is used as it is. One that is damaged is replaced in one step, and kept beside under another
    name: a process may have it as its working directory, and somebody may have put files there. Any number of processes
    may unpack the same bundle at once. A process that is killed leaves an unfinished folder beside, which nobody uses,
    and whose name tells of which process it is, see ``cluster.host.scratch``.

    Args:
        data: The zip file.
        sha256: Its digest, from a source that is trusted.
        below: Where this user alone can write; it need not exist.

    Returns:
        The folder, for an import path. Files have the mode 0444 or 0555, folders 0555.

    Raises:
        StorageError: The bytes have another digest, are no bundle, or cannot be written.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StorageError(f"code {sha256}: the bytes are not those that were packed; submit the run again")
    target = below / sha256
    if is_intact(target, sha256):
        return target
    files = _read_zip(data, sha256)
    try:
        below.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{sha256}{UNFINISHED}{owner()}", dir=below))
        try:
            _write(files, unfinished)
            _put_in_place(unfinished, target, sha256)
        finally:
            remove_folder(unfinished)
    except OSError as error:
        raise StorageError(
            f"code {sha256}: cannot be unpacked into {below}, {error.strerror}; make room or give access there"
        ) from error
    return target


def is_intact(folder: Path, sha256: str) -> bool:
    """Whether a folder holds exactly the files of a bundle: no other names, contents or executable bits.

    Every file is read and the bundle is made of them again: names, sizes and dates would not show an edit that keeps
    the size. That takes a fraction of a second for the largest bundle. Permissions prove nothing, because root ignores
    them. What Python has compiled there, as root, does not count: it does so from the files that are checked here.
    """
    try:
        files = _read_folder(folder)
        return files is not None and make_bundle(files).sha256 == sha256
    except (OSError, ValueError):  # ValueError: a name that is not UTF-8
        return False


def _read_folder(folder: Path) -> dict[str, CodeFile] | None:
    """The files of a folder by name; None if it is no folder that was unpacked from a bundle.

    Raises:
        OSError: A part of it cannot be read.
    """
    if folder.is_symlink():
        return None
    files: dict[str, CodeFile] = {}
    size = 0
    for parent, folders, names in os.walk(folder, onerror=_raise):
        if any(os.path.islink(os.path.join(parent, name)) for name in folders):
            return None
        folders[:] = [name for name in folders if name != _COMPILED]
        for name in names:
            path = os.path.join(parent, name)
            # Neither a link is followed, nor is a pipe waited for.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                size += status.st_size
                if not stat.S_ISREG(status.st_mode) or size > MAX_BYTES or len(files) == MAX_FILES:
                    return None
                files[os.path.relpath(path, folder)] = CodeFile(file.read(), bool(status.st_mode & stat.S_IXUSR))
    return files


def _raise(error: OSError) -> None:
    raise error


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
            os.fchmod(out.fileno(), _mode(file) & _READ_ONLY)
            os.fsync(out.fileno())
    for parent, _, _ in os.walk(folder):
        os.chmod(parent, 0o555)


def _put_in_place(unfinished: Path, target: Path, sha256: str) -> None:
    """Renames a folder that is written, unless another process has done so first."""
    with suppress(OSError):  # what is in the way may be moved at any moment
        os.rename(unfinished, target)
        return
    if is_intact(target, sha256):
        return
    aside = target.with_name(f"{sha256}{DAMAGED}{uuid.uuid4().hex[:8]}")
    if _exchange(unfinished, target):
        if not is_intact(unfinished, sha256):  # else another process has just repaired it, and one of the two may go
            os.rename(unfinished, aside)
            os.utime(aside, follow_symlinks=False)  # since when it is kept
        return
    for attempt in range(_TRIES):  # others may do the same at the same time, and put aside what this one puts there
        with suppress(FileNotFoundError):
            os.rename(target, f"{aside}-{attempt}")
            os.utime(f"{aside}-{attempt}", follow_symlinks=False)
        try:
            os.rename(unfinished, target)
            return
        except OSError:
            if is_intact(target, sha256):
                return
            if attempt == _TRIES - 1:
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names, so that neither is missing for a moment; False if this system or file system cannot.

    Source: renameat2(2). Linux since 3.15; NFS, for one, does not.
    """
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def remove_folder(folder: Path) -> None:
    """Removes a folder that may be read-only, or what is in its place; never raises."""
    if folder.is_symlink() or not folder.is_dir():
        with suppress(OSError):
            folder.unlink()
        return
    for parent, _, _ in os.walk(folder):
        with suppress(OSError):
            os.chmod(parent, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _read_zip(data: bytes, sha256: str) -> dict[str, CodeFile]:
    """The files of a bundle by name, if it is one that ``make_bundle`` could have made."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            problem = _problem(entries)
            if problem:
                raise StorageError(f"code {sha256}: {problem}; submit the run again")
            files = {
                entry.filename: CodeFile(archive.read(entry), bool(entry.external_attr >> 16 & stat.S_IXUSR))
                for entry in entries
            }
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error) as error:
        raise StorageError(f"code {sha256}: is no zip file, {one_line(error)}; submit the run again") from error
    if make_bundle(files).sha256 != sha256:  # it could not be told from a damaged one once it is unpacked
        raise StorageError(f"code {sha256}: was packed in another way; submit the run again")
    return files


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
        if _COMPILED in path.parts[:-1]:
            return f"holds {name!r}, which is compiled code"
        if not stat.S_ISREG(entry.external_attr >> 16):
            return f"holds {name!r}, which is not a regular file"
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            return f"holds {name!r} compressed or encrypted"
        seen.add(name)
    return None
