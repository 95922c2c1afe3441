"""The folder of Ray's sockets and logs on this host: ``ray`` in ``RAY_TMPDIR``, ``TMPDIR`` or ``/tmp``."""

import os
import sys
import tempfile

from cluster.host.temporary_folder import TemporaryFolderError, check_socket_path, in_temporary_folder

LONGEST_SOCKET = "session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
"""Below the folder of all sessions. Ray names one after the time of its start and the process that starts it."""
_ROOM_BYTES = 2**20
"""Room for the logs of a short session."""


def logs_path() -> str:
    """Return the folder of the newest session's logs."""
    return os.path.join(_parent()[1], "ray", "session_latest", "logs")


def check_session_folder() -> None:
    """Check that Ray can start a session on this host.

    Raises:
        TemporaryFolderError: Its sockets would have too long paths, or there is no room, or no right, to write; or
            the variable that names the folder is empty.
    """
    variable, parent = _parent()
    if not parent:  # Ray takes it for the folder of its sockets all the same
        raise TemporaryFolderError(f"{variable}: must not be empty; unset it, or set it to a folder")
    check_socket_path(parent, f"ray/{LONGEST_SOCKET}", variable)
    with in_temporary_folder(parent, variable):
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(_ROOM_BYTES))


def _parent() -> tuple[str, str]:
    """Return the variable that names Ray's temporary folder, and the folder.

    Source: ``get_default_system_temp_dir`` of ``ray._common.utils``.
    """
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    return next(((name, os.environ[name]) for name in names if name in os.environ), (names[-1], "/tmp"))  # noqa: S108
