"""Class folders on this machine and the images in them, without what systems and tools leave there.

Links are followed; each real folder counts once. ``jobs.images.folders.stored_class_folders`` does the same on other
stores.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

from cluster.storage.stored_objects import StoredObject
from jobs.images.indexing.listing_progress import ListingProgress

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The suffixes of image files, in upper or lower case; other files are passed over."""

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

NO_IMAGE = "no image file"
OUTSIDE = "outside the class folders"
FOLDERS = "folders"
"""What the progress of a listing expects."""
_LISTED = "a link to a folder that counts elsewhere"

PassOver = Callable[[str, str], None]
"""Notes a reason, and the name of what is no sample for it."""

_Kind = Literal["folder", "file", "nothing"]


def reason_to_pass(name: str, exclude: Collection[str] = ()) -> str | None:
    """Returns why a file or folder of this name is no data; None: it may be."""
    if name.startswith("."):
        return "hidden"
    if name in _OF_SYSTEMS:
        return "left by a system or tool"
    return "excluded" if name in exclude else None


def is_image(name: str) -> bool:
    """Returns whether a file has the suffix of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def check_name(url: str, name: str) -> None:
    """Raises a ValueError if a store could not read an object of this name, or an error would not be one line."""
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise ValueError(f"{url} must hold names without control characters, got {name!r}; rename it")


class LocalFolders:
    """A folder of this machine that holds class folders; names are relative to it, with forward slashes.

    Args:
        root: The folder.
        exclude: Names of folders that are not classes.
        pass_over: Told of all that is no sample.
        progress: Told of the images listed, and of folders: of those that are listed, and of those in class folders.
    """

    def __init__(self, root: Path, exclude: Collection[str], pass_over: PassOver, progress: ListingProgress) -> None:
        self._root, self._exclude, self._pass_over, self._progress = root, exclude, pass_over, progress

    def has(self, name: str) -> bool:
        """Returns whether a folder lies directly in the root."""
        return (self._root / name).is_dir()

    def class_names(self, home: str) -> list[str]:
        """Returns the names of the class folders in a home folder, which is ``""`` or ends in ``/``, sorted.

        Left out are excluded, hidden and systems' own folders, and links that lead back to the folder or one around it.

        Raises:
            ValueError: The folder cannot be read, or holds a link that leads nowhere.
        """
        folder, names = self._root / home, []
        for name, kind, entry in _entries(folder, home, self._pass_over, self._exclude):
            if kind != "folder":
                self._pass_over(OUTSIDE, f"{home}{name}")
            elif entry.is_symlink() and _leads_back(folder / name, folder):
                self._pass_over(_LISTED, f"{home}{name}")
            else:
                names.append(name)
        return names

    def images(self, home: str, classes: Sequence[str]) -> Iterator[tuple[str, list[StoredObject]]]:
        """Yields each class, in the order of names, and the images below its folder, in no order.

        Links are followed, except those that lead back to a folder around them. A real folder that several paths lead
        to counts at its own place; if that is not below ``home``, at the first link to it. So a class is complete once
        it is read, unless it or one before it holds a link to a folder.

        Raises:
            ValueError: Two classes have the same folder; or a folder cannot be read, or holds a link that leads nowhere
                or a name that no store could read.
        """
        scan, waiting = _Scan(self._root, home, self._pass_over, self._progress), list[str]()
        for name in sorted(classes):
            scan.add(name, is_link=(self._root / home / name).is_symlink())
            scan.read_folders()
            waiting.append(name)
            if not scan.links:
                yield name, scan.take(waiting.pop())
        scan.read_links()  # last, so that a folder counts at its own place
        for name in waiting:
            yield name, scan.take(name)


class _Scan:
    """Reads the folders below the class folders in a home folder.

    Attributes:
        links: Links to folders that are not read yet, relative to the home folder.
    """

    def __init__(self, root: Path, home: str, pass_over: PassOver, progress: ListingProgress) -> None:
        self.links: deque[str] = deque()
        self._folders: deque[str] = deque()
        self._home, self._prefix, self._pass_over, self._progress = root / home, home, pass_over, progress
        self._found: dict[str, list[StoredObject]] = {}
        self._counted: dict[str, str] = {}

    def add(self, path: str, *, is_link: bool) -> None:
        """Adds a folder that is to be read."""
        (self.links if is_link else self._folders).append(path)

    def take(self, class_name: str) -> list[StoredObject]:
        """Returns the images of a class, and forgets them."""
        return self._found.pop(class_name, [])

    def read_folders(self) -> None:
        """Reads the folders that were added, and those in them, but no links."""
        while self._folders:
            self._read(self._folders.popleft())

    def read_links(self) -> None:
        """Reads the folders that the links lead to, and those in them; a link that lies less deep comes first."""
        self.links = deque(sorted(self.links, key=lambda path: path.count("/")))
        while self.links:
            self._read(self.links.popleft())
            self.read_folders()

    def _read(self, within: str) -> None:
        """Reads a folder, and adds the folders and links in it."""
        self._progress.listed(0, 1)
        real = os.path.realpath(self._home / within)
        if real in self._counted:
            _check_same_class(self._home, self._counted[real], within, real)
            self._pass_over(_LISTED, f"{self._prefix}{within}")
            return
        self._counted[real] = within
        images = self._found.setdefault(class_of(within), [])
        for name, kind, entry in _entries(self._home / within, f"{self._prefix}{within}/", self._pass_over):
            path = f"{within}/{name}"
            if kind == "folder" and entry.is_symlink() and _leads_back(self._home / path, self._home):
                self._pass_over(_LISTED, f"{self._prefix}{path}")
            elif kind == "folder":
                self._progress.expect(1, FOLDERS)
                self.add(path, is_link=entry.is_symlink())
            elif kind == "file" and is_image(name):
                check_name(f"{self._home}", path)
                images.append(StoredObject(f"{self._prefix}{path}", _size(entry), ""))
                self._progress.listed(1)
            else:
                self._pass_over(NO_IMAGE, f"{self._prefix}{path}")


def _entries(
    folder: Path, prefix: str, pass_over: PassOver, exclude: Collection[str] = ()
) -> Iterator[tuple[str, _Kind, "os.DirEntry[str]"]]:
    """Yields the name and kind of everything in a folder that may be data, sorted by name."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read, {error.strerror}; correct that, or exclude its class") from error
    while entries:
        entry = entries.pop()  # which keeps what it knows of the file
        name = entry.name
        reason = reason_to_pass(name, exclude)
        if reason is not None:
            pass_over(reason, f"{prefix}{name}")
            continue
        kind, is_link = _kind(entry), entry.is_symlink()
        if kind == "nothing" and (is_image(name) or (is_link and not os.path.splitext(name)[1])):  # that, or a folder
            what = "is a link that leads nowhere" if is_link else "is no file"
            raise ValueError(f"{folder / name} {what}; repair or remove it")
        yield name, kind, entry


def _size(entry: "os.DirEntry[str]") -> int:
    """Returns the size of a file, or of what a link leads to."""
    try:
        return entry.stat().st_size
    except OSError as error:
        raise ValueError(f"{entry.path} cannot be read, {error.strerror}; restore or remove it") from error


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
    if class_of(first) != class_of(second) and not (is_own_place and "/" in second):
        raise ValueError(
            f"{home / second} and {home / first} are the same folder, in two classes; remove one, or exclude its class"
        )


def class_of(path: str) -> str:
    """Returns the first folder of a path relative to ``home``: the class."""
    return path.partition("/")[0]
