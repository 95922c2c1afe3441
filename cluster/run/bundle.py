"""A bundle: the code of a run as one zip file, named by its digest, and its unpacking on a node.

The same files give the same bytes on every machine: entries are sorted by name, dates and modes are fixed, and nothing
is compressed, because versions of zlib compress differently. So the digest is that of the zip file itself, and the file
can be verified without being parsed. This module does not know which files belong to a bundle.
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
"""Limit on the total size of a bundle's files: code, not data."""
MAX_FILES = 10_000
UNFINISHED, DAMAGED = "-unfinished-", "-damaged-"
"""Follow the digest in the names of folders beside the unpacked bundles."""

_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest date that a zip file can hold."""
_ZIP_UNIX = 3
_READ_ONLY = 0o555
_RENAME_TRIES = 20
_BYTECODE_FOLDER = "__pycache__"
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
    """Digest of ``data``, in lower-case hexadecimal."""
    data: bytes
    """The zip file."""
    names: tuple[str, ...]
    """Names of the files, sorted: relative paths with forward slashes."""


def make_bundle(files: Mapping[str, CodeFile]) -> Bundle:
    """Packs files into a bundle. Their names are relative paths with forward slashes."""
    names, buffer = tuple(sorted(files)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name, _ZIP_DATE)
            info.create_system = _ZIP_UNIX
            info.external_attr = (stat.S_IFREG | _mode(files[name])) << 16
            archive.writestr(info, files[name].data)
    data = buffer.getvalue()
    return Bundle(hashlib.sha256(data).hexdigest(), data, names)


def check_digest(sha256: str) -> None:
    """Checks that a text is a digest, and so a plain name: it may come from a document that others can write.

    Raises:
        StorageError: It is not.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise StorageError(f"code {sha256!r}: is no SHA-256 digest; submit the run again")


def unpack(data: bytes, sha256: str, below: Path) -> Path:
    """Unpacks a bundle into the read-only folder ``below/<sha256>``, which is whole or absent at any time.

    An intact folder is used as it is. A damaged one is replaced in one step and kept beside it under another name: a
    process may have it as its working directory, and somebody may have put files there. Any number of processes may
    unpack the same bundle at once. A killed process leaves an unfinished folder, which nobody uses; its name identifies
    the process, see ``cluster.host.scratch``.

    Args:
        data: The zip file.
        sha256: Its digest, from a trusted source.
        below: A folder that only this user can write to; it need not exist.

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
    """Returns whether a folder holds exactly the files of a bundle: no other names, contents or executable bits.

    It reads every file and builds the bundle again: names, sizes and dates would not show an edit that keeps the size.
    That takes a fraction of a second for the largest bundle. Permissions prove nothing, because root ignores them.
    Bytecode that Python, run by root, has written there is ignored: Python compiled it from the files that are checked
    here.
    """
    try:
        files = _read_folder(folder)
        return files is not None and make_bundle(files).sha256 == sha256
    except (OSError, ValueError):  # ValueError: a name that is not UTF-8
        return False


def _read_folder(folder: Path) -> dict[str, CodeFile] | None:
    """Returns the files of a folder by name; None if it cannot be an unpacked bundle.

    Raises:
        OSError: A file or folder in it cannot be read.
    """
    if folder.is_symlink():
        return None
    files: dict[str, CodeFile] = {}
    size = 0
    for parent, folders, names in os.walk(folder, onerror=_reraise):
        if any(os.path.islink(os.path.join(parent, name)) for name in folders):
            return None
        folders[:] = [name for name in folders if name != _BYTECODE_FOLDER]
        for name in names:
            path = os.path.join(parent, name)
            # Follow no link, and do not block on a pipe.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                size += status.st_size
                if not stat.S_ISREG(status.st_mode) or size > MAX_BYTES or len(files) == MAX_FILES:
                    return None
                files[os.path.relpath(path, folder)] = CodeFile(file.read(), bool(status.st_mode & stat.S_IXUSR))
    return files


def _reraise(error: OSError) -> None:
    raise error


def _mode(file: CodeFile) -> int:
    return 0o755 if file.executable else 0o644


def _write(files: Mapping[str, CodeFile], folder: Path) -> None:
    """Writes files with fixed modes and syncs them to disk: the later rename may survive a power loss."""
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
    """Renames the unfinished folder to its name, unless another process has done so first."""
    with suppress(OSError):  # a folder has the name, or had it a moment ago: see below
        os.rename(unfinished, target)
        return
    if is_intact(target, sha256):
        return
    aside = target.with_name(f"{sha256}{DAMAGED}{uuid.uuid4().hex[:8]}")
    if _exchange(unfinished, target):
        if not is_intact(unfinished, sha256):  # else another process has just repaired it: drop this copy
            os.rename(unfinished, aside)
            os.utime(aside, follow_symlinks=False)  # the time from which it is kept
        return
    for attempt in range(_RENAME_TRIES):  # another process may move aside what this one puts in place
        with suppress(FileNotFoundError):
            os.rename(target, f"{aside}-{attempt}")
            os.utime(f"{aside}-{attempt}", follow_symlinks=False)
        try:
            os.rename(unfinished, target)
            return
        except OSError:
            if is_intact(target, sha256):
                return
            if attempt == _RENAME_TRIES - 1:
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names atomically; returns False if this system or file system cannot.

    Source: renameat2(2). In Linux since 3.15; NFS, for one, lacks it.
    """
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    status: int = function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return status == 0


def remove_folder(folder: Path) -> None:
    """Removes a folder that may be read-only, or whatever has its name. Never raises."""
    if folder.is_symlink() or not folder.is_dir():
        with suppress(OSError):
            folder.unlink()
        return
    for parent, _, _ in os.walk(folder):
        with suppress(OSError):
            os.chmod(parent, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _read_zip(data: bytes, sha256: str) -> dict[str, CodeFile]:
    """Returns the files of a bundle by name, if ``make_bundle`` could have made it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            problem = _find_problem(entries)
            if problem:
                raise StorageError(f"code {sha256}: {problem}; submit the run again")
            files = {
                entry.filename: CodeFile(archive.read(entry), bool(entry.external_attr >> 16 & stat.S_IXUSR))
                for entry in entries
            }
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, struct.error) as error:
        raise StorageError(f"code {sha256}: is no zip file, {one_line(error)}; submit the run again") from error
    if make_bundle(files).sha256 != sha256:  # once unpacked, it would look damaged
        raise StorageError(f"code {sha256}: was packed in another way; submit the run again")
    return files


def _find_problem(entries: list[zipfile.ZipInfo]) -> str | None:
    """Returns what is wrong with a bundle according to its list of entries, before any entry is read."""
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
        if _BYTECODE_FOLDER in path.parts[:-1]:
            return f"holds {name!r}, which is compiled code"
        if not stat.S_ISREG(entry.external_attr >> 16):
            return f"holds {name!r}, which is not a regular file"
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            return f"holds {name!r} compressed or encrypted"
        seen.add(name)
    return None
