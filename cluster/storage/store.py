"""A directory at an fsspec URL: whole objects written, read, listed and deleted, and nothing else.

The only module that knows fsspec, but for its SFTP and its local files. Whoever uses a store has no rename, no append,
no directory that has to exist, no cached listing: SFTP and S3 differ in all of them. Every call ends in time; one that
fails for a passing reason is made again. What a file system raises leaves here as a ``StorageError`` of one line.
Credentials come from the environment of the process that uses a store; neither a URL, nor a pickle, nor an error holds
any.
"""

import contextlib
import errno
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from cluster.errors import StorageError, nearest
from cluster.storage.deadline import OverrunError, Started, is_awaited, result_within, start
from cluster.storage.local import SyncedLocalFileSystem
from cluster.storage.redaction import harmless, redacted

T = TypeVar("T")
Call = Callable[[fsspec.AbstractFileSystem, str], T]
"""What is done with a file system and a path on it."""

PATIENCE_S = 10.0
"""How long a call is made again by default: somebody is waiting for it."""

_CALL_S = 60.0
"""How long a call of a file system may take, beside what its bytes take."""
_SLOWEST_BYTES_PER_S = 1e6
"""The rate below which a store counts as hanging."""
_LISTING_S = 240.0
"""How much longer a listing may take: an object store wants a request for each 1,000 names."""

_PAUSES_S = (0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
"""The longest pauses between tries. What is drawn lies below: many that failed together do not come back together."""

# Where an object needs its folder first. On an object store a folder is never made: there mkdir makes buckets,
# so that a misspelt one would come into being.
_WITH_FOLDERS = frozenset({"file", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"})

_S3 = frozenset({"s3", "s3a"})
_SFTP = frozenset({"sftp", "ssh"})

# Where an object is written under another name, and renamed once it is whole. An object store has no need of that.
_WITH_RENAME = frozenset({"file", *_SFTP})

_TEMPORARY = re.compile(r"(.*/)?\.tmp-[0-9a-f]{32}(-aside)?")
"""The name of an object while it is being written, and of what a killed writer has left."""

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

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

_PERMANENT = (
    StorageError,
    # Not there, not allowed, in the way: the type tells.
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    # Arguments or an installation that no store takes.
    *(TypeError, ValueError, NotImplementedError, ImportError),
)
_PERMANENT_NUMBERS = frozenset(
    getattr(errno, name)
    for name in ("EINVAL", "ENAMETOOLONG", "EMSGSIZE", "ENOTEMPTY", "ELOOP", "EROFS", "ENOSYS", "ENOTSUP", "EREMCHG")
    if hasattr(errno, name)
)
# By name, for their packages need not be installed.
_PERMANENT_NAMES = frozenset(
    {
        *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"),  # botocore
        *("NoRegionError", "InvalidConfigError", "UnknownEndpointError"),
        *("DefaultCredentialsError", "ClientAuthenticationError"),  # Google, Azure
    }
)
_PASSING_STATUSES = frozenset({408, 425, 429})  # of HTTP, among those that blame the caller


_classes: set[type[fsspec.AbstractFileSystem]] = set()
"""The classes of the file systems in use."""
_held: list[fsspec.AbstractFileSystem] = []
"""During a fork: the file systems in use."""
_inherited: list[fsspec.AbstractFileSystem] = []
"""In a forked child: those of its parents."""


def _hold_for_child() -> None:
    """Before a fork: refers to all file systems in use, so that the child, in which fsspec forgets them, frees none.

    An event loop watches its connections through an epoll instance, which a child shares with its parent. A child that
    frees a connection takes it out of that instance, and its parent waits in vain for the next answer.
    """
    for each in tuple(_classes):
        _held.extend(tuple(each._cache.values()))


os.register_at_fork(
    before=_hold_for_child, after_in_parent=_held.clear, after_in_child=lambda: _inherited.extend(_held)
)


class MissingObject(StorageError):  # noqa: N818 - it says what is so, as FileNotFound does
    """The store answers, and holds no object of that name."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a call from coming to its end; it is being made again."""

    since: float
    """When the call began, on the clock of ``time.monotonic``."""
    reason: str
    """In a line, for people."""


class Store:
    """A directory of objects; ``url`` is an absolute path when it lies on this machine's file system.

    Names are relative, with ``/`` between their parts. A store is picklable, may be used after a fork, and by many
    threads at once.

    A call that fails for a passing reason (a connection lost, a server that is busy or away, a full disk) is made
    again, after pauses, until ``patience_s`` have passed since it began; one that fails for a lasting reason is not.
    A call that does not come back is given up after a minute and what its bytes would take at 1 MB/s: it may still
    do later what it was to do, see ``write``.

    Args:
        url: Where it lies.
        patience_s: How long a failing call is made again, in seconds; 0: it is not.

    Raises:
        StorageError: The URL makes no sense here, holds a secret, or needs a package that is not installed.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        self.url = _canonical_url(url)
        self.patience_s = patience_s
        self._protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        self._with_folders = self._protocol in _WITH_FOLDERS
        self._with_rename = self._protocol in _WITH_RENAME
        self._class = _file_system(self._protocol, self.url)
        # By thread, for each makes one call at a time; of the folders below too, see ``at``.
        self._troubles: dict[int, Trouble] = {}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[type["Store"], tuple[str, float]]:
        return Store, (self.url, self.patience_s)

    @property
    def is_shared(self) -> bool:
        """Whether another process that opens this URL sees the same objects."""
        return self._protocol != "memory"

    @property
    def trouble(self) -> Trouble | None:
        """What keeps the oldest of the calls that are being made again from its end; None if there are none.

        For whoever wants to tell people that the store does not answer, while another thread waits for it. Calls of
        this store and of the folders that it gave count.
        """
        return min(list(self._troubles.values()), key=lambda trouble: trouble.since, default=None)

    def at(self, *parts: str) -> "Store":
        """The store of a folder below this one, as patient as it; the folder need not exist."""
        root = self.url if self.url.endswith("/") else f"{self.url}/"
        store = Store(root + "/".join(self._plain(part) for part in parts), self.patience_s)
        store._troubles = self._troubles
        return store

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Writes a whole object over whatever had this name.

        A process killed in here, a full disk or a lost connection leaves the old object or the new one, whole. Only on
        a store with folders other than a local one or SFTP, such as HDFS, may it leave a torn one.

        A write that was given up may still come late, and put its bytes in place of newer ones. On a store that
        renames, a local one or SFTP, only one whose rename was under way does; on others any may, for what was sent
        cannot be called off. Whoever cannot bear that gives each write a name of its own.
        """
        # Bytes are not copied. A view is: a call that was given up may read on, when its owner has moved on.
        whole = bytes(data)

        def write(fs: fsspec.AbstractFileSystem, path: str) -> None:
            for folder_is_sure in (not self._with_folders, False, True):
                try:
                    if self._with_rename:
                        _write_and_rename(fs, path, whole)
                    else:
                        fs.pipe_file(path, whole)
                    return
                except FileNotFoundError:
                    if folder_is_sure:
                        raise
                    # It is missing, or was removed as an empty one since it was made; or ``sweep`` took the file.
                    fs.makedirs(path.rpartition("/")[0], exist_ok=True)

        self._call(f"write {name}", write, name, size=len(whole))

    def read(self, name: str) -> bytes:
        """The whole object.

        Raises:
            MissingObject: There is none of this name.
        """

        def read(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
            try:
                return fs.cat_file(path)
            except _ABSENT as error:
                raise MissingObject(f"{self.url}: holds no {name}; check the URL") from error

        return self._call(f"read {name}", read, name, size=None)

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name; a folder is none."""

        def look(fs: fsspec.AbstractFileSystem, path: str) -> bool:
            try:
                # Not fs.exists: it takes every error, also a refused password, for "no".
                return fs.info(path)["type"] != "directory"
            except _ABSENT:
                return False

        return self._call(f"look for {name}", look, name)

    def names(self, folder: str = "") -> list[str]:
        """The names of all objects below a folder, at any depth, sorted; empty when there is no such folder."""
        folder = folder.rstrip("/")
        # fs.find is one flat listing on an object store; elsewhere it walks, and skips folders it may not read.
        found = self._walk(folder) if self._with_folders else self._flat(folder)
        # A name that ends in / is a placeholder that some tools leave to show an empty folder.
        return sorted(name for name in found if not name.endswith("/") and not _TEMPORARY.fullmatch(name))

    def folders(self) -> list[str]:
        """The names of the folders directly in this one, sorted."""
        return sorted(name for name, is_folder in self._entries() if is_folder)

    def delete(self, names: Iterable[str], at_once: int = 1) -> None:
        """Deletes objects; one that is not there counts as deleted.

        Where there are folders, those below this store that are empty then go too.

        Args:
            names: Of the objects, in the order in which they go.
            at_once: How many go at a time; if there are several, their order is open.
        """

        def delete(fs: fsspec.AbstractFileSystem, path: str) -> None:
            with contextlib.suppress(*_ABSENT):
                fs.rm_file(path)

        ordered, parents = list(names), set[str]()
        for begin in range(0, len(ordered), at_once):
            tries = {name: self._start(delete, self._plain(name)) for name in ordered[begin : begin + at_once]}
            for name, started in tries.items():
                self._call(f"delete {name}", delete, name, started=started)
                parts = name.split("/")[:-1]
                parents.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        if self._with_folders:
            for folder in sorted(parents, key=lambda name: name.count("/"), reverse=True):
                self._call(f"remove the empty folder {folder}", _remove_if_empty, folder)

    def sweep(self) -> None:
        """Deletes what killed writers have left unfinished, at any depth; whoever is writing now writes once more."""
        if self._with_rename:
            self.delete([name for name in self._walk("") if _TEMPORARY.fullmatch(name)])

    @contextlib.contextmanager
    def without_traces(self) -> Iterator[None]:
        """Removes, at the end, the folders down to this one that did not exist before, unless something lies there.

        For objects that are written and deleted again: on a store with folders, the first of them makes its folders.
        """
        missing = self._call("look for the folder", _missing_folders) if self._with_folders else []
        try:
            yield
        finally:
            # An empty folder does no harm, and what happened inside matters more.
            with contextlib.suppress(StorageError):
                if missing:
                    self._call("remove the empty folders", lambda fs, _: _remove_folders(fs, missing))

    def probe(self) -> None:
        """Writes, reads and deletes one small object; leaves nothing behind.

        Raises:
            StorageError: Which of the three failed, why, and what to do.
        """
        name = f"probe-{uuid.uuid4().hex}"
        with self.without_traces():
            self.write(name, name.encode())
            try:
                if self.read(name) != name.encode():
                    raise StorageError(f"{self.url}: gives back other bytes than were written; use another store")
            finally:
                self.delete([name])

    def _flat(self, folder: str) -> list[str]:
        def find(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
            below = f"{path.rstrip('/')}/"
            try:
                found = fs.find(path)
            except _ABSENT:
                found = []
            if not found:
                _require_bucket(fs, path)
            return [name.removeprefix(below) for name in found if name.startswith(below)]

        names = self._call(f"list {folder or 'it'}", find, folder, extra_s=_LISTING_S)
        return [f"{folder}/{name}" if folder else name for name in names]

    def _walk(self, folder: str) -> Iterator[str]:
        for entry, is_folder in self._entries(folder):
            name = f"{folder}/{entry}" if folder else entry
            if is_folder:
                yield from self._walk(name)
            else:
                yield name

    def _entries(self, folder: str = "") -> list[tuple[str, bool]]:
        """What lies directly in a folder, by its last name, and whether it is a folder."""

        def entries(fs: fsspec.AbstractFileSystem, path: str) -> list[tuple[str, bool]]:
            try:
                found = fs.ls(path, detail=True)
            except _ABSENT:
                found = []
            if not found and not self._with_folders:
                _require_bucket(fs, path)
            # Listing an object, or a folder with a placeholder, gives the thing itself.
            own = [entry for entry in found if entry["name"].rstrip("/") != path.rstrip("/")]
            return [(_base(entry), entry["type"] == "directory") for entry in own]

        return self._call(f"list {folder or 'it'}", entries, folder, extra_s=_LISTING_S)

    def _call(
        self,
        action: str,
        call: Call[T],
        name: str = "",
        size: int | None = 0,
        extra_s: float = 0.0,
        started: Started[T] | None = None,
    ) -> T:
        """What a call gives in the end, made again as long as there is hope and patience.

        Args:
            size: Of the object, in bytes; None: not known.
            extra_s: How much longer it may take than other calls.
            started: The first try, if it is under way already.
        """
        if name:
            self._plain(name)
        began, thread, attempt, is_last = time.monotonic(), threading.get_ident(), 0, False
        try:
            while True:
                try:
                    return self._call_once(call, name, size, extra_s, started)
                except StorageError:
                    raise
                except Exception as error:  # the border to fsspec: every file system raises its vendor's own errors
                    waited_s = time.monotonic() - began
                    if _is_permanent(error) or is_last or waited_s >= self.patience_s:
                        raise self._failure(action, error, waited_s if attempt else 0) from harmless(error, _options())
                    self._troubles[thread] = Trouble(began, _reason(error))
                pause_s = random.uniform(0, _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
                # The last try is made when patience ends, not before. What is left then may be too little to move a
                # clock, so the clock is not asked whether it was the last.
                left_s = self.patience_s - waited_s
                is_last = pause_s >= left_s
                time.sleep(min(pause_s, left_s))
                attempt, started = attempt + 1, None
        finally:
            self._troubles.pop(thread, None)

    def _call_once(self, call: Call[T], name: str, size: int | None, extra_s: float, started: Started[T] | None) -> T:
        if started is None:
            started = self._start(call, name)
        within_s = _CALL_S + extra_s
        try:
            return result_within(within_s + (size or 0) / _SLOWEST_BYTES_PER_S, started)
        except OverrunError:
            if size is not None:
                raise
        # Only now is it worth a question how much there is to read.
        asked = self._start(lambda fs, path: fs.info(path)["size"], name)
        size = result_within(within_s, asked)
        return result_within(within_s + size / _SLOWEST_BYTES_PER_S, started)

    def _start(self, call: Call[T], name: str) -> Started[T]:
        return start(lambda: self._make(call, name))

    def _make(self, call: Call[T], name: str) -> T:
        """Makes a call, in whatever thread this is.

        The file system is asked of fsspec each time: it keeps one instance per process, and per thread where each
        needs a connection of its own, so that a forked child never talks through the connection of its parent.
        """
        if self._protocol == "file":
            fs, root = self._class(), self.url
        else:
            fs = self._class(**self._class._get_kwargs_from_urls(self.url), **_options_for(self._protocol))
            root = self._class._strip_protocol(self.url)
            _classes.add(self._class)
        if self._protocol in _S3:
            fs.retries = 1
        try:
            return call(fs, f"{root.rstrip('/')}/{name}" if name else root)
        except Exception as error:
            # The session itself may be what is broken. The asynchronous ones replace their connections on their own.
            if not fs.async_impl and not _is_permanent(error):
                self._class._cache.pop(fs._fs_token, None)
            raise

    def _failure(self, action: str, error: Exception, waited_s: float) -> StorageError:
        tried = f", tried for {waited_s:.3g} s" if waited_s else ""
        return StorageError(f"{self.url}: cannot {action}: {_reason(error)}{tried}; {_advice(error)}")

    def _plain(self, name: str) -> str:
        if any(part in ("", ".", "..") for part in name.split("/")) or re.search(r"[\x00-\x1f\x7f]", name):
            raise StorageError(f"{self.url}: {name!r} is no name of an object; use a relative name without '..'")
        return name


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


def _file_system(protocol: str, url: str) -> type[fsspec.AbstractFileSystem]:
    """The class of a protocol; imported at once, so that a missing package is told of at once."""
    if protocol == "file":
        return SyncedLocalFileSystem
    try:
        if protocol in _SFTP:
            from cluster.storage.sftp import PinnedSFTPFileSystem  # its package need not be installed

            return PinnedSFTPFileSystem
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
        # Its retries would multiply with ours; s3fs has its own beside botocore's, see _make. And one request for one
        # object: who has large ones reads and writes several at a time.
        own = {
            "connect_timeout": 5,
            "read_timeout": 30,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
        }
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options |= {"config_kwargs": own | configured, "max_concurrency": 1}
    return options


def _options() -> dict[str, object]:
    """What fsspec has read from its files and variables, of all protocols."""
    return {f"{protocol}.{name}": value for protocol, own in fsspec.config.conf.items() for name, value in own.items()}


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


def _write_and_rename(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a file of another name in the same folder, then gives it its name, if somebody still waits for that.

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
        with contextlib.suppress(Exception):  # the failure at hand is the one to tell; ``sweep`` takes what stays
            fs.rm_file(temporary)
        raise


def _missing_folders(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """A folder and those around it, as far as they do not exist; the innermost first."""
    missing = []
    while path.strip("/"):
        try:
            fs.info(path)
            break
        except _ABSENT:
            missing.append(path)
            path = path.rstrip("/").rpartition("/")[0]
    return missing


def _remove_if_empty(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Removes a folder in which there is nothing, or only what killed writers have left."""
    with contextlib.suppress(FileNotFoundError):
        try:
            fs.rmdir(path)
        except OSError:
            # Not empty, the usual case, has no error of its own on SFTP: look. Anything else is a fault.
            left = fs.ls(path, detail=False)
            if not left:
                raise
            if all(map(_TEMPORARY.fullmatch, left)):
                for file in left:
                    fs.rm_file(file)
                with contextlib.suppress(OSError):  # something else is there by now
                    fs.rmdir(path)


def _remove_folders(fs: fsspec.AbstractFileSystem, paths: Iterable[str]) -> None:
    for path in paths:
        _remove_if_empty(fs, path)


def _base(entry: dict) -> str:
    return entry["name"].rstrip("/").rpartition("/")[2]


def _is_permanent(error: Exception) -> bool:
    """Whether it is the caller's fault or the configuration's; all else may pass, also what nobody has heard of."""
    if isinstance(error, _PERMANENT) or getattr(error, "errno", None) in _PERMANENT_NUMBERS:
        return True
    if any(kind.__name__ in _PERMANENT_NAMES for kind in type(error).__mro__):
        return True
    status = getattr(error, "status", getattr(error, "code", None))
    return isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUSES


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(redacted(str(text), _options()).split())[:200].rstrip(".")


def _advice(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "create the folder or the bucket, or correct the URL"
    if isinstance(error, PermissionError):
        return "check the credentials in the environment, and what they may do"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "make room, or use another store"
    return "check the URL, the network and the credentials in the environment"
