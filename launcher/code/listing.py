"""Which files of a folder belong to the user's code.

All regular files do, except what git ignores and what no job needs: caches, environments, run directories. Files whose
names look like secrets are refused, and so are the files of the user's tokens for clusters. No file is read here but
the signature of a ``CACHEDIR.TAG``.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import DescriptionError, listed
from cluster.ray.token import token_files
from cluster.run.bundle import MAX_BYTES, MAX_FILES
from cluster.run.run_directory import is_run
from launcher.code.file_messages import NUM_NAMED, listed_names, mebibytes, shown, unreadable
from launcher.code.gitignore import GitIgnore
from launcher.code.secret_names import is_secret

_LEFT_OUT = frozenset({".git", ".DS_Store"})
_LEFT_OUT_SUFFIXES = (".pyc", ".pyo")
_LEFT_OUT_FOLDERS = frozenset(
    {
        ".cache", ".eggs", ".hg", ".hypothesis", ".ipynb_checkpoints", ".mypy_cache", ".nox", ".pixi", ".pytest_cache",
        ".ruff_cache", ".svn", ".tox", "__pycache__", "node_modules", "wandb",
    }
)  # fmt: skip
"""Names of folders, and of symbolic links wherever they lead."""
_ENVIRONMENT_MARKERS = frozenset({"pyvenv.cfg", "conda-meta"})
"""Entries of a folder that is a Python environment."""
_CACHE_MARKER = ("CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55")
"""Source: https://bford.info/cachedir/"""


@dataclass(slots=True)
class Listing:
    """The files of the user's code in a folder, by name and size; none of them is opened."""

    top: Path
    """The folder, without symbolic links on the way."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes by file name, which is a path relative to ``top`` with forward slashes."""
    secrets: list[str] = field(default_factory=list)
    """Files that look like secrets, or are tokens."""
    links: list[str] = field(default_factory=list)
    """Symbolic links that are refused, each with the reason."""
    _token_files: list[os.stat_result] = field(default_factory=lambda: _existing(token_files()))
    """The files of the user's tokens for clusters; a link to one is recognized too."""

    def visit(self, folder: Path, ignore: GitIgnore, around: tuple[str, ...]) -> None:
        """List the files of a folder and of the folders in it.

        Args:
            folder: The folder: ``top`` or below it, perhaps through symbolic links.
            ignore: The ``.gitignore`` files that apply in its parent folder.
            around: The real paths of the folders from ``top`` to this one, inclusive; a link to one is a loop.
        """
        ignore = ignore.inside(folder)
        for entry in _entries(folder):
            path, name = folder / entry.name, (folder / entry.name).relative_to(self.top).as_posix()
            is_link = entry.is_symlink()
            is_folder = entry.is_dir(follow_symlinks=False)
            if _is_left_out(entry.name, is_folder or is_link) or ignore.ignores(path, is_folder=is_folder):
                continue
            if is_secret(path, is_folder):
                self.secrets.append(name)
                continue
            real = os.path.join(around[-1], entry.name)
            if is_link:
                real, problem = self._follow(path, around)
                if problem:
                    self.links.append(f"{shown(name)} {problem}")
                    continue
                if self._is_link_left_out(name, Path(real)):
                    continue
            if is_folder or os.path.isdir(real):
                if not _is_marked(Path(real)):
                    self.visit(path, ignore, (*around, real))
            else:
                self.add(path, name)

    def check(self) -> None:
        """Check that everything that was found may be packed.

        Raises:
            DescriptionError: There are refused links or secrets, or the files are too large.
        """
        if self.links:
            raise DescriptionError(
                f"{self.top}: symbolic links that cannot be packed: {listed(self.links, NUM_NAMED)}; "
                "replace them by files, or add them to .gitignore without a slash at the end"
            )
        if self.secrets:
            raise DescriptionError(
                f"{self.top}: files that look like secrets would be uploaded: {listed_names(self.secrets)}; "
                "add them to .gitignore"
            )
        size = sum(self.sizes.values())
        if size > MAX_BYTES:
            largest = sorted(self.sizes, key=lambda name: (-self.sizes[name], name))
            told = ", ".join(f"{shown(name)} {mebibytes(self.sizes[name])}" for name in largest[:NUM_NAMED])
            raise DescriptionError(
                f"{self.top}: the code has {mebibytes(size)}, the limit is {MAX_BYTES >> 20} MiB; the largest files: "
                f"{told}; add what is not code to .gitignore, data belongs in the store"
            )

    def add(self, path: Path, name: str) -> None:
        """List a file.

        Raises:
            DescriptionError: The file cannot be read, its name is not UTF-8, or there are too many files.
        """
        try:
            status = path.stat()
        except FileNotFoundError:  # deleted meanwhile
            return
        except OSError as error:
            raise unreadable(path, error) from error
        if not stat.S_ISREG(status.st_mode):  # a socket, a pipe, a device
            return
        if any(os.path.samestat(status, token) for token in self._token_files):
            self.secrets.append(name)
            return
        if not _is_utf8(name):
            raise DescriptionError(
                f"{self.top}: the name {shown(name)} is not UTF-8; rename the file, or add it to .gitignore"
            )
        self.sizes[name] = status.st_size
        if len(self.sizes) > MAX_FILES:
            fullest = Counter(os.path.dirname(name) or "." for name in self.sizes).most_common(3)
            raise DescriptionError(
                f"{self.top}: the code has more than {MAX_FILES:,} files, most of them in "
                f"{listed_names([folder for folder, _ in fullest])}; "
                "add what is not code to .gitignore, data belongs in the store"
            )

    def _follow(self, path: Path, around: tuple[str, ...]) -> tuple[str, str]:
        """Return where a symbolic link leads, and why it is refused; an empty reason: it is not."""
        try:
            real = os.path.realpath(path, strict=True)
        except FileNotFoundError:
            return "", "leads nowhere"
        except OSError as error:
            return "", "leads to itself" if error.errno == errno.ELOOP else f"cannot be followed ({error.strerror})"
        if real in around:
            return real, "leads to a folder that it lies in"
        return real, "" if Path(real).is_relative_to(self.top) else "leads out of the folder"

    def _is_link_left_out(self, name: str, real: Path) -> bool:
        """Return whether a symbolic link is left out because of where it leads; record it if that is a secret."""
        inside = real.relative_to(self.top)
        folders = [self.top / parent for parent in inside.parents if parent.name]
        if any(_is_left_out(parent.name, True) or _is_marked(parent) for parent in folders):
            return True
        if _is_left_out(inside.name, real.is_dir()):
            return True
        if is_secret(real, real.is_dir()) or any(is_secret(parent, True) for parent in folders):
            self.secrets.append(name)
            return True
        return False


def _existing(paths: Sequence[Path]) -> list[os.stat_result]:
    """Return the status of those files that exist."""
    found = []
    for path in paths:
        with suppress(OSError):
            found.append(path.stat())
    return found


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    """Return the entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):  # deleted meanwhile
        return []
    except OSError as error:
        raise unreadable(folder, error) from error


def _is_left_out(name: str, may_be_folder: bool) -> bool:
    return name in _LEFT_OUT or name.endswith(_LEFT_OUT_SUFFIXES) or (may_be_folder and name in _LEFT_OUT_FOLDERS)


def _is_marked(folder: Path) -> bool:
    """Return whether an entry of the folder marks it as an environment, a cache or a run directory."""
    names = {entry.name for entry in _entries(folder)}
    return not _ENVIRONMENT_MARKERS.isdisjoint(names) or is_run(names) or _is_cache(folder, names)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_cache(folder: Path, names: set[str]) -> bool:
    name, signature = _CACHE_MARKER
    if name not in names:
        return False
    try:
        with open(folder / name, "rb") as file:
            return file.read(len(signature)) == signature
    except OSError:
        return False
