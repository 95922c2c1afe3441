"""The code of runs as it lies unpacked on a host, for all processes of a user there, and where they work with it."""

import fcntl
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from cluster.errors import StorageError
from cluster.host.scratch import has_ended, make_own_folder, owner, sweep_own_folders
from cluster.run.bundle import DAMAGED, UNFINISHED, check_digest, is_intact, remove_folder, unpack
from cluster.run.run_directory import RunDirectory

_UNUSED_S = 30 * 24 * 3600.0
"""After that, a bundle that no process uses is removed."""

_held: dict[Path, int] = {}
"""The locks that this process, or the one that it was forked from, keeps to its end: file descriptors by path."""


def fetch_code(run: RunDirectory, sha256: str, *, check_store: bool = False) -> Path:
    """The folder of a run's code on this host, fetched from the run directory unless it is there and intact.

    All processes of this user share it, so it must be nobody's working directory: see ``enter_copy``. It stays as
    long as this process lives; what processes that have ended have left on this host is removed.

    Args:
        run: Whose code it is.
        sha256: The digest of the bundle.
        check_store: Read the bundle in any case, since other hosts will have to.

    Raises:
        StorageError: The bundle is missing or damaged, that is no digest, or there is no safe place to unpack it.
    """
    check_digest(sha256)
    below, locks = cache_folder("code"), cache_folder("code-in-use")
    _note_use(locks / sha256)
    if check_store or not is_intact(below / sha256, sha256):
        unpack(run.read_code(sha256), sha256, below)
    _sweep(below, locks)
    sweep_own_folders()
    return below / sha256


def enter_copy(unpacked: Path, directory: str | None) -> None:
    """Changes into a copy of a folder of a run's code: a folder of this process's own, which goes with it.

    Also on a host that has the submitter's working directory by its name. What lies in that cannot be told from here to
    be the same, and a run is to find the same files wherever it goes on.

    Args:
        unpacked: What ``fetch_code`` returns.
        directory: The folder in the bundle; none: the working directory is empty.

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


def cache_folder(*names: str) -> Path:
    """A folder of this user's cache on this host: others must not be able to put code there that this user would run.

    Raises:
        StorageError: It cannot be made, or belongs to another user.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("launcher", *names)
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


def _note_use(lock: Path) -> None:
    """Keeps a bundle from sweeps as long as this process lives, and notes when it was used.

    A lock, and not the number of the process: where hosts share a home, none sees the processes of another. Where the
    file system has no locks, sweeps get none either, and remove nothing.
    """
    with suppress(OSError):
        if lock not in _held:
            _held[lock] = _locked(lock, fcntl.LOCK_SH)
        os.utime(lock)


def _locked(lock: Path, how: int) -> int:
    """A lock on a file that is there: a sweep may have removed it just before.

    Raises:
        OSError: It is not to be had.
    """
    while True:
        opened = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(opened, how)
            if os.fstat(opened).st_nlink:
                return opened
        except OSError:
            os.close(opened)
            raise
        os.close(opened)


def _sweep(below: Path, locks: Path) -> None:
    """Removes what nobody needs any more of all that is unpacked here. Never raises: tidiness is no reason to fail."""
    try:
        names = os.listdir(below)
    except OSError:
        return
    for name in names:
        digest, unfinished, of = name.partition(UNFINISHED)
        digest = digest.partition(DAMAGED)[0]
        with suppress(OSError, StorageError):
            check_digest(digest)
            if unfinished:
                ended = has_ended(of)
                if ended or (ended is None and _is_old(below / name)):
                    remove_folder(below / name)
            else:
                _remove_unused(below / name, locks / digest)


def _remove_unused(folder: Path, lock: Path) -> None:
    """Removes a bundle, or a damaged one that was put aside, that is old and that no process uses.

    Raises:
        OSError: One does, or it cannot be removed.
    """
    is_damaged = folder.name != lock.name
    if not lock.exists():  # it comes from another version: its time begins now
        lock.touch(0o600)
    if not _is_old(folder if is_damaged else lock):
        return
    opened = _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        if not _is_old(folder if is_damaged else lock):  # it was used in between
            return
        gone = folder.with_name(f"{lock.name}{UNFINISHED}{owner()}{secrets.token_hex(4)}")
        os.rename(folder, gone)
        if not folder.with_name(lock.name).exists():
            lock.unlink()
    finally:
        os.close(opened)
    remove_folder(gone)


def _is_old(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > _UNUSED_S
