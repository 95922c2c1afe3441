"""What lies in a folder of a store, page by page.

An object store answers with at most 1,000 names at a time. A page is one call with a time limit and retries of its own,
and nobody keeps those before it.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import fsspec

from cluster.storage.deadline import Started
from cluster.storage.file_systems import Location
from cluster.storage.retrying_calls import FileSystemCall, RetryingCalls
from cluster.storage.store_errors import ABSENT
from cluster.storage.stored_objects import ListedPage, stored_object

WHOLE_LISTING_S = 240.0
"""Extra time for a listing that is one call: an object store may need a request for each 1,000 names."""


def list_pages(calls: RetryingCalls, location: Location, folders: Iterable[str]) -> Iterator[tuple[str, ListedPage]]:
    """Yields the pages of folders, each with its folder; those of one in order, between those of others.

    As many are asked for at once as the store takes, and no more are in memory.

    Raises:
        StorageError: The store does not answer, or the bucket does not exist.
    """
    unlisted, waiting = iter(folders), deque[tuple[str, FileSystemCall[ListedPage], Started[ListedPage]]]()

    def ask(folder: str, after: str | None = None) -> None:
        call = _listing(after, location)
        waiting.append((folder, call, calls.start(call, folder)))

    extra_s = 0.0 if location.has_pages else WHOLE_LISTING_S
    while True:
        while len(waiting) < location.max_requests and (folder := next(unlisted, None)) is not None:
            ask(folder)
        if not waiting:
            return
        folder, call, started = waiting.popleft()
        page = calls.call(f"list {folder or 'it'}", call, folder, extra_s=extra_s, started=started)
        if page.after is not None:
            ask(folder, page.after)
        yield folder, page


def objects_below(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Returns the names of all objects below a path of an object store, at any depth, relative to that path.

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


def _listing(after: str | None, location: Location) -> FileSystemCall[ListedPage]:
    """Returns the call that lists the page of a folder after another one, or the first."""

    def list_page(fs: fsspec.AbstractFileSystem, path: str) -> ListedPage:
        page: ListedPage = fs.list_page(path, after) if location.has_pages else _whole(fs, path)
        if after is None and not (location.has_folders or page.folders or page.objects or page.after):
            _require_bucket(fs, path)
        return page

    return list_page


def _whole(fs: fsspec.AbstractFileSystem, path: str) -> ListedPage:
    """Returns all that lies in a folder."""
    try:
        found = fs.ls(path, detail=True)
    except ABSENT:
        found = []
    folders, objects = [], []
    for entry in found:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        # Listing an object, or a folder with a placeholder, returns the path itself.
        if entry["name"].rstrip("/") == path.rstrip("/"):
            continue
        if entry["type"] == "directory":
            folders.append(name)
        else:
            objects.append(stored_object(name, entry))
    return ListedPage(folders, objects)


def _require_bucket(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Distinguishes an empty place of an object store from a missing bucket, after a listing found nothing.

    Raises:
        FileNotFoundError: The bucket does not exist.
    """
    try:
        fs.info(path.partition("/")[0])
    except FileNotFoundError:
        raise
    except Exception:  # any other error, such as no permission to look at buckets, does not answer the question
        return
