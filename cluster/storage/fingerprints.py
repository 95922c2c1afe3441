"""What a file system says of an object that changes with its content, to compare with what it said before."""

import json
from collections.abc import Mapping
from typing import Any

import fsspec

from cluster.storage.store_errors import ABSENT

_CHANGING = (
    "ETag", "etag", "md5Hash", "content_md5", "generation",
    "LastModified", "last_modified", "updated", "mtime",
    "created",  # of local files: when inode or content changed last, which no program can set
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
