"""A directory at an fsspec URL: whole objects are written, read, listed and deleted, and nothing else.

A store has no rename, no append, no directory that must exist and no cached listing, because SFTP and S3 differ in all
of them. Every call has a time limit, and transient errors are retried. Callers get a one-line ``StorageError`` in place
of what a file system raises. Credentials come from the environment of the process that uses a store; no URL, pickle or
error holds any. ``cluster.storage.file_systems`` knows the protocols, ``cluster.storage.store_errors`` the errors.
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
"""Does something with a file system and a path on it."""

PATIENCE_S = 10.0
"""Default for how long a failing call is retried: somebody is waiting for it."""

_CALL_S = 60.0
"""Time limit of a file system call, on top of the time for its bytes."""
_SLOWEST_BYTES_PER_S = 1e6
"""A store with a lower transfer rate counts as hanging."""
_LISTING_S = 240.0
"""Extra time for a listing: an object store needs a request for each 1,000 names."""

_PAUSES_S = (0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
"""Upper limits of the random pauses between retries; random so that many failed calls do not return together."""


class MissingObject(StorageError):  # noqa: N818 - it says what is so, as FileNotFound does
    """The store answers, but has no object of that name."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a call has not succeeded yet; it is being retried."""

    since: float
    """When the call began, by ``time.monotonic``."""
    reason: str
    """One line, for people to read."""


class Store:
    """A directory of objects; ``url`` is an absolute path if it is on this machine's file system.

    Names are relative, with ``/`` between their parts. A store can be pickled and used after a fork.

    A call that fails for a transient reason (a lost connection, a server that is busy or away, a full disk) is retried
    after pauses until ``patience_s`` have passed since it began; one that fails for a permanent reason is not retried.
    A call that does not return is given up after a minute plus the time for its bytes at 1 MB/s. It may still have its
    effect later, see ``write``.

    Args:
        url: Where the store is.
        patience_s: How long a failing call is retried, in seconds; 0: not at all.

    Raises:
        StorageError: The URL is not valid here, holds a secret, or needs a package that is not installed.

    Thread: Any number of threads may use one store at once.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        self._location = Location(url)
        self.url = self._location.url
        self.patience_s = patience_s
        # By thread, because each makes one call at a time; shared with the stores that ``at`` returns.
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
        """The trouble of the oldest call that is being retried, or None. Calls of stores made by ``at`` count too.

        Thread: Any. It lets one thread report that the store does not answer while another one waits for it.
        """
        return min(list(self._troubles.values()), key=lambda trouble: trouble.since, default=None)

    def at(self, *parts: str) -> "Store":
        """Returns the store of a folder below this one, with the same patience; the folder need not exist."""
        root = self.url if self.url.endswith("/") else f"{self.url}/"
        store = Store(root + "/".join(self._check_name(part) for part in parts), self.patience_s)
        store._troubles = self._troubles
        return store

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Writes a whole object, over any object of this name.

        A killed process, a full disk or a lost connection leaves the old object or the new one, whole. Only a store
        with folders other than a local one or SFTP, such as HDFS, may be left with a torn object.

        A write that was given up may still arrive late and replace newer bytes. On a store with renames, a local one or
        SFTP, that happens only if its rename had begun; on others any write may, because what was sent cannot be
        recalled. A caller that cannot accept this gives each write a new name.
        """
        # Copies anything but bytes: a call that was given up may read on after the caller has reused its buffer.
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
                    # The folder is missing, or was deleted when it was empty; or ``sweep`` deleted the file.
                    fs.makedirs(path.rpartition("/")[0], exist_ok=True)

        self._call(f"write {name}", write, name, size=len(whole))

    def read(self, name: str) -> bytes:
        """Returns the whole object.

        Raises:
            MissingObject: There is no object of this name.
        """

        def read(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
            try:
                data: bytes = fs.cat_file(path)
            except ABSENT as error:
                raise MissingObject(f"{self.url}: holds no {name}; check the URL") from error
            return data

        return self._call(f"read {name}", read, name, size=None)

    def exists(self, name: str) -> bool:
        """Returns whether there is an object of this name; a folder is not one."""

        def look(fs: fsspec.AbstractFileSystem, path: str) -> bool:
            try:
                # Not fs.exists: it treats every error, even a refused password, as "no".
                kind: str = fs.info(path)["type"]
            except ABSENT:
                return False
            return kind != "directory"

        return self._call(f"look for {name}", look, name)

    def names(self, folder: str = "") -> list[str]:
        """Returns the names of all objects below a folder, at any depth, sorted; empty if there is no such folder."""
        folder = folder.rstrip("/")
        # fs.find is one flat listing on an object store; elsewhere it walks, and silently skips unreadable folders.
        found = self._walk(folder) if self._location.has_folders else self._list_flat(folder)
        # A name that ends in / is a placeholder that some tools write for an empty folder.
        return sorted(name for name in found if not name.endswith("/") and not TEMPORARY.fullmatch(name))

    def folders(self) -> list[str]:
        """Returns the names of the folders directly in this one, sorted."""
        return sorted(name for name, is_folder in self._list_entries() if is_folder)

    def delete(self, names: Iterable[str], at_once: int = 1) -> None:
        """Deletes objects; one that does not exist counts as deleted.

        On a store with folders, folders below this store that become empty are deleted too.

        Args:
            names: The objects, in the order in which to delete them.
            at_once: How many to delete at a time; with more than one, the order within a batch is undefined.
        """

        def delete(fs: fsspec.AbstractFileSystem, path: str) -> None:
            with contextlib.suppress(*ABSENT):
                fs.rm_file(path)

        ordered, parents = list(names), set[str]()
        for begin in range(0, len(ordered), at_once):
            tries = {name: self._start(delete, self._check_name(name)) for name in ordered[begin : begin + at_once]}
            for name, started in tries.items():
                self._call(f"delete {name}", delete, name, started=started)
                parts = name.split("/")[:-1]
                parents.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        if self._location.has_folders:
            for folder in sorted(parents, key=lambda name: name.count("/"), reverse=True):
                self._call(f"remove the empty folder {folder}", remove_if_empty, folder)

    def sweep(self) -> None:
        """Deletes files that killed writers left unfinished, at any depth; a write in progress starts over."""
        if self._location.has_rename:
            self.delete([name for name in self._walk("") if TEMPORARY.fullmatch(name)])

    @contextlib.contextmanager
    def without_traces(self) -> Iterator[None]:
        """Deletes, at the end, the folders down to this one that did not exist before, unless something lies in them.

        For objects that are written and deleted again: on a store with folders, writing the first one creates its
        folders.
        """
        missing = self._call("look for the folder", missing_folders) if self._location.has_folders else []
        try:
            yield
        finally:
            # An empty folder does no harm, and an error inside matters more.
            with contextlib.suppress(StorageError):
                if missing:
                    self._call("remove the empty folders", lambda fs, _: remove_folders(fs, missing))

    def probe(self) -> None:
        """Writes, reads and deletes one small object, and leaves nothing behind.

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

    def _list_flat(self, folder: str) -> list[str]:
        names = self._call(f"list {folder or 'it'}", objects_below, folder, extra_s=_LISTING_S)
        return [f"{folder}/{name}" if folder else name for name in names]

    def _walk(self, folder: str) -> Iterator[str]:
        for entry, is_folder in self._list_entries(folder):
            name = f"{folder}/{entry}" if folder else entry
            if is_folder:
                yield from self._walk(name)
            else:
                yield name

    def _list_entries(self, folder: str = "") -> list[tuple[str, bool]]:
        """Returns (last part of the name, is a folder) of everything directly in a folder."""
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
        """Makes a call, with retries, and returns its result.

        Args:
            size: Of the object, in bytes; None: unknown.
            extra_s: Extra time on top of the usual limit.
            started: The first try, if it is in progress already.
        """
        if name:
            self._check_name(name)
        began, thread, attempt, is_last = time.monotonic(), threading.get_ident(), 0, False
        try:
            while True:
                try:
                    return self._call_once(call, name, size, extra_s, started)
                except StorageError:
                    raise
                except Exception as error:  # the border to fsspec: every vendor raises its own errors
                    waited_s = time.monotonic() - began
                    if is_permanent(error) or is_last or waited_s >= self.patience_s:
                        raise self._failure(action, error, waited_s if attempt else 0) from cause(error)
                    self._troubles[thread] = Trouble(began, reason(error))
                pause_s = random.uniform(0, _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
                # The last try is made when patience ends, not before. A flag says that it was the last, because the
                # remaining time may be too short for the clock to advance.
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
        # Only a slow read is worth a request for the object's size.
        asked = self._start(lambda fs, path: fs.info(path)["size"], name)
        size = result_within(within_s, asked)
        return result_within(within_s + size / _SLOWEST_BYTES_PER_S, started)

    def _start(self, call: FileSystemCall[T], name: str) -> Started[T]:
        return start(lambda: self._run_call(call, name))

    def _run_call(self, call: FileSystemCall[T], name: str) -> T:
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

    def _check_name(self, name: str) -> str:
        if any(part in ("", ".", "..") for part in name.split("/")) or re.search(r"[\x00-\x1f\x7f]", name):
            raise StorageError(f"{self.url}: {name!r} is no name of an object; use a relative name without '..'")
        return name
