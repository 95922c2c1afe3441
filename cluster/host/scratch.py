"""Folders that belong to one process of this host and go with it.

They lie below one folder of the user in the temporary folder, and not in the cache: that one may be shared by hosts
that cannot see each other's processes, is nobody's to clear when a host starts again, and may be slow to write to. The
name of a folder tells its owner, ``PID-START-PLACE-RANDOM``, so that whoever comes later can remove what a killed
process has left. A folder whose owner lives, or cannot be seen from here, is left alone.
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

_OWNER = re.compile("([0-9]+)-([0-9]+)-([0-9a-f]{12})-")
_PRIVATE = 0o700

_made: list[Path] = []
"""By this process, or by the one that it was forked from."""


def make_own_folder() -> Path:
    """A new, empty folder, for this user alone, that goes with this process.

    Raises:
        OSError: The temporary folder cannot be written to.
    """
    common = _common_folder()
    if common is None:  # somebody else has taken the name: a folder that nobody sweeps is better than none
        folder = Path(tempfile.mkdtemp(prefix=owner()))
    else:
        folder = common / f"{owner()}{secrets.token_hex(4)}"
        folder.mkdir(mode=_PRIVATE)
    _made.append(folder)
    atexit.register(_discard, folder, os.getpid())
    return folder


def is_own(folder: str) -> bool:
    """Whether a folder goes with this process."""
    return any(os.path.exists(made) and os.path.samefile(made, folder) for made in _made)


def sweep_own_folders() -> None:
    """Removes the folders of processes of this host that have ended. Never raises: tidiness is no reason to fail."""
    common = _common_folder()
    if common is None:
        return
    with suppress(OSError):
        for name in os.listdir(common):
            if has_ended(name):
                shutil.rmtree(common / name, ignore_errors=True)


def owner() -> str:
    """How the names of what this process owns begin; see ``has_ended``."""
    pid = os.getpid()
    return f"{pid}-{started(pid) or 0}-{_short_place()}-"


def has_ended(name: str) -> bool | None:
    """Whether the process has ended whose ``owner`` a name begins with; none if that cannot be told from here."""
    match = _OWNER.match(name)
    if match is None or place() is None or match[3] != _short_place():
        return None
    return started(int(match[1])) != match[2]


def _short_place() -> str:
    return hashlib.sha256((place() or "").encode()).hexdigest()[:12]


def _common_folder() -> Path | None:
    """The folder that has those of all of this user's processes; none if it is not safe from others."""
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


def _discard(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # and not a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
