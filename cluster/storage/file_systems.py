"""From a store's URL to an fsspec file system, and the differences between fsspec's file systems.

This module knows protocols: their options, credentials, buckets, folders and renames, and what a fork does to their
connections. It knows nothing of retries and time limits, which are up to ``cluster.storage.retrying_calls``.
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
"""Matches the name of an object that is being written, or that a killed writer left unfinished."""

# Where an object needs its folder first. On an object store no folder is ever made: mkdir makes buckets there, so a
# misspelt bucket would be created.
_WITH_FOLDERS = frozenset({"file", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"})

_S3 = frozenset({"s3", "s3a"})
_SFTP = frozenset({"sftp", "ssh"})

# Where an object is written under a temporary name and renamed once it is whole. Object stores need no rename.
_WITH_RENAME = frozenset({"file", *_SFTP})

# USER:PASSWORD@, but not HOST:PORT/ with an @ later in the path.
_SECRET_IN_URL = re.compile(r"^[^/@:]*:(?!\d+/)[^@]*@")

# By protocol: the extra of this package that installs its file system.
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

_CONNECTIONS = 32
"""Connections of a process to an object store."""

_classes_in_use: set[type[fsspec.AbstractFileSystem]] = set()
"""The classes of the file systems in use."""
_in_use_at_fork: list[fsspec.AbstractFileSystem] = []
"""During a fork: the file systems in use."""
_ancestors_in_use: list[fsspec.AbstractFileSystem] = []
"""In a forked child: the file systems of its ancestors."""


def _keep_alive_for_child() -> None:
    """Keeps references to all file systems in use across a fork, so that the child does not free those that fsspec
    forgets.

    An event loop watches its connections through an epoll instance, which a child shares with its parent. A child that
    frees a connection removes it from that instance, and the parent waits forever for the next answer.
    """
    for each in tuple(_classes_in_use):
        _in_use_at_fork.extend(tuple(each._cache.values()))


os.register_at_fork(
    before=_keep_alive_for_child,
    after_in_parent=_in_use_at_fork.clear,
    after_in_child=lambda: _ancestors_in_use.extend(_in_use_at_fork),
)


class Location:
    """The directory on a file system that a URL names.

    Attributes:
        url: In its canonical spelling; an absolute path if it is on this machine.
        protocol: ``file`` if it is on this machine.
        has_folders: Whether an object needs its folder first, and a folder exists without objects.
        has_rename: Whether an object is written under a temporary name and renamed once it is whole.
        has_pages: Whether a folder is listed page by page; elsewhere, one call returns all that lies in it.
        max_requests: How many requests a caller may make at once; beyond that they would wait for each other.

    Raises:
        StorageError: The URL is not valid here, holds a secret, or needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = _canonical_url(url)
        self.protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        self.has_folders = self.protocol in _WITH_FOLDERS
        self.has_rename = self.protocol in _WITH_RENAME
        self.has_pages = self.protocol in _S3
        self.max_requests = 4 if self.has_folders else _CONNECTIONS  # a disk, or a session for each thread
        self._class = file_system_class(self.protocol, self.url)

    def file_system(self) -> fsspec.AbstractFileSystem:
        """Returns the file system, for one call.

        fsspec is asked each time. It keeps one instance per process, and one per thread where each thread needs a
        connection of its own, so a forked child never talks through its parent's connection.
        """
        if self.protocol == "file":
            return self._class()
        fs = self._class(**self._class._get_kwargs_from_urls(self.url), **_options_for(self.protocol))
        _classes_in_use.add(self._class)
        return fs

    def path(self, name: str = "") -> str:
        """Returns the path of an object or folder on the file system; without a name, of the directory itself."""
        root = self.url if self.protocol == "file" else self._class._strip_protocol(self.url)
        return f"{root.rstrip('/')}/{name}" if name else root

    def forget(self, fs: fsspec.AbstractFileSystem) -> None:
        """Makes the next call open another session, because this one may be broken.

        Asynchronous file systems replace their connections themselves.
        """
        if not fs.async_impl:
            self._class._cache.pop(fs._fs_token, None)


def _canonical_url(url: str) -> str:
    """Returns the canonical spelling of a store's URL, valid in any working directory."""
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
    """Imports and returns the class of a protocol, so that a missing package is reported at once."""
    if protocol == "file":
        return SyncedLocalFileSystem
    try:
        if protocol in _SFTP:
            from cluster.storage.sftp import PinnedSFTPFileSystem  # its package need not be installed

            return PinnedSFTPFileSystem
        if protocol in _S3:
            from cluster.storage.s3 import DirectS3FileSystem

            return DirectS3FileSystem
        found: type[fsspec.AbstractFileSystem] = fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        close = nearest(protocol, fsspec.available_protocols())
        raise StorageError(
            f"{url}: unknown protocol {protocol!r}{close}; write a folder, or a URL such as s3://bucket/runs"
        ) from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'launcher[{extra}]'" if extra else f"{error}".strip().rstrip(".")
        raise StorageError(f"{url}: the package for {protocol}:// is not installed; {remedy}") from error
    return found


def _options_for(protocol: str) -> dict[str, Any]:
    """Returns the options of a file system beside its URL and its configuration."""
    if protocol in _WITH_FOLDERS:
        return {}
    # A cached listing hides what other processes write.
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in _S3:
        # Its retries would multiply with the store's (s3fs adds its own, see cluster.storage.s3). And one request per
        # object: callers with large data read and write several objects at a time.
        own = {
            "connect_timeout": 5,
            "read_timeout": 30,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
        }
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options |= {"config_kwargs": own | configured, "max_concurrency": 1}
    return options


def write_and_rename(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a temporary file in the same folder, then renames it if the caller still waits.

    No two tries share a file, because a try that was given up, or another process, may still be writing. A try that was
    given up does not rename its file: newer bytes may have the name by now. Only a rename that has begun cannot be
    stopped.

    Thread: called in the pool thread that makes the store's call.
    """
    temporary = f"{path.rpartition('/')[0]}/.tmp-{uuid.uuid4().hex}"
    try:
        fs.pipe_file(temporary, data)
        if not is_awaited():
            raise OverrunError("given up before it had its name")
        fs.replace(temporary, path)
    except Exception:  # the border to fsspec
        with contextlib.suppress(Exception):  # report the first failure; ``Store.sweep`` deletes the file
            fs.rm_file(temporary)
        raise


def missing_folders(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Returns a folder and its parents, as far as they do not exist, the innermost first."""
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
    """Removes a folder that is empty but for files that killed writers left."""
    with contextlib.suppress(FileNotFoundError):
        try:
            fs.rmdir(path)
        except OSError:
            # SFTP has no error of its own for a folder that is not empty, the usual case: look. All else is a fault.
            left = fs.ls(path, detail=False)
            if not left:
                raise
            if all(map(TEMPORARY.fullmatch, left)):
                for file in left:
                    fs.rm_file(file)
                with contextlib.suppress(OSError):  # another object is there by now
                    fs.rmdir(path)


def remove_folders(fs: fsspec.AbstractFileSystem, paths: Iterable[str]) -> None:
    """Removes folders in this order, as far as they are empty."""
    for path in paths:
        remove_if_empty(fs, path)
