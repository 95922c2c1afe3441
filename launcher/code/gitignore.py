"""Which files git ignores, according to the .gitignore files around them.

Only .gitignore files count, because they are the same on every machine: not .git/info/exclude, not the user's global
list, and not git's index, in which an ignored file may be tracked. ``pathspec`` translates the patterns. A pattern is
matched against one entry, never against the folders above it: as in git, the caller walks from the top down and does
not enter ignored folders.
"""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from cluster.errors import DescriptionError

_END = "/\0"
"""Appended to each pattern and each path, so that a pattern for a folder does not match the entries of the folder."""


@dataclass(frozen=True, slots=True)
class _PatternFile:
    """One .gitignore file."""

    folder: str
    """The folder of the file, with a slash at the end."""
    for_folders: GitIgnoreSpec
    """All patterns."""
    for_others: GitIgnoreSpec
    """The patterns that do not end in a slash; git applies the others to folders only, not to symbolic links."""


@dataclass(frozen=True, slots=True)
class GitIgnore:
    """The .gitignore files that apply in a folder."""

    files: tuple[_PatternFile, ...] = ()
    """Outermost first."""

    @classmethod
    def above(cls, folder: Path) -> "GitIgnore":
        """Return those of the folders above a folder, up to the root of its git checkout; none outside a checkout.

        Args:
            folder: An absolute path.

        Raises:
            DescriptionError: A file cannot be read, or has a pattern that is not supported.
        """
        inside = [folder]
        while not os.path.exists(inside[-1] / ".git"):
            if inside[-1] == inside[-1].parent:
                return cls()
            inside.append(inside[-1].parent)
        found = cls()
        for parent in reversed(inside[1:]):
            found = found.inside(parent)
        return found

    def inside(self, folder: Path) -> "GitIgnore":
        """Return those that apply in a subfolder: these, and its own file.

        Args:
            folder: A direct subfolder of the folder in which these apply.

        Raises:
            DescriptionError: The subfolder's file cannot be read, or has a pattern that is not supported.
        """
        outer = () if os.path.exists(folder / ".git") else self.files  # another checkout, such as a submodule
        path = folder / ".gitignore"
        if os.path.islink(path) or not os.path.isfile(path):  # git does not follow a link here either
            return GitIgnore(outer)
        return GitIgnore((*outer, _read(path)))

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Return whether git ignores an entry of the folder in which these apply; a symbolic link is not a folder."""
        for file in reversed(self.files):
            spec = file.for_folders if is_folder else file.for_others
            include = spec.check_file(str(path).removeprefix(file.folder) + _END).include
            if include is not None:
                return include
        return False


def _read(path: Path) -> _PatternFile:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DescriptionError(f"{path}: cannot be read, {error.strerror}; make it readable") from error
    for_folders, for_others = [], []
    for number, line in enumerate(os.fsdecode(data.removeprefix(b"\xef\xbb\xbf")).split("\n"), start=1):
        pattern = _trimmed(line.removesuffix("\r"))
        if pattern.removeprefix("!").strip("/") == "" or pattern.startswith("#"):
            continue
        exact = _exact(pattern)
        if not _is_supported(exact):
            raise DescriptionError(f"{path}: line {number}, {pattern!r}, is not supported; write it in another way")
        for_folders.append(exact)
        if not pattern.endswith("/"):
            for_others.append(exact)
    return _PatternFile(os.path.join(path.parent, ""), _spec(for_folders), _spec(for_others))


def _trimmed(line: str) -> str:
    """Return a line without trailing spaces, but keep one after an odd number of backslashes, which escape it."""
    trimmed = line.rstrip(" ")
    is_escaped = (len(trimmed) - len(trimmed.rstrip("\\"))) % 2 == 1
    return trimmed + " " if is_escaped and len(trimmed) < len(line) else trimmed


def _exact(pattern: str) -> str:
    """Return the pattern that matches the same entries with ``_END`` appended."""
    sign = "!" if pattern.startswith("!") else ""
    body = pattern.removeprefix(sign).removesuffix("/")
    body = f"/{body.removeprefix('/')}" if "/" in body else f"**/{body}"
    return f"{sign}{body}{'/*' if body.endswith('/**') else ''}{_END}"


def _is_supported(pattern: str) -> bool:
    """Return whether pathspec reads a pattern as git does: not ``[:alpha:]``, ``\\/``, or a slash in brackets."""
    if "[:" in pattern:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the module re warns of a set that it may read differently one day
        try:
            return all(compiled.include is not None for compiled in _spec([pattern]).patterns)
        except (ValueError, re.error, Warning):
            return False


def _spec(patterns: list[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(patterns, backend="simple")  # the same on every machine
