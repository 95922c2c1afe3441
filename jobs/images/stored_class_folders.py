"""Class folders on a store and the images in them: a folder is what the names of its objects begin with.

The rules are those of ``jobs.images.class_folders``, without its links.
"""

from collections.abc import Collection, Iterator, Sequence

from cluster.storage.file_systems import StoredObject
from cluster.storage.store import Store
from jobs.images.class_folders import NO_IMAGE, OUTSIDE, PassOver, check_name, class_of, is_image, reason_to_pass


class StoredFolders:
    """A store that holds class folders; names are relative to it.

    Args:
        store: The store.
        exclude: Names of folders that are not classes.
        pass_over: Told of all that is no sample.

    Attributes:
        is_empty: Whether nothing lies there.

    Raises:
        StorageError: The store does not answer, or the bucket does not exist.
    """

    def __init__(self, store: Store, exclude: Collection[str], pass_over: PassOver) -> None:
        self._store, self._exclude, self._pass_over = store, exclude, pass_over
        self._top = store.listing()
        self.is_empty = self._top == ([], [])

    def has(self, name: str) -> bool:
        """Returns whether a folder lies directly in the root."""
        return name in self._top[0]

    def class_names(self, home: str) -> list[str]:
        """Returns the names of the class folders in a home folder, which is ``""`` or ends in ``/``, sorted.

        Left out are excluded, hidden and systems' own folders.

        Raises:
            StorageError: The store does not answer.
        """
        folders, objects = self._store.listing(home.rstrip("/")) if home else self._top
        for each in objects:
            self._pass_over(reason_to_pass(each.name) or OUTSIDE, f"{home}{each.name}")
        return self._kept(home, folders, self._exclude)

    def images(self, home: str, classes: Sequence[str]) -> Iterator[tuple[str, list[StoredObject]]]:
        """Yields each class, in the order of names, and the images below its folder, in the order of theirs.

        Lists as many folders at once as the store takes, and holds the images of as many classes in memory.

        Raises:
            ValueError: A name could not be read again.
            StorageError: The store does not answer.
        """
        ordered, at_once = sorted(classes), self._store.max_requests
        for begin in range(0, len(ordered), at_once):
            found: dict[str, list[StoredObject]] = {name: [] for name in ordered[begin : begin + at_once]}
            level = list(found)
            while level:
                below: list[str] = []
                listings = self._store.listings([f"{home}{within}" for within in level])
                for within, (folders, objects) in zip(level, listings):
                    below += [f"{within}/{name}" for name in self._kept(f"{home}{within}/", folders)]
                    found[class_of(within)] += self._images(f"{home}{within}/", objects)
                level = below
            for name in list(found):
                yield name, sorted(found.pop(name), key=lambda image: image.name)

    def _kept(self, prefix: str, folders: Sequence[str], exclude: Collection[str] = ()) -> list[str]:
        """Returns the folders that may hold images."""
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
