"""The temporary folder: whether Unix sockets and files can be made in it; an error names the variable that sets it."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import ClusterError

VARIABLE = "TMPDIR"
_MAX_SOCKET_BYTES = 107 if sys.platform == "linux" else 103
"""Longest path of a Unix socket: unix(7), without the zero at its end."""


class TemporaryFolderError(ClusterError):
    """The temporary folder of this host cannot be used."""

    cause = "environment"


def check_socket_path(folder: str, below: str, variable: str = VARIABLE) -> None:
    """Check that sockets can be made in a folder.

    Args:
        folder: The folder that the user chose.
        below: The longest path of a socket below that folder.
        variable: The environment variable that names the folder.

    Raises:
        TemporaryFolderError: The path of such a socket would be too long.
    """
    num_bytes, most = len(os.fsencode(folder)), _MAX_SOCKET_BYTES - len(os.fsencode(below)) - 1
    if num_bytes > most:
        raise TemporaryFolderError(
            f"{variable}: must be a path of at most {most} bytes, for the sockets below it, got {num_bytes} bytes, "
            f"{folder}; set it to a shorter path"
        )


@contextmanager
def in_temporary_folder(folder: str | None = None, variable: str = VARIABLE) -> Iterator[None]:
    """Context that makes files in a folder, by default Python's temporary one.

    Raises:
        TemporaryFolderError: A file cannot be made or written.
    """
    try:
        yield
    except OSError as error:
        where = folder or tempfile.tempdir or os.environ.get(variable)
        raise TemporaryFolderError(
            f"{variable}: cannot write to {where or 'any temporary folder'}: {error.strerror}; "
            f"make room there, or set {variable} to another folder that can be written to"
        ) from error
