"""Image folders on stores, and a store of names that are generated as they are listed."""

import os
from pathlib import Path
from typing import Any, ClassVar

from fsspec.spec import AbstractFileSystem

from cluster.storage.store import Store


def upload(folder: Path, url: str) -> Store:
    """Writes all files below a folder to a store, hidden ones too."""
    store = Store(url)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            store.write(str(path.relative_to(folder)), path.read_bytes())
    return store


class GeneratedFileSystem(AbstractFileSystem):
    """``generated://``: ``classes`` class folders, each with ``inner`` folders of ``images`` images."""

    protocol = "generated"
    classes: ClassVar[int] = 0
    inner: ClassVar[int] = 1
    images: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.replace("generated://", "").rstrip("/")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: ARG002
        depth = path.count("/")
        if depth < 2:
            num, prefix = (self.classes, "class") if depth == 0 else (self.inner, "inner")
            return [{"name": f"{path}/{prefix}_{n:05d}", "size": 0, "type": "directory"} for n in range(num)]
        return [
            {"name": f"{path}/image_{n:08d}.jpeg", "size": 10_000 + n, "type": "file", "ETag": f'"{n:032x}"'}
            for n in range(self.images)
        ]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": 0, "type": "directory"}
