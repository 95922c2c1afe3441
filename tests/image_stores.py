"""Image folders on stores, and a store of names that are generated as they are listed."""

import hashlib
import os
from pathlib import Path
from typing import Any, ClassVar

from fsspec.spec import AbstractFileSystem
from PIL import Image

from cluster.storage.store import Store
from jobs.images.indexed_images import IndexedImages
from tests.images import make_image_folder


def upload(folder: Path, url: str) -> Store:
    """Writes all files below a folder to a store, hidden ones too."""
    store = Store(url)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            store.write(str(path.relative_to(folder)), path.read_bytes())
    return store


def described(dataset: IndexedImages) -> tuple[Any, ...]:
    """All that a dataset has, where it does not depend on its place."""
    pixels = [dataset[number][0].contiguous().numpy().tobytes() for number in range(len(dataset))]
    names = [dataset.index.place(number).object for number in range(len(dataset.index))]
    return dataset.classes, dataset.targets.tolist(), hashlib.sha256(b"".join(pixels)).hexdigest(), names


def make_tree(root: Path) -> Path:
    """An image folder with nested folders, odd names, and what systems leave."""
    make_image_folder(root, num_classes=3, per_class=5, size=8)
    for name in ("deep/er/b.png", "deep/a.PNG", "deep.png", "été 1/日本+%20#.png"):
        path = root / "class_001" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(path)
    for folder in (root, root / "class_000", root / "class_001" / "deep"):
        for name in (".ipynb_checkpoints/image_0000.jpg", "__MACOSX/x.png", "._x.png", "notes.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\0\5\26\7")
    return root


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
