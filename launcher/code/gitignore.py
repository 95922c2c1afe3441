"""Which files git ignores, by the .gitignore files around them.

The files alone decide, as they are the same on every machine: not .git/info/exclude, not a list in the user's home, and
not git's index, in which an ignored file may be tracked. ``pathspec`` translates the patterns, each of which is asked
about one entry only, never about what lies above it: a caller that goes from the top down does not enter an ignored
folder, and that is how git does it.
"""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from cluster.errors import DescriptionError

_END = "/\0"
"""Follows each pattern and each path, so that a pattern for a folder does not match what is in the folder."""


@dataclass(frozen=True, slots=True)
class _File:
    """One .gitignore file."""

    folder: str
    """Its folder, with a slash at the end."""
    for_folders: GitIgnoreSpec
    for_others: GitIgnoreSpec
    """Without the patterns that end in a slash; git applies these to no symbolic link."""


@dataclass(frozen=True, slots=True)
class GitIgnore:
    """The .gitignore files that apply in a folder."""

    files: tuple[_File, ...] = ()
    """Outermost first."""

    @classmethod
    def above(cls, folder: Path) -> "GitIgnore":
        """Those of the folders above an absolute one, up to the root of its git checkout; none if it is in no checkout.

        Raises:
            DescriptionError: One cannot be read, or has a pattern that is not supported.
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
        """Those that apply in a folder, which lies directly in the folder that these apply in.

        Raises:
            DescriptionError: Its own cannot be read, or has a pattern that is not supported.
        """
        outer = () if os.path.exists(folder / ".git") else self.files  # another checkout, such as a submodule
        path = folder / ".gitignore"
        if os.path.islink(path) or not os.path.isfile(path):  # git does not follow such a link either
            return GitIgnore(outer)
        return GitIgnore((*outer, _read(path)))

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Whether git ignores an entry of the folder that these apply in; a symbolic link is not a folder."""
        for file in reversed(self.files):
            spec = file.for_folders if is_folder else file.for_others
            include = spec.check_file(str(path).removeprefix(file.folder) + _END).include
            if include is not None:
                return include
        return False


def _read(path: Path) -> _File:
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
    return _File(os.path.join(path.parent, ""), _spec(for_folders), _spec(for_others))


def _trimmed(line: str) -> str:
    """A line without the spaces at its end, save one after an odd number of backslashes."""
    trimmed = line.rstrip(" ")
    is_escaped = (len(trimmed) - len(trimmed.rstrip("\\"))) % 2 == 1
    return trimmed + " " if is_escaped and len(trimmed) < len(line) else trimmed


def _exact(pattern: str) -> str:
    """The pattern that matches the same entries, each followed by ``_END``."""
    sign = "!" if pattern.startswith("!") else ""
    body = pattern.removeprefix(sign).removesuffix("/")
    body = f"/{body.removeprefix('/')}" if "/" in body else f"**/{body}"
    return f"{sign}{body}{'/*' if body.endswith('/**') else ''}{_END}"


def _is_supported(pattern: str) -> bool:
    """Whether pathspec reads a pattern as git does: not with ``[:alpha:]``, a ``\\/``, or a slash within brackets."""
    if "[:" in pattern:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the module re: a set that it may read in another way one day
        try:
            return all(compiled.include is not None for compiled in _spec([pattern]).patterns)
        except (ValueError, re.error, Warning):
            return False


def _spec(patterns: list[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(patterns, backend="simple")  # the same everywhere, whatever else is installed
