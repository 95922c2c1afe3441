"""What a verification has found whole so far, in a file of the user's cache, so that the next one goes on from it."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from cluster.errors import StorageError
from cluster.process.host_cache import cache_folder, locked
from launcher.inspecting.stamps import UNKNOWN

RECORD = np.dtype([("number", "<i8"), ("sha256", "S32"), ("stamp", "<u8"), ("read_at", "<i8")])
"""A sample that was read and decoded: its number in the index, the SHA-256 of its encoded image, the stamp that its
object had before, see ``stamps_of``, and when it was read, in seconds since 1970.

numpy ignores zero bytes at the end of text; two digests of 32 bytes are still equal only if all bytes are.
"""
_UNUSED_S = 30 * 24 * 3600.0
"""Age at which the file of a verification that nobody has gone on with is removed."""


class VerifiedFile:
    """The samples of an index that were found whole: records that are only added, so that no end of a process, and no
    full disk, damages those before. Of a sample, its last record counts.

    Broken samples are not kept: they are read again, because they may have been repaired. Nor are samples without a
    stamp, because nothing would tell whether they have changed.

    Args:
        digest: Of the index.

    Raises:
        StorageError: Another process verifies samples of the same index, or the file cannot be written.
    """

    def __init__(self, digest: str) -> None:
        folder = cache_folder("verified")
        _remove_unused(folder)
        self._path = folder / digest
        try:
            self._file = locked(self._path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"{self._path}: another command verifies samples of the same data; wait for its end"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        size = os.fstat(self._file).st_size
        self._size = size - size % RECORD.itemsize  # the last write may have been cut

    def records(self) -> np.ndarray:
        """Return the samples that were found whole, sorted by number. Shapes: RECORD [found]."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            newest_first = np.fromfile(file, RECORD, self._size // RECORD.itemsize)[::-1]
        _, last = np.unique(newest_first["number"], return_index=True)
        records: np.ndarray = newest_first[last]
        known: np.ndarray = records[records["stamp"] != UNKNOWN]
        return known

    def add(self, records: np.ndarray) -> None:
        """Keep samples. Shapes: records RECORD [any]."""
        self._append(records[records["stamp"] != UNKNOWN])

    def forget(self, numbers: np.ndarray) -> None:
        """Drop samples; the file goes with the last one. Shapes: numbers int64 [any]."""
        records = self.records()
        is_dropped = np.isin(records["number"], numbers)
        if is_dropped.all():
            self._path.unlink(missing_ok=True)
            return
        dropped = records[is_dropped]
        dropped["stamp"] = UNKNOWN
        self._append(dropped)

    def close(self) -> None:
        """Let other processes go on from the file."""
        os.close(self._file)

    def _append(self, records: np.ndarray) -> None:
        """Write records behind the last whole one; a full disk may take some bytes before it refuses the others."""
        content, written = records.tobytes(), 0
        try:
            while written < len(content):
                written += os.pwrite(self._file, content[written:], self._size + written)
        except OSError as error:
            raise self._unwritable(error) from error
        self._size += written

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._path}: cannot keep what was verified, {error.strerror}; make room, or set XDG_CACHE_HOME to "
            "another folder"
        )


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(OSError):  # another process uses it, or has removed it
            if not _is_old(path):
                continue
            file = locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                if _is_old(path):  # nobody has gone on with it before the lock was taken
                    path.unlink()
            finally:
                os.close(file)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _UNUSED_S
