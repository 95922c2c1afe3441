"""Where a process gets an index from: from the run that it works for, or by making it.

The dry run makes the indexes of a job; the driver writes them to the run directory, and names them in every task. So
the workers of a run, on any host and in any attempt, have the same samples in the same order, and list nothing.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.errors import ClusterError
from cluster.process.code_cache import cache_folder
from cluster.storage.store import Store
from jobs.images.index import Index, IndexBuilder, Source

Build = Callable[[Store, IndexBuilder], None]
"""Lists what a store holds, and adds it to an index.

Raises:
    ValueError: What is there is no data of this format; in one line.
"""

_SUFFIX = ".arrow"


class IndexFiles:
    """The indexes of a process.

    Args:
        run: The run directory that holds those in ``known``; None: they are all made here.
        known: Digests of indexes, by the ids of their sources.

    Attributes:
        opened: By the ids of their sources, the indexes that this process has opened.
    """

    def __init__(self, run: Store | None = None, known: Mapping[str, str] | None = None) -> None:
        self.opened: dict[str, Index] = {}
        self._run, self._known = run, known or {}

    def open(self, source: Source, build: Build) -> Index:
        """Returns the index of a source: that of the run, or a new one.

        Raises:
            ValueError: What is there is no data of this format.
            StorageError: The data or the run directory cannot be read.
            ClusterError: The run directory does not hold what was written there.
        """
        if source.id not in self.opened:
            digest = self._known.get(source.id)
            self.opened[source.id] = _make(source, build) if digest is None else self._fetch(digest)
        return self.opened[source.id]

    def _fetch(self, digest: str) -> Index:
        """Returns an index of the run, from the cache of this host if it is there."""
        path = _cached(digest)
        if not path.exists():
            assert self._run is not None, "it holds what is known"
            temporary = _temporary()
            temporary.write_bytes(self._run.read(file_name(digest)))
            _keep(temporary, digest)
        index = Index(path)
        os.utime(path)
        if not (index.digest == digest and index.check()):
            path.unlink()
            raise ClusterError(
                f"{self._run}: {file_name(digest)} is damaged; resume the run, which makes it again",
                cause="environment",
                step=0,
            )
        return index


_files = IndexFiles()


def use_index_files(files: IndexFiles) -> None:
    """Sets where this process gets indexes from; called before any dataset is built."""
    global _files
    _files = files


def open_index(source: Source, build: Build) -> Index:
    """Returns the index of a source, see ``IndexFiles.open``."""
    return _files.open(source, build)


def file_name(digest: str) -> str:
    """Returns the name of an index in a run directory."""
    return f"indexes/{digest}{_SUFFIX}"


def _make(source: Source, build: Build) -> Index:
    builder, temporary = IndexBuilder(source), _temporary()
    build(Store(source.url), builder)
    try:
        digest = builder.write(temporary).digest
        return Index(_keep(temporary, digest))
    finally:
        temporary.unlink(missing_ok=True)


def _cached(digest: str) -> Path:
    return cache_folder("indexes") / f"{digest}{_SUFFIX}"


def _temporary() -> Path:
    return cache_folder("indexes") / f".tmp-{secrets.token_hex(8)}"


def _keep(temporary: Path, digest: str) -> Path:
    """Gives a file its name. Other processes may do the same at once, with the same content."""
    path = _cached(digest)
    temporary.replace(path)
    return path
