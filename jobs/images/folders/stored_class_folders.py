"""Class folders on a store and the images in them: a folder is what the names of its objects begin with.

The rules are those of ``jobs.images.folders.class_folders``, without its links.
"""

from collections.abc import Collection, Iterator, Sequence

from cluster.storage.store import Store
from cluster.storage.stored_objects import StoredObject
from jobs.images.folders.class_folders import (
    FOLDERS,
    NO_IMAGE,
    OUTSIDE,
    PassOver,
    check_name,
    class_of,
    is_image,
    reason_to_pass,
)
from jobs.images.indexing.listing_progress import ListingProgress
from jobs.images.object_urls import check_parts


class StoredFolders:
    """A store that holds class folders; names are relative to it.

    Args:
        store: The store.
        exclude: Names of folders that are not classes.
        pass_over: Told of all that is no sample.
        progress: Told of the images listed, and of folders: of those that are listed, and of those in class folders.

    Attributes:
        is_empty: Whether nothing lies there.

    Raises:
        StorageError: The store does not answer, or the bucket does not exist.
    """

    def __init__(self, store: Store, exclude: Collection[str], pass_over: PassOver, progress: ListingProgress) -> None:
        self._store, self._exclude, self._pass_over, self._progress = store, exclude, pass_over, progress
        self._top = self._list("")
        self.is_empty = self._top == ([], [])

    def has(self, name: str) -> bool:
        """Returns whether a folder lies directly in the root."""
        return name in self._top[0]

    def class_names(self, home: str) -> list[str]:
        """Returns the names of the class folders in a home folder, which is ``""`` or ends in ``/``, sorted.

        Left out are excluded, hidden and systems' own folders.

        Raises:
            ValueError: A name could not be read again.
            StorageError: The store does not answer.
        """
        folders, names = self._list(home.rstrip("/")) if home else self._top
        for name in names:
            self._pass_over(reason_to_pass(name) or OUTSIDE, f"{home}{name}")
        return self._kept(home, folders, self._exclude)

    def images(self, home: str, classes: Sequence[str]) -> Iterator[tuple[str, list[StoredObject]]]:
        """Yields images below class folders with their class, as they are listed: many times, and in no order.

        Lists as many folders at once as the store takes, and holds a page of names of each.

        Raises:
            ValueError: A name could not be read again.
            StorageError: The store does not answer.
        """
        level = [f"{home}{name}" for name in classes]
        while level:
            below: list[str] = []
            for folder, page in self._store.pages(level):
                kept = self._kept(f"{folder}/", page.folders)
                below += [f"{folder}/{name}" for name in kept]
                images = list(self._images(f"{folder}/", page.objects))
                self._progress.expect(len(kept), FOLDERS)
                self._progress.listed(len(images), 1 if page.after is None else 0)
                yield class_of(folder.removeprefix(home)), images
            level = below

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        """Returns the names of what lies directly in a folder: the folders, sorted, and the objects."""
        folders, names = list[str](), list[str]()
        for _, page in self._store.pages([folder]):
            folders += page.folders
            names += [each.name for each in page.objects]
            self._progress.listed(0)
        return sorted(folders), names

    def _kept(self, prefix: str, folders: Sequence[str], exclude: Collection[str] = ()) -> list[str]:
        """Returns the folders that may hold images."""
        check_parts(self._store.url, prefix.rstrip("/"), folders)
        kept = []
        for name in folders:
            reason = reason_to_pass(name, exclude)
            if reason is None:
                check_name(self._store.url, f"{prefix}{name}")
                kept.append(name)
            else:
                self._pass_over(reason, f"{prefix}{name}")
        return kept

    def _images(self, prefix: str, objects: Sequence[StoredObject]) -> Iterator[StoredObject]:
        """Yields the objects of a folder that are images."""
        for each in objects:
            name = f"{prefix}{each.name}"
            reason = reason_to_pass(each.name) or (None if is_image(each.name) else NO_IMAGE)
            if reason is None:
                check_name(self._store.url, name)
                yield StoredObject(name, each.size, each.version)
            else:
                self._pass_over(reason, name)
