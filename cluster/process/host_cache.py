"""A cache of this user on this host, shared by all of the user's processes: entries, files or folders, named by digest.

An entry stays as long as a process that uses it lives, and for thirty days after that. What a killed process left
unfinished carries its name, and goes with the next sweep.
"""

import fcntl
import os
import re
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from cluster.errors import StorageError
from cluster.host.scratch import has_ended, owner
from cluster.run.bundle import DAMAGED, UNFINISHED, remove_folder

_UNUSED_S = 30 * 24 * 3600.0
"""Age at which an entry that no process uses is removed."""
_DIGEST = re.compile("[0-9a-f]{32,64}")
_NAME = re.compile(f"({_DIGEST.pattern})(?:{UNFINISHED}(.*)|{DAMAGED}.*)?")

_held: dict[Path, int] = {}
"""File descriptors, by path, of the locks that this process or the one it was forked from holds until it ends."""


def cache_folder(*names: str) -> Path:
    """Return a folder of this user's cache on this host, which others can neither read nor write to.

    It and the folders around it, up to that of the launcher, have mode 700. Whoever can write to the folder around
    these, see ``XDG_CACHE_HOME``, can replace them by others.

    Raises:
        StorageError: A folder cannot be created, or belongs to another user.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("launcher", *names):
            folder /= name
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.stat()
            if status.st_uid != os.geteuid():
                raise StorageError(f"{folder}: belongs to another user; set XDG_CACHE_HOME to a folder of your own")
            if stat.S_IMODE(status.st_mode) != 0o700:
                folder.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise StorageError(
            f"the cache of this host cannot be used: {error}; set XDG_CACHE_HOME to a folder of your own"
        ) from error
    return folder


class HostCache:
    """The entries of one kind.

    Attributes:
        folder: Where they lie, each under its digest in lower-case hexadecimal.
    """

    def __init__(self, kind: str) -> None:
        """Opens it.

        Raises:
            StorageError: Its folders cannot be created, or belong to another user.
        """
        self.folder, self._locks = cache_folder(kind), cache_folder(f"{kind}-in-use")

    def hold(self, digest: str) -> Path:
        """Protect an entry from sweeps as long as this process lives, and record the time of its use.

        The protection is a file lock and not a process id: hosts may share a home, and none sees the processes of
        another. On a file system without locks, a sweep gets no lock either and removes nothing.

        Returns:
            The entry, which need not exist yet.

        Raises:
            StorageError: It is no digest, and may lead elsewhere: others can write the document that it comes from.
        """
        if not _DIGEST.fullmatch(digest):
            raise StorageError(f"{digest!r}: is no digest, and {self.folder} holds nothing else; restore its document")
        lock = self._locks / digest
        with suppress(OSError):
            if lock not in _held:
                _held[lock] = locked(lock, fcntl.LOCK_SH)
            os.utime(lock)
        return self.folder / digest

    def unfinished(self, digest: str) -> Path:
        """Return a new name for an entry that this process is making; ``digest`` need not be the entry's own."""
        return self.folder / f"{digest}{UNFINISHED}{owner()}{secrets.token_hex(4)}"

    def sweep(self) -> None:
        """Remove unused entries, locks without an entry, and leftovers of ended processes.

        Never raise: a failed clean-up is no reason to fail.
        """
        try:
            names, locks = os.listdir(self.folder), os.listdir(self._locks)
        except OSError:
            return
        for name in names:
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            digest, process = match.groups()
            with suppress(OSError):
                if process is None:
                    self._remove_unused(self.folder / name, digest)
                    continue
                ended = has_ended(process)
                if ended or (ended is None and _is_old(self.folder / name)):
                    remove_folder(self.folder / name)

        for name in locks:
            if _DIGEST.fullmatch(name):
                with suppress(OSError):
                    self._remove_lock(name)

    def _remove_unused(self, entry: Path, digest: str) -> None:
        """Remove an entry, or a damaged one that was put aside, if it is old and no process uses it.

        Raises:
            OSError: A process uses it, or it cannot be removed.
        """
        lock, is_damaged = self._locks / digest, entry.name != digest
        if not lock.exists():  # another version of the launcher made it: count its age from now
            lock.touch(0o600)
        if not _is_old(entry if is_damaged else lock):
            return
        opened = locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            if not _is_old(entry if is_damaged else lock):  # it was used before the lock was taken
                return
            gone = self.unfinished(digest)
            os.rename(entry, gone)
            if not (self.folder / digest).exists():
                lock.unlink()
        finally:
            os.close(opened)
        remove_folder(gone)

    def _remove_lock(self, digest: str) -> None:
        """Remove an old lock whose entry never came or was removed by hand, if no process uses it.

        Raises:
            OSError: A process uses it, or it cannot be removed.
        """
        lock, entry = self._locks / digest, self.folder / digest
        if entry.exists() or not _is_old(lock):
            return
        opened = locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            if _is_old(lock) and not entry.exists():  # nobody came before the lock was taken
                lock.unlink()
        finally:
            os.close(opened)


def locked(lock: Path, how: int) -> int:
    """Lock a file and return its descriptor. Open it again if another process removed it before the lock was taken.

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


def _is_old(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > _UNUSED_S
