"""What a verification has found whole so far, in a file of the user's cache, so that the next one goes on from it."""

import fcntl
import os
import time
from contextlib import suppress

import numpy as np

from cluster.errors import StorageError
from cluster.process.host_cache import cache_folder

RECORD = np.dtype([("number", "<i8"), ("sha256", "S32")])
"""A sample that was read and decoded: its number in the index, and the SHA-256 of its encoded image.

numpy ignores zero bytes at the end of text; two digests of 32 bytes are still equal only if all bytes are.
"""
_UNUSED_S = 30 * 24 * 3600.0
"""Age at which the file of a verification that nobody has gone on with is removed."""


class VerifiedFile:
    """The samples of an index that were found whole; the digest of an index covers its source, too.

    Broken samples are not kept: they are read again, because they may have been repaired.

    Raises:
        StorageError: Another process verifies the same samples, or the file cannot be written.
    """

    def __init__(self, digest: str) -> None:
        folder = cache_folder("verified")
        for old in folder.iterdir():
            with suppress(OSError):  # another process may remove it too
                if time.time() - old.stat().st_mtime > _UNUSED_S:
                    old.unlink()
        self._path = folder / digest
        self._file = self._opened()

    def _opened(self) -> int:
        opened = None
        try:
            opened = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(opened).st_size
            os.truncate(opened, size - size % RECORD.itemsize)  # what a full disk has cut
        except OSError as error:
            if opened is not None:
                os.close(opened)
            if isinstance(error, BlockingIOError):
                raise StorageError(
                    f"{self._path}: another command verifies the same samples; wait for its end"
                ) from error
            raise self._unwritable(error) from error
        return opened

    def records(self) -> np.ndarray:
        """Return the samples that were found whole. Shapes: RECORD [found]."""
        return np.fromfile(self._path, RECORD)

    def add(self, records: np.ndarray) -> None:
        """Keep samples. Shapes: records RECORD [any]."""
        try:
            os.write(self._file, records.tobytes())
        except OSError as error:
            raise self._unwritable(error) from error

    def remove(self) -> None:
        """Remove the file: every sample was read."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes go on from the file."""
        os.close(self._file)

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._path}: cannot keep what was verified, {error.strerror}; make room, or set XDG_CACHE_HOME to "
            "another folder"
        )
