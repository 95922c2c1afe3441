"""A directory at an fsspec URL: whole objects are written, read, listed and deleted, and nothing else.

A store has no rename, no append, no directory that must exist and no cached listing, because SFTP and S3 differ in all
of them. Every call has a time limit, and transient errors are retried. Callers get a one-line ``StorageError`` in place
of what a file system raises. Credentials come from the environment of the process that uses a store; no URL, pickle or
error holds any. ``cluster.storage.file_systems`` knows the protocols, ``cluster.storage.retrying_calls`` time
limits and retries.
"""

import contextlib
import math
import re
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import fsspec

from cluster.errors import StorageError
from cluster.storage.deadline import Started
from cluster.storage.file_systems import (
    TEMPORARY,
    Location,
    missing_folders,
    remove_folders,
    remove_if_empty,
    write_and_rename,
)
from cluster.storage.listings import WHOLE_LISTING_S, list_pages, objects_below
from cluster.storage.object_calls import fingerprint, reading
from cluster.storage.retrying_calls import FileSystemCall, RetryingCalls, Trouble, UnderWay
from cluster.storage.store_errors import ABSENT
from cluster.storage.stored_objects import ListedPage, StoredObject, stored_object

T = TypeVar("T")

PATIENCE_S = 10.0
"""Default for how long a failing call is retried: somebody is waiting for it."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes of an object."""

    name: str
    offset: int = 0
    size: int | None = None
    """None: to its end."""
    expected: int | None = None
    """Of a range to the end: the bytes that there should be, which give it time. None: unknown."""

    @property
    def most_bytes(self) -> int | None:
        """The bytes that the time limit allows for."""
        return self.expected if self.size is None else self.size


class MissingObject(StorageError):  # noqa: N818 - it says what is so, as FileNotFound does
    """The store answers, but has no object of that name."""


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
        most_s: After how many seconds a call that does not return is given up, if that is less than a minute.

    Raises:
        StorageError: The URL is not valid here, holds a secret, or needs a package that is not installed.

    Thread: Any number of threads may use one store at once.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S, most_s: float = math.inf) -> None:
        self._location = Location(url)
        self.url = self._location.url
        self.patience_s = patience_s
        self._most_s = most_s
        self._calls = RetryingCalls(self._location, patience_s, most_s)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[type["Store"], tuple[str, float, float]]:
        return Store, (self.url, self.patience_s, self._most_s)

    @property
    def is_shared(self) -> bool:
        """Whether another process that opens this URL sees the same objects."""
        return self._location.protocol != "memory"

    @property
    def max_requests(self) -> int:
        """How many requests are made at once, where several are made: beyond that they would wait for each other."""
        return self._location.max_requests

    @property
    def trouble(self) -> Trouble | None:
        """The trouble of the oldest call that is being retried, or None. Calls of stores made by ``at`` count too.

        Thread: Any. It lets one thread report that the store does not answer while another one waits for it.
        """
        return min(list(self._calls.troubles.values()), key=lambda trouble: trouble.since, default=None)

    @property
    def under_way(self) -> UnderWay | None:
        """The oldest call that has not returned yet, or None. Thread: Any."""
        return min(list(self._calls.under_way.values()), key=lambda call: call.since, default=None)

    def at(self, *parts: str) -> "Store":
        """Returns the store of a folder below this one, with the same patience; the folder need not exist."""
        root = self.url if self.url.endswith("/") else f"{self.url}/"
        store = Store(root + "/".join(self._check_name(part) for part in parts), self.patience_s, self._most_s)
        store._calls.troubles = self._calls.troubles
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

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[bytes | MissingObject]:
        """Yields the bytes of each range, read in concurrent requests; an error in place of a missing object.

        An object that ends within a range gives fewer bytes. Requests begin with the first item, and up to
        ``max_requests`` are under way or wait to be taken; what was taken is not kept.
        """
        calls = ((f"read {each.name}", reading(each.offset, each.size), each.name, each.most_bytes) for each in ranges)
        missing = "restore it, or take it out of the data"
        for each, content in zip(ranges, self._each(calls)):
            yield MissingObject(f"{self.url}: holds no {each.name}; {missing}") if content is None else content

    def fingerprints(self, names: Iterable[str]) -> list[str]:
        """Returns for each object a text that changes with its content, see ``fingerprint``; in concurrent requests."""
        return list(self._each((f"look for {name}", fingerprint, name, 0) for name in names))

    def exists(self, name: str) -> bool:
        """Returns whether there is an object of this name; a folder is not one."""
        return self.look_up(name) is not None

    def look_up(self, name: str) -> StoredObject | None:
        """Returns an object as a listing of its folder describes it; None: there is none."""

        def look(fs: fsspec.AbstractFileSystem, path: str) -> StoredObject | None:
            try:
                # Not fs.exists: it treats every error, even a refused password, as "no".
                found = fs.info(path)
            except ABSENT:
                return None
            return None if found["type"] == "directory" else stored_object(name.rpartition("/")[2], found)

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
        return sorted(name for _, page in self.pages([""]) for name in page.folders if name)

    def pages(self, folders: Iterable[str]) -> Iterator[tuple[str, ListedPage]]:
        """Yields what lies directly in folders, page by page, each page with its folder; nothing of it is kept.

        The pages of several folders are asked for at once, so those of one come between those of others. An empty page
        is all that there is of a folder that does not exist. A link to an object counts as that object; one to a folder
        counts as an object, too.
        """
        for folder, page in self._pages(folders):
            objects = [each for each in page.objects if not TEMPORARY.fullmatch(each.name)]
            yield folder, ListedPage(page.folders, objects, page.after)

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
            tries = {
                name: self._calls.start(delete, self._check_name(name)) for name in ordered[begin : begin + at_once]
            }
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
        names = self._call(f"list {folder or 'it'}", objects_below, folder, extra_s=WHOLE_LISTING_S)
        return [f"{folder}/{name}" if folder else name for name in names]

    def _walk(self, folder: str) -> Iterator[str]:
        begin = f"{folder}/" if folder else ""
        for _, page in self._pages([folder]):
            for each in page.objects:
                yield begin + each.name
            for name in page.folders:
                yield from self._walk(begin + name)

    def _pages(self, folders: Iterable[str]) -> Iterator[tuple[str, ListedPage]]:
        checked = (self._check_name(folder) if folder else folder for folder in folders)
        return list_pages(self._calls, self._location, checked)

    def _each(self, calls: Iterable[tuple[str, FileSystemCall[T], str, int | None]]) -> Iterator[T]:
        """Yields the result of each (action, call, name, size), in this order; several are made at a time."""
        waiting: deque[tuple[tuple[str, FileSystemCall[T], str, int | None], Started[T]]] = deque()
        for each in calls:
            _, call, name, _ = each
            waiting.append((each, self._calls.start(call, self._check_name(name) if name else name)))
            if len(waiting) == self.max_requests:
                first, started = waiting.popleft()
                yield self._call(*first, started=started)
        while waiting:
            first, started = waiting.popleft()
            yield self._call(*first, started=started)

    def _call(
        self,
        action: str,
        call: FileSystemCall[T],
        name: str = "",
        size: int | None = 0,
        extra_s: float = 0.0,
        started: Started[T] | None = None,
    ) -> T:
        """Makes a call, see ``RetryingCalls.call``."""
        if name:
            self._check_name(name)
        return self._calls.call(action, call, name, size, extra_s, started)

    def _check_name(self, name: str) -> str:
        if any(part in ("", ".", "..") for part in name.split("/")) or re.search(r"[\x00-\x1f\x7f]", name):
            raise StorageError(f"{self.url}: {name!r} is no name of an object; use a relative name without '..'")
        return name
