"""The manifest of a checkpoint: which files it has, in which parts, and which object holds each part.

Of each part it tells the size and the SHA-256. What the store gives back is not trusted: it is parsed strictly, and
never unpickled. This module reads and writes no store, and does not know what the files mean.
"""

import hashlib
import itertools
import json
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import FailFast, Field

from cluster.run.checkpoint_names import is_file_name, step_of
from cluster.storage.typed_json import from_json, short

_SCHEMA = 2
_MAX_MANIFEST_BYTES = 1 << 26
_MAX_PART_BYTES = 1 << 32
_MAX_KEYS = 100_000
"""Of one object; all that are unknown would be listed."""

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Utc = Annotated[
    str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|\+00:00)$")
]

PartKey = tuple[str, int]
"""A part of a checkpoint: its file, and its number there, from 0."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file, as it was when it was written."""

    object: str
    """The name of the object that holds it, below the folder of checkpoints."""
    size: Annotated[int, Field(ge=0, le=_MAX_PART_BYTES)]
    """Bytes."""
    sha256: _Sha256
    """Of the bytes, in lower-case hexadecimal."""

    @classmethod
    def of(cls, name: str, data: bytes | memoryview) -> "Part":
        """The part with these bytes, in the object of this name."""
        return cls(name, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    parts: tuple[Part, ...]
    """In order; there is at least one."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.size for part in self.parts)

    @property
    def sha256(self) -> str:
        """Of the bytes, if there is one part; else of the SHA-256 of all parts, joined."""
        if len(self.parts) == 1:
            return self.parts[0].sha256
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()


def digest_of_files(files: Mapping[str, FileEntry]) -> str:
    """One SHA-256 for some files, by their names and digests."""
    lines = (f"{name}:{files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a whole checkpoint holds."""

    step: int
    """Optimizer steps completed."""
    files: Mapping[str, FileEntry]
    """Every file by its plain name."""
    state_sha256: str
    """Digest of model weights and buffers, optimizer and scheduler state."""
    metrics: Mapping[str, float]
    """The newest metrics at this step."""
    versions: Mapping[str, str]
    """Of the libraries that made it."""
    created: str
    """When it was made: ISO 8601, UTC."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.files.values())

    def part_keys(self) -> list[PartKey]:
        """All parts, file by file."""
        return [(name, number) for name, entry in self.files.items() for number in range(len(entry.parts))]

    def part(self, key: PartKey) -> Part:
        """One part."""
        return self.files[key[0]].parts[key[1]]

    def objects(self) -> set[str]:
        """The names of the objects that hold it."""
        return {part.object for entry in self.files.values() for part in entry.parts}


_Parts = Annotated[tuple[Part, ...], Field(min_length=1), FailFast()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Document:
    """A manifest as it is written. One bad value is enough: a hostile one may have millions."""

    schema: int
    step: int
    created: _Utc
    state_sha256: _Sha256
    files: Annotated[dict[str, _Parts], Field(min_length=1), FailFast()]
    metrics: Annotated[dict[str, float], FailFast()]
    versions: Annotated[dict[str, str], FailFast()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one worker has written of a checkpoint that several write together."""

    step: int
    num_parts: Mapping[str, int]
    """How many parts each file has; all workers say the same."""
    parts: Mapping[PartKey, Part]
    """Those that this worker has written."""
    state_files: Collection[str]
    """The files that ``state_sha256`` is taken of."""
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    created: str


def join(shares: Sequence[Share]) -> Manifest | None:
    """The manifest of a checkpoint, of all shares of it; none while some are missing."""
    first = shares[0]
    parts = {key: part for share in shares for key, part in share.parts.items()}
    if len(parts) < sum(first.num_parts.values()):
        return None
    files = {
        name: FileEntry(tuple(parts[name, number] for number in range(count)))
        for name, count in first.num_parts.items()
    }
    return Manifest(
        step=first.step,
        files=files,
        state_sha256=digest_of_files({name: files[name] for name in first.state_files}),
        metrics=first.metrics,
        versions=first.versions,
        created=max(share.created for share in shares),
    )


def divide(sizes: Sequence[int], count: int) -> list[range]:
    """Contiguous shares, some of which may be empty, of things of these sizes: which things each one has.

    The first thing is the first one's.
    """
    starts = [0, *itertools.accumulate(sizes)]
    owners = [start * count // max(1, starts[-1]) for start in starts[:-1]]
    return [range(bisect_left(owners, owner), bisect_right(owners, owner)) for owner in range(count)]


def to_json(manifest: Manifest) -> bytes:
    """The bytes of a manifest."""
    files = {
        name: [{"object": part.object, "size": part.size, "sha256": part.sha256} for part in entry.parts]
        for name, entry in sorted(manifest.files.items())
    }
    fields = {
        "schema": _SCHEMA,
        "step": manifest.step,
        "created": manifest.created,
        "state_sha256": manifest.state_sha256,
        "files": files,
        "metrics": dict(manifest.metrics),
        "versions": dict(manifest.versions),
    }
    return (json.dumps(fields, indent=1) + "\n").encode()


class DefectError(ValueError):
    """What is wrong with a manifest, as a predicate: ``is not JSON``."""


def parse(data: bytes, step: int) -> Manifest:
    """The manifest of a step in these bytes, which may be anything at all.

    Raises:
        DefectError: They are not what ``to_json`` could have written of it.
    """
    if len(data) > _MAX_MANIFEST_BYTES:
        raise DefectError(f"has {len(data)} bytes, more than any manifest")
    _check_schema(data)
    try:
        found = from_json(_Document, data)
    except ValueError as error:
        raise DefectError(f"is wrong at {error}") from error
    if found.step != step:
        raise DefectError(f"says step {found.step}")
    for name, parts in found.files.items():
        if not is_file_name(name):
            raise DefectError(f"names the file {short(name)}, not a plain name")
        for part in parts:
            if not _is_object_name(part.object, step):
                raise DefectError(f"says that {name} is in {short(part.object)}, not an object of a step up to its own")
    objects = [part.object for parts in found.files.values() for part in parts]
    if len(set(objects)) != len(objects):
        raise DefectError("names an object twice")
    return Manifest(
        step=step,
        files={name: FileEntry(parts) for name, parts in found.files.items()},
        state_sha256=found.state_sha256,
        metrics=found.metrics,
        versions=found.versions,
        created=found.created,
    )


def _check_schema(data: bytes) -> None:
    try:
        fields = json.loads(data.decode(), object_pairs_hook=_unique)
    except DefectError:
        raise
    except (ValueError, RecursionError) as error:
        raise DefectError("is not JSON: it is torn or was overwritten") from error
    if not isinstance(fields, dict) or type(fields.get("schema")) is not int:
        raise DefectError("has no schema version")
    if fields["schema"] != _SCHEMA:
        raise DefectError(f"has schema {fields['schema']}, this version reads {_SCHEMA}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise DefectError(f"has {len(pairs)} keys in one object, more than any manifest")
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise DefectError("has a key twice")
    return fields


def _is_object_name(name: str, step: int) -> bool:
    """Whether a manifest may name it: a plain name in the folder of its own step or of an earlier one."""
    own = step_of(name)
    return own is not None and own <= step and is_file_name(name.partition("/")[2])
