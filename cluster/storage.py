"""A directory at an fsspec URL: whole objects written, read, listed and deleted, and nothing else.

The only module that knows fsspec. No rename, no append, no directory that has to exist, no cached listing:
SFTP and S3 differ in all of them. What a file system raises leaves here as a ``StorageError`` of one line.
Credentials come from the environment of the process that uses a store; neither a URL nor a pickle holds any.
"""

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator

import fsspec
from fsspec.core import url_to_fs

from cluster.errors import StorageError, nearest

# Where an object needs its folder first. On an object store a folder is never made: there mkdir makes buckets,
# so that a misspelt one would come into being.
_WITH_FOLDERS = frozenset({"file", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"})

# The extra of this package that brings the file system of a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "sftp": "sftp", "ssh": "sftp"}

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class MissingObject(StorageError):  # noqa: N818 - it says what is so, as FileNotFound does
    """The store answers, and holds no object of that name."""


class Store:
    """A directory of objects; ``url`` is an absolute path when it lies on this machine's file system.

    Names are relative, with ``/`` between their parts. A store is picklable, and may be used after a fork.

    Raises:
        StorageError: The URL makes no sense here, names a password, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = _canonical_url(url)
        self._protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        self._with_folders = self._protocol in _WITH_FOLDERS
        _require(self._protocol, self.url)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.url,)

    @property
    def is_shared(self) -> bool:
        """Whether another process that opens this URL sees the same objects."""
        return self._protocol != "memory"

    def at(self, *parts: str) -> "Store":
        """The store of a folder below this one; the folder need not exist."""
        root = self.url if self.url.endswith("/") else f"{self.url}/"
        return Store(root + "/".join(self._plain(part) for part in parts))

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole object over whatever had this name.

        A process killed in here leaves the old object, the new one, or, on a store with folders, a torn one.
        """
        with self._errors_of(f"write {name}"):
            fs, path = self._locate(name)
            try:
                fs.pipe_file(path, data)
            except FileNotFoundError:
                if not self._with_folders:
                    raise
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                fs.pipe_file(path, data)

    def read(self, name: str) -> bytes:
        """The whole object.

        Raises:
            MissingObject: There is none of this name.
        """
        with self._errors_of(f"read {name}"):
            fs, path = self._locate(name)
            try:
                return fs.cat_file(path)
            except _ABSENT as error:
                raise MissingObject(f"{self.url}: holds no {name}; check the URL") from error

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name; a folder is none."""
        with self._errors_of(f"look for {name}"):
            fs, path = self._locate(name)
            try:
                # Not fs.exists: it takes every error, also a refused password, for "no".
                return fs.info(path)["type"] != "directory"
            except _ABSENT:
                return False

    def names(self, folder: str = "") -> list[str]:
        """The names of all objects below a folder, at any depth, sorted; empty when there is no such folder."""
        with self._errors_of(f"list {folder or 'it'}"):
            fs, root = self._locate()
            path = self._locate(folder.rstrip("/"))[1] if folder else root
            # fs.find is one flat listing on an object store; elsewhere it walks, and skips folders it may not read.
            found = _walk(fs, path) if self._with_folders else _flat(fs, path)
            below = root.rstrip("/") + "/"
            # A name that ends in / is a placeholder that some tools leave to show an empty folder.
            return sorted(name.removeprefix(below) for name in found if not name.endswith("/"))

    def folders(self) -> list[str]:
        """The names of the folders directly in this one, sorted."""
        with self._errors_of("list it"):
            fs, root = self._locate()
            return sorted(_base(entry) for entry in _entries(fs, root) if entry["type"] == "directory")

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects in the order given; one that is not there counts as deleted.

        Where there are folders, those below this store that are empty then go too.
        """
        parents: set[str] = set()
        for name in names:
            with self._errors_of(f"delete {name}"):
                fs, path = self._locate(name)
                with contextlib.suppress(*_ABSENT):
                    fs.rm_file(path)
            parts = name.split("/")[:-1]
            parents.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        if self._with_folders:
            for folder in sorted(parents, key=lambda name: name.count("/"), reverse=True):
                self._remove_if_empty(folder)

    def probe(self) -> None:
        """Writes, reads and deletes one small object.

        Raises:
            StorageError: Which of the three failed, why, and what to do.
        """
        name = f"probe-{uuid.uuid4().hex}"
        self.write(name, name.encode())
        try:
            if self.read(name) != name.encode():
                raise StorageError(f"{self.url}: gives back other bytes than were written; use another store")
        finally:
            self.delete([name])

    def _locate(self, name: str = "") -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system and the path of an object on it.

        Asked of fsspec each time: it keeps one instance per process, and per thread where a connection needs
        that, so a forked child never talks through the connection of its parent.
        """
        if self._protocol == "file":
            fs, root = fsspec.filesystem("file"), self.url
        else:
            # A cached listing hides what others write. SFTP caches none, and takes every option for its own.
            options = {} if self._with_folders else {"use_listings_cache": False}
            fs, root = url_to_fs(self.url, **options)
        return fs, f"{root.rstrip('/')}/{self._plain(name)}" if name else root

    def _plain(self, name: str) -> str:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise StorageError(f"{self.url}: {name!r} is no name of an object; use a relative name without '..'")
        return name

    def _remove_if_empty(self, folder: str) -> None:
        with self._errors_of(f"remove the empty folder {folder}"):
            fs, path = self._locate(folder)
            with contextlib.suppress(FileNotFoundError):
                try:
                    fs.rmdir(path)
                except OSError:
                    # Not empty, the usual case, has no error of its own on SFTP: look. Anything else is a fault.
                    if not fs.ls(path, detail=False):
                        raise

    @contextlib.contextmanager
    def _errors_of(self, action: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:  # the border to fsspec: every file system raises its vendor's own errors
            raise StorageError(f"{self.url}: cannot {action}: {_reason(error)}; {_advice(error)}") from error


def _canonical_url(url: str) -> str:
    """The one spelling of a store's place, good in any working directory."""
    protocol, is_url, rest = url.partition("://")
    if "::" in url:
        raise StorageError(f"{url}: is a chain of file systems; write the URL of the store itself")
    if not is_url:
        if re.match(r"[A-Za-z][\w+.-]*:/", url):
            raise StorageError(f"{url}: is neither a URL nor a folder; write {url.replace(':/', '://', 1)}")
        return os.path.abspath(os.path.expanduser(url))
    protocol = protocol.lower()
    if protocol in ("file", "local"):
        return os.path.abspath(rest)
    user, _, host = rest.partition("/")[0].rpartition("@")
    if ":" in user:
        raise StorageError(
            f"{protocol}://{host}: a store's URL must not hold a password, it is written down and handed on; "
            f"use a key, or set FSSPEC_{protocol.upper()}_PASSWORD"
        )
    if not rest.strip("/") and protocol != "memory":
        raise StorageError(f"{url}: names no place; write {protocol}://BUCKET-OR-HOST/FOLDER")
    return f"{protocol}://{rest.rstrip('/')}"


def _require(protocol: str, url: str) -> None:
    """Imports the file system of a protocol, so that a missing package is told of at once."""
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        close = nearest(protocol, fsspec.available_protocols())
        raise StorageError(
            f"{url}: unknown protocol {protocol!r}{close}; write a folder, or a URL such as s3://bucket/runs"
        ) from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'launcher[{extra}]'" if extra else f"{error}".strip().rstrip(".")
        raise StorageError(f"{url}: the package for {protocol}:// is not installed; {remedy}") from error


def _entries(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict]:
    try:
        entries = fs.ls(folder, detail=True)
    except _ABSENT:
        return []
    # Listing an object, or a folder with a placeholder, gives the thing itself.
    return [entry for entry in entries if entry["name"].rstrip("/") != folder.rstrip("/")]


def _walk(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[str]:
    for entry in _entries(fs, folder):
        if entry["type"] == "directory":
            yield from _walk(fs, entry["name"])
        else:
            yield entry["name"]


def _flat(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    try:
        return [name for name in fs.find(folder) if name != folder]
    except _ABSENT:
        return []


def _base(entry: dict) -> str:
    return entry["name"].rstrip("/").rpartition("/")[2]


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200].rstrip(".")


def _advice(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "create the folder or the bucket, or correct the URL"
    if isinstance(error, PermissionError):
        return "check the credentials in the environment, and what they may do"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "make room, or use another store"
    return "check the URL, the network and the credentials in the environment"
