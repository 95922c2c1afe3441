"""Fences: they keep a late checkpoint of a superseded driver from counting.

A superseded driver may still commit: it checks its lease, is paused, and its manifest arrives long after another driver
has resumed from an earlier step. So the name of a manifest holds the fencing token of its writer, and a driver that
takes over first writes a fence, an empty object such as ``fences/00000003-9be05d17-after-00000020``: beyond step 20, no
manifest with a smaller token is admitted, whenever it arrives. A manifest is admitted if no fence rules it out. If
several manifests of a step are admitted, the one with the greatest token is used.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cluster.errors import StorageError
from cluster.run.checkpoint_names import manifests_among
from cluster.storage.store import Store

_FOLDER = "fences"
_NAME = re.compile(rf"{_FOLDER}/([0-9]{{8}}-[0-9a-f]{{8}})-after-([0-9]{{8,18}})")
"""A fence is an empty object: all it says is in its name, because a name cannot be torn."""


class Fence(NamedTuple):
    """Rules out, beyond a step, all manifests with a smaller fencing token."""

    token: str
    step: int

    @property
    def object(self) -> str:
        return f"{_FOLDER}/{self.token}-after-{self.step:08d}"

    def admits(self, token: str, step: int) -> bool:
        """Returns whether this fence lets the manifest of a driver at a step count."""
        return token >= self.token or step <= self.step

    def covers(self, other: "Fence") -> bool:
        """Returns whether this fence rules out everything that ``other`` rules out."""
        return self.token >= other.token and self.step <= other.step


class Fences:
    """The fences in a checkpoint store."""

    def __init__(self, store: Store, token: str | None) -> None:
        """``token``: the fencing token of the driver that writes fences here; None for a reader."""
        self._store = store
        self._token = token
        self._own_step: int | None = None

    def put(self, step: int) -> None:
        """Rules out the manifests of earlier drivers beyond a step for good, including those that arrive later.

        Raises:
            StorageError: The fence could not be written, or was gone right after.
        """
        assert self._token is not None, "only the driver that holds the lease writes fences"
        if self._own_step is not None and self._own_step <= step:
            return
        fence, fences = Fence(self._token, step), self._list()
        self._store.write(fence.object, b"")
        if fence not in self._list():  # the driver drops the rows beyond it next
            raise StorageError(f"{self._store.url}/{fence.object}: is not there after it was written; check the store")
        self._own_step = step
        # Fences that the new one covers stay: a concurrent listing could miss both them and it. The next driver deletes
        # them.
        self._store.delete(old.object for old in fences if any(new != old and new.covers(old) for new in fences))

    def admitted(self, names_by_step: Mapping[int, list[str]]) -> dict[int, str]:
        """Returns the admitted manifest of each step that has one, ascending.

        The caller lists ``names_by_step`` first, and the fences are listed here, after it. A late manifest is written
        after the fence that rules it out: if the first listing has the manifest, the second has the fence. In the
        opposite order both could be written between the two listings, and the manifest would count.

        Args:
            names_by_step: The object names in the folder of each step.
        """
        fences = self._list()
        found = {
            step: [name for token, name in manifests_among(own) if all(fence.admits(token, step) for fence in fences)]
            for step, own in sorted(names_by_step.items())
        }
        return {step: names[-1] for step, names in found.items() if names}

    def _list(self) -> list[Fence]:
        return fences_among(self._store.names(_FOLDER))


def fences_among(names: Iterable[str]) -> list[Fence]:
    """Returns the fences among the objects of a checkpoint store."""
    return [Fence(match[1], int(match[2])) for match in map(_NAME.fullmatch, names) if match]
