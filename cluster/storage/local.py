"""fsspec's local file system with syncs: a power loss neither tears a file nor brings back the previous one."""

import errno
import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class SyncedLocalFileSystem(LocalFileSystem):
    """Files on this machine or on what is mounted here."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        """Writes a file and syncs it to disk, by which time NFS and quotas also report a full disk."""
        assert mode == "overwrite"
        with open(path, "wb") as file:
            file.write(value)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, path: str, new_path: str) -> None:
        """Renames a file over whatever has the new name; a reader sees the old file or the new one.

        The folder is synced too, so that a power loss does not bring back the old file.
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # raised by file systems that cannot sync folders
            raise
