"""Calls of a file system that read an object, or ask about it."""

import json
from collections.abc import Mapping
from typing import Any

import fsspec

from cluster.storage.retrying_calls import FileSystemCall
from cluster.storage.store_errors import ABSENT

_CHANGING = (
    "ETag", "etag", "md5Hash", "content_md5", "generation",
    "LastModified", "last_modified", "updated", "mtime",
    "created",  # of local files on Linux: when inode or content changed last, which no program can set
)  # fmt: skip


def fingerprint(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Returns the size of an object with its versions and times, as text.

    Empty: there is no such object, or the file system tells neither a version nor a time.
    """
    try:
        entry: Mapping[str, Any] = fs.info(path)
    except ABSENT:
        return ""
    told = {name: str(entry[name]) for name in _CHANGING if entry.get(name)}
    return json.dumps([entry.get("size"), told]) if told else ""


def reading(offset: int, size: int | None) -> FileSystemCall[bytes | None]:
    """Returns the call that reads a range, or returns None if the object is missing.

    Args:
        offset: The first byte.
        size: The number of bytes; None: to the end of the object.
    """

    def read(fs: fsspec.AbstractFileSystem, path: str) -> bytes | None:
        is_whole = offset == 0 and size is None
        end = None if size is None else offset + size
        try:
            if size == 0:  # a server takes an empty range for a wrong one, and sends the whole object
                return None if fs.info(path)["type"] == "directory" else b""
            data: bytes = fs.cat_file(path) if is_whole else fs.cat_file(path, start=offset, end=end)
        except ABSENT:
            return None
        return data

    return read
