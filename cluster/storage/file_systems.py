"""From the URL of a store to a file system of fsspec, and what fsspec's file systems do differently from each other.

Knows protocols: their options, credentials, buckets, folders and renames, and what a fork does to their connections.
Knows nothing of retries and time limits, which are ``cluster.storage.store``'s.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterable
from typing import Any

import fsspec

from cluster.errors import StorageError, nearest
from cluster.storage.deadline import OverrunError, is_awaited
from cluster.storage.local import SyncedLocalFileSystem
from cluster.storage.redaction import redacted
from cluster.storage.store_errors import ABSENT

TEMPORARY = re.compile(r"(.*/)?\.tmp-[0-9a-f]{32}(-aside)?")
"""Matches the name of an object that is being written, or that a killed writer has left unfinished."""

# Where an object needs its folder first. On an object store a folder is never made: there mkdir makes buckets,
# so that a misspelt one would come into being.
_WITH_FOLDERS = frozenset({"file", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"})

_S3 = frozenset({"s3", "s3a"})
_SFTP = frozenset({"sftp", "ssh"})

# Where an object is written under another name, and renamed once it is whole. An object store has no need of that.
_WITH_RENAME = frozenset({"file", *_SFTP})

# A user and a password, and not a host and a port, before the last @ of what looks like one.
_SECRET_IN_URL = re.compile(r"^[^/@:]*:(?!\d+/)[^@]*@")

# The extra of this package that brings the file system of a protocol.
_EXTRAS = {
    protocol: extra
    for extra, protocols in {
        "s3": _S3,
        "sftp": _SFTP,
        "gs": ("gs", "gcs"),
        "abfs": ("abfs", "abfss", "az"),
        "hdfs": ("hdfs",),
    }.items()
    for protocol in protocols
}

_classes: set[type[fsspec.AbstractFileSystem]] = set()
"""The classes of the file systems in use."""
_held: list[fsspec.AbstractFileSystem] = []
"""During a fork: the file systems in use."""
_inherited: list[fsspec.AbstractFileSystem] = []
"""In a forked child: those of its parents."""


def _hold_for_child() -> None:
    """Refers, before a fork, to all file systems in use, so that the child, in which fsspec forgets them, frees none.

    An event loop watches its connections through an epoll instance, which a child shares with its parent. A child that
    frees a connection takes it out of that instance, and its parent waits in vain for the next answer.
    """
    for each in tuple(_classes):
        _held.extend(tuple(each._cache.values()))


os.register_at_fork(
    before=_hold_for_child, after_in_parent=_held.clear, after_in_child=lambda: _inherited.extend(_held)
)


class Location:
    """The directory of a file system that a URL names.

    Attributes:
        url: In its one spelling; an absolute path if it lies on this machine.
        protocol: ``file`` if it lies on this machine.
        has_folders: Whether an object needs its folder first, and a folder exists without objects.
        has_rename: Whether an object is written under another name, and renamed once it is whole.

    Raises:
        StorageError: The URL makes no sense here, holds a secret, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = _canonical_url(url)
        self.protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        self.has_folders = self.protocol in _WITH_FOLDERS
        self.has_rename = self.protocol in _WITH_RENAME
        self._class = file_system_class(self.protocol, self.url)

    def file_system(self) -> fsspec.AbstractFileSystem:
        """The file system, for one call.

        It is asked of fsspec each time, which keeps one instance per process, and per thread where each needs a
        connection of its own, so that a forked child never talks through the connection of its parent.
        """
        if self.protocol == "file":
            return self._class()
        fs = self._class(**self._class._get_kwargs_from_urls(self.url), **_options_for(self.protocol))
        _classes.add(self._class)
        return fs

    def path(self, name: str = "") -> str:
        """Where an object or a folder lies on the file system; without a name, the directory itself."""
        root = self.url if self.protocol == "file" else self._class._strip_protocol(self.url)
        return f"{root.rstrip('/')}/{name}" if name else root

    def forget(self, fs: fsspec.AbstractFileSystem) -> None:
        """Has the next call open another session: this one may be broken.

        The asynchronous file systems replace their connections on their own.
        """
        if not fs.async_impl:
            self._class._cache.pop(fs._fs_token, None)


def _canonical_url(url: str) -> str:
    """The one spelling of a store's place, good in any working directory."""
    protocol, is_url, rest = url.partition("://")
    if "::" in url:
        raise StorageError(f"{redacted(url, {})}: is a chain of file systems; write the URL of the store itself")
    if not is_url:
        if re.match(r"[A-Za-z][\w+.-]*:/", url):
            raise StorageError(f"{url}: is neither a URL nor a folder; write {url.replace(':/', '://', 1)}")
        return os.path.abspath(os.path.expanduser(url))
    protocol = protocol.lower()
    if protocol in ("file", "local"):
        return os.path.abspath(rest)
    if secret := _SECRET_IN_URL.search(rest):
        raise StorageError(
            f"{protocol}://{rest[secret.end() :].partition('/')[0]}: a store's URL must not hold a password, it is "
            f"written down and handed on; use a key, or set FSSPEC_{protocol.upper()}_PASSWORD"
        )
    if "?" in rest:
        raise StorageError(
            f"{protocol}://{rest.partition('?')[0]}: a store's URL must not hold a query, it is written down and "
            "handed on; leave it out, and give credentials in the environment"
        )
    if not rest.strip("/") and protocol != "memory":
        raise StorageError(f"{url}: names no place; write {protocol}://BUCKET-OR-HOST/FOLDER")
    return f"{protocol}://{rest.rstrip('/')}"


def file_system_class(protocol: str, url: str) -> type[fsspec.AbstractFileSystem]:
    """The class of a protocol; imported at once, so that a missing package is told of at once."""
    if protocol == "file":
        return SyncedLocalFileSystem
    try:
        if protocol in _SFTP:
            from cluster.storage.sftp import PinnedSFTPFileSystem  # its package need not be installed

            return PinnedSFTPFileSystem
        if protocol in _S3:
            from cluster.storage.s3 import DirectS3FileSystem

            return DirectS3FileSystem
        return fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        close = nearest(protocol, fsspec.available_protocols())
        raise StorageError(
            f"{url}: unknown protocol {protocol!r}{close}; write a folder, or a URL such as s3://bucket/runs"
        ) from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'launcher[{extra}]'" if extra else f"{error}".strip().rstrip(".")
        raise StorageError(f"{url}: the package for {protocol}:// is not installed; {remedy}") from error


def _options_for(protocol: str) -> dict[str, Any]:
    """What a file system is told beside its URL and its configuration."""
    if protocol in _WITH_FOLDERS:
        return {}
    # A cached listing hides what others write.
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in _S3:
        # Its retries would multiply with ours; s3fs has its own beside botocore's, see cluster.s3. And one request for
        # one object: who has large ones reads and writes several at a time.
        own = {
            "connect_timeout": 5,
            "read_timeout": 30,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
        }
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options |= {"config_kwargs": own | configured, "max_concurrency": 1}
    return options


def objects_below(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """The names of all objects below a path of an object store, at any depth, relative to that path.

    Raises:
        FileNotFoundError: The bucket does not exist.
    """
    below = f"{path.rstrip('/')}/"
    try:
        found = fs.find(path)
    except ABSENT:
        found = []
    if not found:
        _require_bucket(fs, path)
    return [name.removeprefix(below) for name in found if name.startswith(below)]


def entries(fs: fsspec.AbstractFileSystem, path: str, has_folders: bool) -> list[tuple[str, bool]]:
    """What lies directly in a folder, by its last name, and whether it is a folder.

    Raises:
        FileNotFoundError: The bucket does not exist, of an object store.
    """
    try:
        found = fs.ls(path, detail=True)
    except ABSENT:
        found = []
    if not found and not has_folders:
        _require_bucket(fs, path)
    # Listing an object, or a folder with a placeholder, gives the thing itself.
    own = [entry for entry in found if entry["name"].rstrip("/") != path.rstrip("/")]
    return [(entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in own]


def _require_bucket(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Asks why nothing was found: an object store may have an empty place, or no such bucket.

    Raises:
        FileNotFoundError: The bucket does not exist.
    """
    try:
        fs.info(path.partition("/")[0])
    except FileNotFoundError:
        raise
    except Exception:  # any other answer, such as that buckets may not be looked at, is none to this question
        return


def write_and_rename(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a file of another name in the same folder, then gives it its name, if the caller still waits for that.

    No two tries share a file: one that was given up, or another process, may be writing still. What was given up does
    not get its name any more, which newer bytes may have by now. Only a rename that has begun cannot be called off.
    """
    temporary = f"{path.rpartition('/')[0]}/.tmp-{uuid.uuid4().hex}"
    try:
        fs.pipe_file(temporary, data)
        if not is_awaited():
            raise OverrunError("given up before it had its name")
        fs.replace(temporary, path)
    except Exception:  # the border to fsspec
        with contextlib.suppress(Exception):  # the failure at hand is the one to tell; ``Store.sweep`` takes what stays
            fs.rm_file(temporary)
        raise


def missing_folders(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """A folder and those around it, as far as they do not exist; the innermost first."""
    missing = []
    while path.strip("/"):
        try:
            fs.info(path)
            break
        except ABSENT:
            missing.append(path)
            path = path.rstrip("/").rpartition("/")[0]
    return missing


def remove_if_empty(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Removes a folder in which there is nothing, or only what killed writers have left."""
    with contextlib.suppress(FileNotFoundError):
        try:
            fs.rmdir(path)
        except OSError:
            # Not empty, the usual case, has no error of its own on SFTP: look. Anything else is a fault.
            left = fs.ls(path, detail=False)
            if not left:
                raise
            if all(map(TEMPORARY.fullmatch, left)):
                for file in left:
                    fs.rm_file(file)
                with contextlib.suppress(OSError):  # something else is there by now
                    fs.rmdir(path)


def remove_folders(fs: fsspec.AbstractFileSystem, paths: Iterable[str]) -> None:
    """Removes folders, in this order, as far as they are empty."""
    for path in paths:
        remove_if_empty(fs, path)
