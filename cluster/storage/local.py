"""fsspec's file system of this machine, made fit for training: a loss of power tears no file and takes none back."""

import errno
import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class SyncedLocalFileSystem(LocalFileSystem):
    """Files on this machine, or on what is mounted here."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Writes a file through to the disk; also NFS and quotas tell by then that there is no room for it."""
        assert mode == "overwrite"
        with open(path, "wb") as file:
            file.write(value)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, path: str, new_path: str) -> None:
        """Renames a file, in place of whatever has its new name; whoever opens that gets the old one or the new one.

        The folder is written through to the disk too, so that a loss of power does not bring back the old one.
        """
        folder = os.open(os.path.dirname(new_path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.replace(path, new_path)
            _sync_folder(folder)
        finally:
            os.close(folder)


def _sync_folder(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what a file system says that syncs no folders
            raise
