"""Objects of a store as a listing describes them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object, as a listing describes it."""

    name: str
    size: int
    """In bytes; -1: the store does not tell."""
    version: str
    """What changes with its content, as far as the store tells (an ETag); else empty."""


@dataclass(frozen=True, slots=True)
class ListedPage:
    """A part of what lies directly in a folder, in no order: the last parts of names."""

    folders: list[str]
    """``""`` stands for objects whose name has an empty part, ``FOLDER//NAME``, which no store can read or write."""
    objects: list[StoredObject]
    after: str | None = None
    """What the next page is asked for with; None: this is the last one."""


def stored_object(name: str, entry: dict[str, Any]) -> StoredObject:
    """Returns what a file system says of an object; the version is an ETag or MD5 of S3, Google, Azure."""
    size = entry.get("size")
    version = next((str(entry[key]) for key in ("ETag", "etag", "md5Hash", "content_md5") if entry.get(key)), "")
    return StoredObject(name, -1 if size is None else size, version)
