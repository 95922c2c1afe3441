"""fsspec's file system of this machine, made fit for training: what a loss of power leaves under a name is whole."""

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
        """Renames a file, in place of whatever has its new name; whoever opens that gets the old one or the new one."""
        os.replace(path, new_path)
