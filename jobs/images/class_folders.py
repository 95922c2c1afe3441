"""Class folders and the images in them, without what systems and tools leave there; each real folder counts once."""

import os
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The suffixes of image files, in upper or lower case; other files are ignored."""

_OF_SYSTEMS = frozenset(
    {
        "__MACOSX",  # macOS's archives
        "@eaDir", "#recycle", "#snapshot",  # Synology
        "@Recycle", "@Recently-Snapshot",  # QNAP
        "$RECYCLE.BIN", "System Volume Information",  # Windows
        "lost+found",  # ext4
        "__pycache__",
    }
)  # fmt: skip
"""Folders of systems and tools that are not hidden, and may hold copies, thumbnails or remains of images."""

_Kind = Literal["folder", "file", "nothing"]


def class_names(folder: Path, exclude: Collection[str]) -> list[str]:
    """Returns the names of the class folders in a folder, sorted.

    Left out are excluded, hidden and systems' own folders, and links that lead back to the folder or one around it.

    Raises:
        ValueError: There is none; or the folder cannot be read, or holds a link that leads nowhere.
    """
    names = [
        name for name, kind, is_link in _entries(folder, exclude)
        if kind == "folder" and not (is_link and _leads_back(folder / name, folder))
    ]  # fmt: skip
    if not names:
        raise ValueError(f"{folder} must hold a folder of images per class, got no folder; name another root")
    return sorted(names)


def image_names(home: Path, classes: Collection[str]) -> dict[str, list[str]]:
    """Returns the images below each class folder as sorted names, relative to ``home``, with forward slashes.

    Links are followed, except those that lead back to a folder around them. A real folder that several paths lead to
    counts at its own place; if that is not below ``home``, at the first link to it.

    Raises:
        ValueError: Two classes have the same folder; or a folder cannot be read, or holds a link that leads nowhere.
    """
    found: dict[str, list[str]] = {name: [] for name in classes}
    counted: dict[str, str] = {}
    folders: deque[str] = deque()
    links: deque[str] = deque()
    for name in sorted(classes):
        (links if (home / name).is_symlink() else folders).append(name)
    while folders or links:
        within = (folders or links).popleft()  # links last, so that a folder counts at its own place
        real = os.path.realpath(home / within)
        if real in counted:
            _check_same_class(home, counted[real], within, real)
            continue
        counted[real] = within
        for name, kind, is_link in _entries(home / within):
            path = f"{within}/{name}"
            if kind == "folder" and not (is_link and _leads_back(home / path, home)):
                (links if is_link else folders).append(path)
            elif kind == "file" and name.lower().endswith(IMAGE_SUFFIXES):
                found[_class_of(within)].append(path)
    return {name: sorted(images) for name, images in found.items()}


def _entries(folder: Path, exclude: Collection[str] = ()) -> Iterator[tuple[str, _Kind, bool]]:
    """Yields the name and kind of everything in a folder that may be data, sorted by name, and whether it is a link."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read, {error.strerror}; correct that, or exclude its class") from error
    for entry in entries:
        name = entry.name
        if name.startswith(".") or name in _OF_SYSTEMS or name in exclude:
            continue
        kind, is_link, suffix = _kind(entry), entry.is_symlink(), os.path.splitext(name)[1].lower()
        if kind == "nothing" and (suffix in IMAGE_SUFFIXES or (is_link and not suffix)):  # an image, or a folder
            what = "is a link that leads nowhere" if is_link else "is no file"
            raise ValueError(f"{folder / name} {what}; repair or remove it")
        yield name, kind, is_link


def _kind(entry: os.DirEntry[str]) -> _Kind:
    """Returns what an entry of a folder is, or what its link leads to."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "nothing"
    except OSError:  # a link to itself, or to where this user may not look
        return "nothing"


def _leads_back(link: Path, home: Path) -> bool:
    """Returns whether a link leads to the folder that it lies in, to ``home``, or to a folder around one of them."""
    real = os.path.realpath(link)
    return any(Path(os.path.realpath(inner)).is_relative_to(real) for inner in (link.parent, home))


def _check_same_class(home: Path, first: str, second: str, real: str) -> None:
    """Raises a ValueError if two paths to one folder give its images two classes."""
    is_own_place = real == os.path.join(os.path.realpath(home), first)
    if _class_of(first) != _class_of(second) and not (is_own_place and "/" in second):
        raise ValueError(
            f"{home / second} and {home / first} are the same folder, in two classes; remove one, or exclude its class"
        )


def _class_of(path: str) -> str:
    """Returns the first folder of a path relative to ``home``: the class."""
    return path.partition("/")[0]
