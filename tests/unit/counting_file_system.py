"""A file system in memory that counts what is asked of it; ``count://`` URLs lead here."""

import contextlib
import threading
import time
from collections import Counter
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class CountingFileSystem(MemoryFileSystem):
    protocol = "count"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    calls: ClassVar[Counter] = Counter()
    """The calls so far, by verb."""
    latency_s: ClassVar[float] = 0.0
    """What each read, each look and each delete takes."""
    under_way: ClassVar[Counter] = Counter()
    most: ClassVar[Counter] = Counter()
    """The most calls that were under way at a time, by verb."""
    lock: ClassVar = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("count://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        self._count("write")
        super().pipe_file(path, value, **kwargs)

    def rm_file(self, path):
        with self._slowly("delete"):
            super().rm_file(path)

    def cat_file(self, path, **kwargs):
        with self._slowly("read"):
            return super().cat_file(path, **kwargs)

    def info(self, path, **kwargs):
        with self._slowly("look"):
            return super().info(path, **kwargs)

    def find(self, path, **_):
        """One request, as on an object store; what it looks at on the way is none."""
        self._count("list")
        below = path.rstrip("/") + "/"
        return sorted(name for name in self.store if name.startswith(below))

    def ls(self, path, detail=True, **kwargs):
        self._count("list")
        return super().ls(path, detail=detail, **kwargs)

    @classmethod
    def _count(cls, verb) -> None:
        with cls.lock:
            cls.calls[verb] += 1

    @classmethod
    @contextlib.contextmanager
    def _slowly(cls, verb):
        with cls.lock:
            cls.calls[verb] += 1
            cls.under_way[verb] += 1
            cls.most[verb] = max(cls.most[verb], cls.under_way[verb])
        time.sleep(cls.latency_s)
        try:
            yield
        finally:
            with cls.lock:
                cls.under_way[verb] -= 1


fsspec.register_implementation("count", CountingFileSystem)


def start_counting(latency_s: float = 0.0) -> None:
    """From zero; the objects stay."""
    CountingFileSystem.calls = Counter()
    CountingFileSystem.latency_s = latency_s
    CountingFileSystem.most = Counter()
