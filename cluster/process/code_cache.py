"""Cache of unpacked code bundles on a host, shared by all processes of a user, and copies of it to work in."""

import os
import shutil
from pathlib import Path

from cluster.errors import StorageError
from cluster.host.scratch import make_own_folder, sweep_own_folders
from cluster.process.host_cache import HostCache
from cluster.run.bundle import check_digest, is_intact, unpack
from cluster.run.run_directory import RunDirectory


def fetch_code(run: RunDirectory, sha256: str, *, check_store: bool = False) -> Path:
    """Return the folder of a run's code on this host; fetch it from the run directory unless it is there and intact.

    All processes of this user share the folder, so none may use it as its working directory: see ``enter_copy``. It
    stays as long as this process lives. Files that ended processes left on this host are removed.

    Args:
        run: The run directory that holds the bundle.
        sha256: The digest of the bundle.
        check_store: Read the bundle even if it is cached, because other hosts will have to read it.

    Raises:
        StorageError: The bundle is missing or damaged, ``sha256`` is no digest, or there is no safe place to unpack it.
    """
    check_digest(sha256)
    cache = HostCache("code")
    folder = cache.hold(sha256)
    if check_store or not is_intact(folder, sha256):
        unpack(run.read_code(sha256), sha256, cache.folder)
    cache.sweep()
    sweep_own_folders()
    return folder


def enter_copy(unpacked: Path, directory: str | None) -> None:
    """Copy a folder of the code to a temporary folder of this process, and make that the working directory.

    This happens even on a host that has a folder at the path of the submitter's working directory: its files may
    differ, and a run must find the same files on every host that it continues on.

    Args:
        unpacked: What ``fetch_code`` returned.
        directory: The folder in the bundle; None: the working directory is empty.

    Raises:
        StorageError: The copy cannot be written.
    """
    try:
        own = make_own_folder()
        copy_code(unpacked, directory, own)
        os.chdir(own)
    except OSError as error:
        raise StorageError(
            f"code cannot be copied to a folder of its own: {error}; set TMPDIR to a folder that can be written to"
        ) from error


def copy_code(unpacked: Path, directory: str | None, to: Path) -> None:
    """Copy a folder of a bundle to a working directory.

    Relative paths then find the files that came with the code, and writing to those files affects no other process.

    Args:
        unpacked: What ``fetch_code`` returned.
        directory: The folder in the bundle; None: the working directory is empty.
        to: The folder to copy to; it need not exist.

    Raises:
        StorageError: The copy cannot be written.
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
