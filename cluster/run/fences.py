"""The fences that keep a superseded driver's late checkpoint from counting.

A driver that was taken over from may still commit: it checks its claim, is paused, and its manifest arrives long after
another driver has gone on from an earlier step. So a manifest is named after the claim of its writer, and a driver that
takes over first writes a fence, an empty object such as ``fences/00000003-9be05d17-after-00000020``: no manifest of an
earlier claim counts beyond step 20, whenever it arrives. A manifest counts if the fences of all later claims admit it.
If a step has several that count, the latest claim's is used.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cluster.errors import StorageError
from cluster.run.checkpoint_names import manifests_among
from cluster.storage.store import Store

_FOLDER = "fences"
_NAME = re.compile(rf"{_FOLDER}/([0-9]{{8}}-[0-9a-f]{{8}})-after-([0-9]{{8,18}})")
"""Empty, and all in its name: a name cannot be torn."""


class Fence(NamedTuple):
    """Rules out the manifests of all earlier claims beyond a step."""

    token: str
    step: int

    @property
    def object(self) -> str:
        return f"{_FOLDER}/{self.token}-after-{self.step:08d}"

    def admits(self, token: str, step: int) -> bool:
        """Whether the manifest of a claim at a step may count."""
        return token >= self.token or step <= self.step

    def covers(self, other: "Fence") -> bool:
        """Whether it rules out everything that another fence rules out."""
        return self.token >= other.token and self.step <= other.step


class Fences:
    """Those in a store of checkpoints."""

    def __init__(self, store: Store, token: str | None) -> None:
        """``token``: that of the driver which puts them up, if there is one."""
        self._store = store
        self._token = token
        self._own_step: int | None = None

    def put(self, step: int) -> None:
        """Rules out the manifests of earlier claims beyond a step for good, also those that arrive later.

        Raises:
            StorageError: The fence could not be written, or did not stay.
        """
        assert self._token is not None, "only a driver that has claimed the run decides where it goes on"
        if self._own_step is not None and self._own_step <= step:
            return
        fence, fences = Fence(self._token, step), self._read()
        self._store.write(fence.object, b"")
        if fence not in self._read():  # the rows beyond it are cut off next
            raise StorageError(f"{self._store.url}/{fence.object}: is not there after it was written; check the store")
        self._own_step = step
        # Not those that the new one covers: a listing under way could miss both it and them. The next driver does that.
        self._store.delete(old.object for old in fences if any(new != old and new.covers(old) for new in fences))

    def admitted(self, own_of: Mapping[int, list[str]]) -> dict[int, str]:
        """The manifest that counts of every step that has one, ascending; ``own_of``: the object names of each.

        The fences are listed after those names. A late manifest comes after the fence that rules it out: if the first
        listing has the manifest, the second has the fence. In the other order both could be written in between, and
        the manifest would count.
        """
        fences = self._read()
        found = {
            step: [name for token, name in manifests_among(own) if all(fence.admits(token, step) for fence in fences)]
            for step, own in sorted(own_of.items())
        }
        return {step: counting[-1] for step, counting in found.items() if counting}

    def _read(self) -> list[Fence]:
        return fences_among(self._store.names(_FOLDER))


def fences_among(names: Iterable[str]) -> list[Fence]:
    """The fences among the objects of a store of checkpoints."""
    return [Fence(match[1], int(match[2])) for match in map(_NAME.fullmatch, names) if match]
