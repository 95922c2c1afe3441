"""Folders that belong to one process of this host and are removed with it.

They lie in one folder per user in the temporary folder, not in the cache: a cache may be shared by hosts that cannot
see each other's processes, is not cleared when a host restarts, and may be slow to write to. The name of a folder
identifies its owner, ``PID-START-PLACE-RANDOM``, so that a later process can remove what a killed one has left. A
folder whose owner is alive, or not visible from here, is left alone.
"""

import atexit
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from cluster.host.identity import place, started
from cluster.host.temporary_folder import in_temporary_folder

_OWNER = re.compile("([0-9]+)-([0-9]+)-([0-9a-f]{12})-")
_PRIVATE = 0o700

_made: list[Path] = []
"""Folders made by this process, or by the one that it was forked from."""


def make_own_folder() -> Path:
    """Makes a new, empty, private folder that is removed when this process exits.

    Raises:
        TemporaryFolderError: The temporary folder cannot be written to.
    """
    with in_temporary_folder():
        parent = _parent_folder()
        if parent is None:  # another user has the name: better a folder that nobody sweeps than none
            folder = Path(tempfile.mkdtemp(prefix=owner()))
        else:
            folder = parent / f"{owner()}{secrets.token_hex(4)}"
            folder.mkdir(mode=_PRIVATE)
    _made.append(folder)
    atexit.register(_remove_if_owner, folder, os.getpid())
    return folder


def is_own(folder: str) -> bool:
    """Returns whether a folder belongs to this process."""
    return any(os.path.exists(made) and os.path.samefile(made, folder) for made in _made)


def sweep_own_folders() -> None:
    """Removes the folders of ended processes of this host. Never raises: tidiness is no reason to fail."""
    parent = _parent_folder()
    if parent is None:
        return
    with suppress(OSError):
        for name in os.listdir(parent):
            if has_ended(name):
                shutil.rmtree(parent / name, ignore_errors=True)


def owner() -> str:
    """Returns the prefix for names of what this process owns; see ``has_ended``."""
    pid = os.getpid()
    return f"{pid}-{started(pid) or 0}-{_short_place()}-"


def has_ended(name: str) -> bool | None:
    """Returns whether the process whose ``owner`` prefix a name has is gone; None if that is not visible from here."""
    match = _OWNER.match(name)
    if match is None or place() is None or match[3] != _short_place():
        return None
    return started(int(match[1])) != match[2]


def _short_place() -> str:
    return hashlib.sha256((place() or "").encode()).hexdigest()[:12]


def _parent_folder() -> Path | None:
    """Returns the parent of the folders of this user's processes; None if other users could tamper with it."""
    folder = Path(tempfile.gettempdir()) / f"launcher-{os.geteuid()}"
    try:
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if stat.S_IMODE(status.st_mode) != _PRIVATE:
            folder.chmod(_PRIVATE)
    except OSError:
        return None
    return folder


def _remove_if_owner(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a process forked from it
        shutil.rmtree(folder, ignore_errors=True)
