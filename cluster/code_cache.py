"""The code of runs as it lies unpacked on a host, for all processes of a user there."""

import os
import shutil
import stat
from pathlib import Path

from cluster.bundle import check_digest, is_intact, unpack
from cluster.errors import StorageError
from cluster.run_directory import RunDirectory


def fetch_code(run: RunDirectory, sha256: str, *, check_store: bool = False) -> Path:
    """The folder of a run's code on this host, fetched from the run directory unless it is there and intact.

    All processes of this user share it, so it must be nobody's working directory: see ``copy_code``.

    Args:
        run: Whose code it is.
        sha256: The digest of the bundle.
        check_store: Read the bundle in any case, since other hosts will have to.

    Raises:
        StorageError: The bundle is missing or damaged, that is no digest, or there is no safe place to unpack it.
    """
    check_digest(sha256)
    below = _private_folder()
    if not check_store and is_intact(below / sha256, sha256):
        return below / sha256
    return unpack(run.read_code(sha256), sha256, below)


def copy_code(unpacked: Path, directory: str | None, to: Path) -> None:
    """Makes a working directory of a process's own from a folder of a bundle.

    Relative paths then find the files that the code came with, and what is written to them reaches no other process.

    Args:
        unpacked: What ``fetch_code`` returns.
        directory: The folder in the bundle; none: the working directory is empty.
        to: What to make; it need not exist.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory is None:
            return
        folder = unpacked / directory
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            here = to / os.path.relpath(parent, folder)
            here.mkdir(exist_ok=True)
            for name in names:
                shutil.copyfile(os.path.join(parent, name), here / name)
                if os.access(os.path.join(parent, name), os.X_OK):
                    (here / name).chmod(0o755)
    except OSError as error:
        raise StorageError(
            f"code cannot be copied to {to}: {error.strerror}; make room or give access there"
        ) from error


def _private_folder() -> Path:
    """Where bundles are unpacked: others must not be able to put code there that this user would run."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "launcher" / "code"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            raise StorageError(f"{folder}: belongs to another user; set XDG_CACHE_HOME to a folder of your own")
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise StorageError(
            f"code cannot be unpacked on this host: {error}; set XDG_CACHE_HOME to a folder of your own"
        ) from error
    return folder
