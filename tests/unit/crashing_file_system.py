"""A file system in memory that fails when told to: the outermost border, below all of our own code.

``crash://`` URLs lead here. ``faults`` decides, call by call: nothing, a refused call, one that fails its caller and is
made later, or a process that is killed before, in the middle of, or after the call.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
    """The process is gone: no handler of ours may run on, so it is no ``Exception``."""


@dataclass
class Faults:
    """What fails: the call of this number (from 0) among those that change something, or every look of one kind."""

    at: int | None = None
    kind: Literal["before", "torn", "after", "refused", "late"] = "before"
    lands_at: int | None = None
    """The number of the call before which one that is late is made; none: it waits for ``land``."""
    deny: Literal["nothing", "list", "read"] = "nothing"
    calls: list[str] = field(default_factory=list)
    """The changes asked for so far, such as ``write /run/a``."""
    fired: int = 0
    late: list[Callable[[], None]] = field(default_factory=list)
    """The call that is late, until it is made."""

    def land(self) -> None:
        """Makes the call that is late, if there is one."""
        while self.late:
            with contextlib.suppress(FileNotFoundError):  # a delete of what has gone meanwhile
                self.late.pop()()


class CrashingFileSystem(MemoryFileSystem):
    protocol = "crash"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    faults: ClassVar[Faults] = Faults()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("crash://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        def change(share: float) -> None:
            MemoryFileSystem.pipe_file(self, path, value[: int(len(value) * share)], **kwargs)

        self._change("write", path, change)

    def rm_file(self, path):
        # A delete is whole or not at all, so a torn one is one that happened.
        self._change("delete", path, lambda share: MemoryFileSystem.rm_file(self, path))  # noqa: ARG005

    def cat_file(self, path, **kwargs):
        self._look("read")
        return super().cat_file(path, **kwargs)

    def find(self, path, **kwargs):
        self._look("list")
        return super().find(path, **kwargs)

    def _look(self, verb: str) -> None:
        if self.faults.deny == verb:
            self.faults.fired += 1
            raise ConnectionError("the network is down")

    def _change(self, verb, path, change) -> None:
        faults = self.faults
        faults.calls.append(f"{verb} {path}")
        if faults.lands_at == len(faults.calls) - 1:
            faults.land()
        if faults.at != len(faults.calls) - 1:
            change(1)
            return
        faults.fired += 1
        if faults.kind == "late":
            faults.late.append(lambda: change(1))
        if faults.kind in ("refused", "late"):
            raise ConnectionError("the network is down")
        if faults.kind != "before":
            with contextlib.suppress(FileNotFoundError):  # a delete of what is not there: killed all the same
                change(0.6 if faults.kind == "torn" else 1)
        raise Killed


fsspec.register_implementation("crash", CrashingFileSystem)


def fresh_faults() -> Faults:
    """An empty store, and faults that do nothing yet."""
    CrashingFileSystem.store.clear()
    CrashingFileSystem.faults = Faults()
    return CrashingFileSystem.faults


def copy_of_store() -> dict[str, bytes]:
    """Everything in the store, to put back with ``restore``."""
    return {path: file.getvalue() for path, file in CrashingFileSystem.store.items()}


def restore(content: dict[str, bytes]) -> Faults:
    """Exactly this in the store, and faults that do nothing yet."""
    faults = fresh_faults()
    fs = fsspec.filesystem("crash")
    for path, data in content.items():
        MemoryFileSystem.pipe_file(fs, path, data)
    return faults
