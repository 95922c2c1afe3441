"""Where a process gets an index from: from the run that it works for, or by making it.

The dry run makes the indexes of a job; the driver writes them to the run directory, and names them in every task. So
the workers of a run, on any host and in any attempt, have the same samples in the same order, and list nothing. Every
process maps a file in the cache of its host.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ClusterError, StorageError, one_line
from cluster.host.scratch import is_own
from cluster.process.host_cache import HostCache
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.images.indexing.index import Index, IndexBuilder, Source
from jobs.images.indexing.listing_progress import ListingProgress

Build = Callable[[Store, IndexBuilder], None]
"""Lists what a store holds, and adds it to an index.

Raises:
    ValueError: What is there is no data of this format; in one line.
"""

_CODEC = "zstd"
_CHUNK_BYTES = 2**20
_MOST_CHECKED = 64
"""How many objects of local data are compared with an index."""


class IndexFiles:
    """The indexes of a process.

    Args:
        run: The run whose indexes this process takes, and makes none; None: it makes them.
        known: The digests of the run's indexes, by the ids of their sources.
        tell: Called with a line every few seconds while an index is made.
        listed_again_after_s: How long an index is the answer once it is made, in seconds.
        clock: A monotonic clock, in seconds.

    Attributes:
        opened: By the ids of their sources, the indexes that this process has opened.
    """

    def __init__(
        self,
        run: RunDirectory | None = None,
        known: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = lambda _: None,
        *,
        listed_again_after_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.opened: dict[str, Index] = {}
        self._opened_at: dict[str, float] = {}
        self._run, self._known, self._tell = run, known or {}, tell
        self._listed_again_after_s, self._clock = listed_again_after_s, clock

    def open(self, source: Source, build: Build) -> Index:
        """Returns the index of a source: that of the run, or a new one.

        Raises:
            ValueError: What is there is no data of this format.
            StorageError: The data or the run directory cannot be read, or the cache cannot be written.
            ClusterError: The run has no index of this source, or this host has other data than the index says.
        """
        source = _portable(source)
        for other, opened_at in list(self._opened_at.items()):
            if self._clock() - opened_at > self._listed_again_after_s:
                del self.opened[other], self._opened_at[other]
        if source.id not in self.opened:
            if self._run is None:
                self.opened[source.id] = self._make(source, build)
            else:
                self.opened[source.id] = self._of_run(self._run, source)
            self._opened_at[source.id] = self._clock()
        return self.opened[source.id]

    def _make(self, source: Source, build: Build) -> Index:
        progress = ListingProgress(source.url, self._tell, self._clock)
        builder = IndexBuilder(source, progress)
        build(Store(source.url), builder)
        index = _keep(source.id, builder.write)
        progress.end()
        return index

    def _of_run(self, run: RunDirectory, source: Source) -> Index:
        digest = self._known.get(source.id)
        if digest is None:
            raise ClusterError(
                f"{source.url}: this host builds other data than the dry run, whose index the run has; let the data "
                "depend on nothing but the description",
                cause="environment",
                step=0,
            )
        index = fetch_index(run, digest)
        if index.source.id != source.id:
            raise StorageError(
                f"{run.url}: index {digest} of its data is one of {index.source.url}, not of {source.url}; resume the "
                "run, which makes it again"
            )
        _check_same_here(index)
        return index


_files = IndexFiles(listed_again_after_s=60.0)
"""For a process of a person's own, such as a notebook: two splits share a listing, and data that changes is seen."""


def use_index_files(files: IndexFiles) -> None:
    """Sets where this process gets indexes from; called before any dataset is built."""
    global _files
    _files = files


def open_index(source: Source, build: Build) -> Index:
    """Returns the index of a source, see ``IndexFiles.open``."""
    return _files.open(source, build)


def pack_index(index: Index) -> bytes:
    """Returns the content of an index's file, compressed, as a run directory holds it."""
    import pyarrow as pa

    with pa.memory_map(str(index.path)) as file:
        packed: bytes = pa.compress(file.read_buffer(), _CODEC, asbytes=True)
    return packed


def unpack_index(content: bytes, digest: str) -> Index:
    """Returns an index that was packed; its file is in the cache of this host.

    Raises:
        ValueError: The content is damaged.
        StorageError: The cache cannot be written.
    """
    index = _cached(digest)
    if index is None:
        index = _keep(digest, lambda path: _unpack(content, path))
        if index.digest != digest:
            raise ValueError(f"it is another one, {index.digest}")
    return index


def fetch_index(run: RunDirectory, digest: str) -> Index:
    """Returns an index of a run, from the cache of this host if it is there.

    Raises:
        StorageError: The run directory cannot be read, or its file is missing or damaged; or the cache cannot be
            written.
    """
    index = _cached(digest)
    if index is not None:
        return index
    try:
        return unpack_index(run.read_index(digest), digest)
    except ValueError as error:
        raise StorageError(
            f"{run.url}: index {digest} of its data is damaged, {one_line(error)}; delete it, and resume the run, "
            "which makes it again"
        ) from error


def _portable(source: Source) -> Source:
    """Returns a source that is the same in every process of a run.

    The code of a submitted run lies in a folder of each process's own, and what lies there is relative to it.
    """
    here = os.getcwd()
    if not is_own(here):
        return source

    def relative(value: Any) -> Any:
        if isinstance(value, str):
            return os.path.relpath(value, here) if value == here or value.startswith(f"{here}{os.sep}") else value
        if isinstance(value, Mapping):
            return {key: relative(each) for key, each in value.items()}
        return [relative(each) for each in value] if isinstance(value, (list, tuple)) else value

    return Source(source.format, relative(source.url), relative(source.options))


def _cached(digest: str) -> Index | None:
    """Returns the index with a digest if this host has it; one that a power loss has damaged does not count."""
    path = HostCache("indexes").hold(digest)
    try:
        index = Index(path)
    except (OSError, ValueError):
        return None
    return index if index.digest == digest and index.check() else None


def _keep(name: str, write: Callable[[Path], object]) -> Index:
    """Returns the index that ``write`` writes to a new file, which is then in the cache, unless it was there before.

    Other processes may do the same at once.

    Args:
        name: The digest, or the id of the source as long as no digest is known.
        write: Writes a file.

    Raises:
        ValueError: What is written is no whole index.
        StorageError: The cache cannot be written.
    """
    cache = HostCache("indexes")
    temporary = cache.unfinished(name)
    try:
        write(temporary)
        written = Index(temporary)
        if not written.check():
            raise ValueError("its digest is another")
        known = _cached(written.digest)
        if known is not None:  # not replaced: processes of other hosts that share the folder may have it mapped
            return known
        path = cache.hold(written.digest)
        temporary.replace(path)
        return Index(path)
    except OSError as error:
        raise StorageError(f"{cache.folder}: cannot hold an index, {error}; make room or give access there") from error
    finally:
        temporary.unlink(missing_ok=True)
        cache.sweep()


def _unpack(content: bytes, path: Path) -> None:
    import pyarrow as pa

    with path.open("xb") as file:
        try:
            with pa.CompressedInputStream(pa.BufferReader(content), _CODEC) as packed:
                shutil.copyfileobj(packed, file, _CHUNK_BYTES)
        except OSError as error:
            if error.errno is None:  # Arrow's own
                raise ValueError(f"{error}") from error
            raise


def _check_same_here(index: Index) -> None:
    """Checks a few objects of an index whose data is on this machine: another host may have another copy, or none.

    A table lists what need not exist; so of objects whose size it does not know, one must be there.

    Raises:
        ClusterError: One is missing, or has another size.
    """
    place = Store(index.source.url).url
    names, sizes = index.objects["name"], index.objects["size"]
    if "://" in place or not len(names):
        return
    problem, has_any = "", False
    for number in np.unique(np.linspace(0, len(names) - 1, _MOST_CHECKED).astype(int)).tolist():
        path = os.path.join(place, os.fsdecode(names[number].as_py()))
        listed = sizes[number].as_py()
        try:
            size = os.stat(path).st_size
        except OSError as error:
            problem = problem or f"{path}: cannot be read on this host, {error.strerror}, and is"
            if listed == -1:
                continue
        else:
            if listed in (-1, size):
                has_any = True
                continue
            problem = f"{path}: has {size:,} bytes on this host, and {listed:,}"
        has_any = False
        break
    if problem and not has_any:
        raise ClusterError(
            f"{problem} in the index of the run; give every node the same data", cause="environment", step=0
        )
