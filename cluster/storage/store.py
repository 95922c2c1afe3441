"""A directory at an fsspec URL: whole objects written, read, listed and deleted, and nothing else.

A store offers no rename, no append, no directory that has to exist, no cached listing: SFTP and S3 differ in all of
them. Every call has a time limit, and transient errors are retried. Callers see a ``StorageError`` of one line in place
of what a file system raises. Credentials come from the environment of the process that uses a store; neither a URL, nor
a pickle, nor an error holds any. ``cluster.storage.file_systems`` knows the protocols, ``cluster.storage.store_errors``
the errors.
"""

import contextlib
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import fsspec

from cluster.errors import StorageError
from cluster.storage.deadline import OverrunError, Started, result_within, start
from cluster.storage.file_systems import (
    TEMPORARY,
    Location,
    entries,
    missing_folders,
    objects_below,
    remove_folders,
    remove_if_empty,
    write_and_rename,
)
from cluster.storage.store_errors import ABSENT, advice, cause, is_permanent, reason

T = TypeVar("T")
FileSystemCall = Callable[[fsspec.AbstractFileSystem, str], T]
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
        self._location = Location(url)
        self.url = self._location.url
        self.patience_s = patience_s
        # By thread, for each makes one call at a time; of the folders below too, see ``at``.
        self._troubles: dict[int, Trouble] = {}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[type["Store"], tuple[str, float]]:
        return Store, (self.url, self.patience_s)

    @property
    def is_shared(self) -> bool:
        """Whether another process that opens this URL sees the same objects."""
        return self._location.protocol != "memory"

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
            for folder_is_sure in (not self._location.has_folders, False, True):
                try:
                    if self._location.has_rename:
                        write_and_rename(fs, path, whole)
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
            except ABSENT as error:
                raise MissingObject(f"{self.url}: holds no {name}; check the URL") from error

        return self._call(f"read {name}", read, name, size=None)

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name; a folder is none."""

        def look(fs: fsspec.AbstractFileSystem, path: str) -> bool:
            try:
                # Not fs.exists: it takes every error, also a refused password, for "no".
                return fs.info(path)["type"] != "directory"
            except ABSENT:
                return False

        return self._call(f"look for {name}", look, name)

    def names(self, folder: str = "") -> list[str]:
        """The names of all objects below a folder, at any depth, sorted; empty when there is no such folder."""
        folder = folder.rstrip("/")
        # fs.find is one flat listing on an object store; elsewhere it walks, and skips folders it may not read.
        found = self._walk(folder) if self._location.has_folders else self._flat(folder)
        # A name that ends in / is a placeholder that some tools leave to show an empty folder.
        return sorted(name for name in found if not name.endswith("/") and not TEMPORARY.fullmatch(name))

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
            with contextlib.suppress(*ABSENT):
                fs.rm_file(path)

        ordered, parents = list(names), set[str]()
        for begin in range(0, len(ordered), at_once):
            tries = {name: self._start(delete, self._plain(name)) for name in ordered[begin : begin + at_once]}
            for name, started in tries.items():
                self._call(f"delete {name}", delete, name, started=started)
                parts = name.split("/")[:-1]
                parents.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        if self._location.has_folders:
            for folder in sorted(parents, key=lambda name: name.count("/"), reverse=True):
                self._call(f"remove the empty folder {folder}", remove_if_empty, folder)

    def sweep(self) -> None:
        """Deletes what killed writers have left unfinished, at any depth; whoever is writing now writes once more."""
        if self._location.has_rename:
            self.delete([name for name in self._walk("") if TEMPORARY.fullmatch(name)])

    @contextlib.contextmanager
    def without_traces(self) -> Iterator[None]:
        """Removes, at the end, the folders down to this one that did not exist before, unless something lies there.

        For objects that are written and deleted again: on a store with folders, the first of them makes its folders.
        """
        missing = self._call("look for the folder", missing_folders) if self._location.has_folders else []
        try:
            yield
        finally:
            # An empty folder does no harm, and what happened inside matters more.
            with contextlib.suppress(StorageError):
                if missing:
                    self._call("remove the empty folders", lambda fs, _: remove_folders(fs, missing))

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
        names = self._call(f"list {folder or 'it'}", objects_below, folder, extra_s=_LISTING_S)
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
        return self._call(
            f"list {folder or 'it'}",
            lambda fs, path: entries(fs, path, self._location.has_folders),
            folder,
            extra_s=_LISTING_S,
        )

    def _call(
        self,
        action: str,
        call: FileSystemCall[T],
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
                    if is_permanent(error) or is_last or waited_s >= self.patience_s:
                        raise self._failure(action, error, waited_s if attempt else 0) from cause(error)
                    self._troubles[thread] = Trouble(began, reason(error))
                pause_s = random.uniform(0, _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
                # The last try is made when patience ends, not before. What is left then may be too little to move a
                # clock, so the clock is not asked whether it was the last.
                left_s = self.patience_s - waited_s
                is_last = pause_s >= left_s
                time.sleep(min(pause_s, left_s))
                attempt, started = attempt + 1, None
        finally:
            self._troubles.pop(thread, None)

    def _call_once(
        self, call: FileSystemCall[T], name: str, size: int | None, extra_s: float, started: Started[T] | None
    ) -> T:
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

    def _start(self, call: FileSystemCall[T], name: str) -> Started[T]:
        return start(lambda: self._make(call, name))

    def _make(self, call: FileSystemCall[T], name: str) -> T:
        """Makes a call in this thread."""
        fs = self._location.file_system()
        try:
            return call(fs, self._location.path(name))
        except Exception as error:
            if not is_permanent(error):
                self._location.forget(fs)
            raise

    def _failure(self, action: str, error: Exception, waited_s: float) -> StorageError:
        tried = f", tried for {waited_s:.3g} s" if waited_s else ""
        return StorageError(f"{self.url}: cannot {action}: {reason(error)}{tried}; {advice(error)}")

    def _plain(self, name: str) -> str:
        if any(part in ("", ".", "..") for part in name.split("/")) or re.search(r"[\x00-\x1f\x7f]", name):
            raise StorageError(f"{self.url}: {name!r} is no name of an object; use a relative name without '..'")
        return name
