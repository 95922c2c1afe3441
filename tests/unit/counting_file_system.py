"""A file system in memory that counts what is asked of it; ``count://`` URLs lead here."""

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
    """What each read takes."""
    reading: ClassVar[int] = 0
    most_reading: ClassVar[int] = 0
    """The most reads that were under way at a time."""
    lock: ClassVar = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("count://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        self._count("write")
        super().pipe_file(path, value, **kwargs)

    def rm_file(self, path):
        self._count("delete")
        super().rm_file(path)

    def cat_file(self, path, **kwargs):
        self._count("read", 1)
        time.sleep(self.latency_s)
        try:
            return super().cat_file(path, **kwargs)
        finally:
            self._count(None, -1)

    def info(self, path, **kwargs):
        self._count("look")
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
    def _count(cls, verb, reading=0) -> None:
        with cls.lock:
            if verb is not None:
                cls.calls[verb] += 1
            cls.reading += reading
            cls.most_reading = max(cls.most_reading, cls.reading)


fsspec.register_implementation("count", CountingFileSystem)


def start_counting(latency_s: float = 0.0) -> None:
    """From zero; the objects stay."""
    CountingFileSystem.calls = Counter()
    CountingFileSystem.latency_s = latency_s
    CountingFileSystem.most_reading = 0
