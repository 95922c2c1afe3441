"""A file system that crashes its user, or lies to it, at a chosen call: the outermost border, below all of our code.

It stands before any file system of fsspec. A ``Store`` made within ``crashing`` talks through it, and so does whoever
is given one. A process that is killed makes no more calls, whatever its handlers try.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import fsspec

from cluster.storage import file_systems

Kind = Literal["before", "after", "torn", "vanish"]
"""Killed before the call, or after it; or in the middle of it: half of an object is there. Or what the call did does
not last, though it reports success: the object written is not there, or is the old one; the one deleted is. A read that
is torn returns half of the object; one that vanishes is of an object that has gone since it was listed. Who is lied to
lives on."""

KINDS: dict[str, tuple[Kind, ...]] = {
    "write": ("before", "after", "torn", "vanish"),
    "read": ("before", "after", "torn", "vanish"),
    "replace": ("before", "after", "vanish"),
    "delete": ("before", "after", "vanish"),
    "delete tree": ("before", "after", "torn", "vanish"),
    "make folder": ("before", "after"),
    "remove folder": ("before", "after"),
    "list": ("before", "after"),
    "look": ("before", "after"),
}
"""What can happen to a call. The delete or the renaming of one object is whole, or did not happen."""

_PLAIN = {
    "makedirs": "make folder", "mkdir": "make folder", "rmdir": "remove folder",
    "find": "list", "ls": "list", "listdir": "list",
    "info": "look", "isdir": "look", "isfile": "look", "exists": "look",
}  # fmt: skip
_CHANGES = ("write", "replace", "delete", "delete tree", "make folder", "remove folder")


class Killed(BaseException):
    """The process is gone: no handler of ours may run on, so it is no ``Exception``."""


@dataclass
class Call:
    """A call of a file system, as it was made."""

    verb: str
    path: str
    has_worked: bool = False
    """Whether it has done what it was to do."""

    @property
    def has_changed(self) -> bool:
        """Whether the store holds something else than before."""
        return self.has_worked and self.verb in _CHANGES


@dataclass
class Faults:
    """What happens to the call of one number, from 0; to the others, nothing."""

    at: int | None = None
    kind: Kind = "before"
    folder: str = ""
    """The last part of the path below which everything happens."""
    content: dict[str, bytes] = field(default_factory=dict)
    """What the store holds there, by name."""
    calls: list[Call] = field(default_factory=list)
    fired: int = 0
    is_dead: bool = False

    @property
    def num_changes(self) -> int:
        """How many calls have changed the store."""
        return sum(call.has_changed for call in self.calls)

    def name(self, path: str) -> str:
        """The name of an object, by its path."""
        return path.partition(f"{self.folder}/")[2]

    def die(self) -> None:
        self.is_dead = True
        raise Killed

    @contextlib.contextmanager
    def call(self, verb: str, path: str) -> Iterator[tuple[Call, Kind | None]]:
        """Around a call; gives what it is to do about itself, if anything."""
        if self.is_dead:
            raise Killed
        call = Call(verb, path)
        self.calls.append(call)
        kind = self.kind if self.at == len(self.calls) - 1 else None
        self.fired += kind is not None
        if kind == "before":
            self.die()
        try:
            yield call, kind
        finally:
            if kind == "after":  # also of a call that failed
                self.die()


class CrashingFileSystem:
    """A file system of fsspec, and what happens to its calls."""

    def __init__(self, fs: fsspec.AbstractFileSystem, faults: Faults) -> None:
        self.__dict__.update(_fs=fs, _faults=faults)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._fs, name, value)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if name not in _PLAIN:
            return found

        def plain(path: str, *args: Any, **options: Any) -> Any:
            with self._faults.call(_PLAIN[name], path) as (call, _):
                result = found(path, *args, **options)
                call.has_worked = True
                return result

        return plain

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        with self._faults.call("write", path) as (call, kind):
            data = bytes(value)
            if kind == "torn":
                self._put(path, data[: len(data) // 2])
                self._faults.die()
            old = self._faults.content.get(self._faults.name(path))
            self._put(path, data, **options)
            call.has_worked = True
            if kind == "vanish":
                self._put_back(path, old)

    def replace(self, path: str, new_path: str) -> None:
        with self._faults.call("replace", new_path) as (call, kind):
            content = self._faults.content
            old = content.get(self._faults.name(new_path))
            self._fs.replace(path, new_path)
            content[self._faults.name(new_path)] = content.pop(self._faults.name(path))
            call.has_worked = True
            if kind == "vanish":
                self._put_back(new_path, old)

    def cat_file(self, path: str, **options: Any) -> bytes:
        with self._faults.call("read", path) as (call, kind):
            if kind == "vanish":
                self._remove(path)
            data = self._fs.cat_file(path, **options)
            call.has_worked = True
            return data[: len(data) // 2] if kind == "torn" else data

    def rm_file(self, path: str) -> None:
        with self._faults.call("delete", path) as (call, kind):
            if kind != "vanish":
                self._remove(path)
            call.has_worked = True

    def rm(self, path: str, recursive: bool = False) -> None:
        with self._faults.call("delete tree", path) as (call, kind):
            names = self._fs.find(path)
            if kind == "torn":
                for name in names[: len(names) // 2]:
                    self._remove(name)
                self._faults.die()
            if kind != "vanish":
                self._fs.rm(path, recursive=recursive)
                for name in names:
                    del self._faults.content[self._faults.name(name)]
            call.has_worked = True

    def open(self, path: str, mode: str = "rb", **_: object) -> io.BytesIO:
        """A file that is read when it is opened, or written when it is closed: in one call."""
        return io.BytesIO(self.cat_file(path)) if "r" in mode else _NewFile(self, path)

    def _put(self, path: str, data: bytes, **options: Any) -> None:
        self._fs.pipe_file(path, data, **options)
        self._faults.content[self._faults.name(path)] = data

    def _put_back(self, path: str, old: bytes | None) -> None:
        if old is None:
            self._remove(path)
        else:
            self._put(path, old)

    def _remove(self, path: str) -> None:
        self._fs.rm_file(path)
        del self._faults.content[self._faults.name(path)]


class _NewFile(io.BytesIO):
    """Its bytes reach the store when it is closed, if its writer lives."""

    def __init__(self, fs: CrashingFileSystem, path: str) -> None:
        super().__init__()
        self._fs = fs
        self._path = path

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            if not self._fs._faults.is_dead:
                self._fs.pipe_file(self._path, data)


class _Class:
    """Stands for a class of file systems; what it makes crashes."""

    def __init__(self, own: type[fsspec.AbstractFileSystem], faults: Faults) -> None:
        self._own = own
        self._faults = faults

    def __call__(self, **options: Any) -> CrashingFileSystem:
        return CrashingFileSystem(self._own(**options), self._faults)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@contextlib.contextmanager
def crashing(faults: Faults) -> Iterator[None]:
    """Every ``Store`` that is made meanwhile has these faults."""
    find: Callable[[str, str], type[fsspec.AbstractFileSystem]] = file_systems.file_system_class
    with mock.patch.object(
        file_systems, "file_system_class", lambda protocol, url: _Class(find(protocol, url), faults)
    ):
        yield
