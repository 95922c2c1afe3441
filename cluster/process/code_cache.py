"""Cache of unpacked code bundles on a host, shared by all processes of a user, and copies of it to work in."""

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
"""Age at which a bundle that no process uses is removed."""

_held: dict[Path, int] = {}
"""File descriptors, by path, of the locks that this process or the one it was forked from holds until it ends."""


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
    below, locks = cache_folder("code"), cache_folder("code-in-use")
    _note_use(locks / sha256)
    if check_store or not is_intact(below / sha256, sha256):
        unpack(run.read_code(sha256), sha256, below)
    _sweep(below, locks)
    sweep_own_folders()
    return below / sha256


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


def cache_folder(*names: str) -> Path:
    """Return a folder of this user's cache on this host, with mode 700, so that others cannot put code there.

    Raises:
        StorageError: The folder cannot be created, or belongs to another user.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("launcher", *names)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            raise StorageError(f"{folder}: belongs to another user; set XDG_CACHE_HOME to a folder of your own")
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise StorageError(
            f"code cannot be unpacked on this host: {error}; set XDG_CACHE_HOME to a folder of your own"
        ) from error
    return folder


def _note_use(lock: Path) -> None:
    """Protect a bundle from sweeps as long as this process lives, and record the time of its use.

    The protection is a file lock and not a process id: hosts may share a home, and none sees the processes of another.
    On a file system without locks, a sweep gets no lock either and removes nothing.
    """
    with suppress(OSError):
        if lock not in _held:
            _held[lock] = _locked(lock, fcntl.LOCK_SH)
        os.utime(lock)


def _locked(lock: Path, how: int) -> int:
    """Lock a file and return its descriptor. Open it again if a sweep removed it before the lock was taken.

    Raises:
        OSError: The lock cannot be taken.
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
    """Remove unused bundles and leftovers of ended processes. Never raise: a failed clean-up is no reason to fail."""
    try:
        names = os.listdir(below)
    except OSError:
        return
    for name in names:
        digest, unfinished, process = name.partition(UNFINISHED)
        digest = digest.partition(DAMAGED)[0]
        with suppress(OSError, StorageError):
            check_digest(digest)
            if unfinished:
                ended = has_ended(process)
                if ended or (ended is None and _is_old(below / name)):
                    remove_folder(below / name)
            else:
                _remove_unused(below / name, locks / digest)


def _remove_unused(folder: Path, lock: Path) -> None:
    """Remove a bundle, or a damaged one that was put aside, if it is old and no process uses it.

    Raises:
        OSError: A process uses it, or it cannot be removed.
    """
    is_damaged = folder.name != lock.name
    if not lock.exists():  # another version of the launcher made it: count its age from now
        lock.touch(0o600)
    if not _is_old(folder if is_damaged else lock):
        return
    opened = _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        if not _is_old(folder if is_damaged else lock):  # it was used before the lock was taken
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
