"""The manifest of a checkpoint: its files, the parts of each file, and the object that holds each part.

A manifest records the size and the SHA-256 of each part. What the store returns is not trusted: it is parsed strictly
and never unpickled. This module neither reads nor writes a store, and does not know what the files mean.
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
_MAX_KEYS = 1_000_000
"""Per JSON object: an error would list every unknown key. A run with many classes has a metric for each."""

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Utc = Annotated[
    str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|\+00:00)$")
]

PartKey = tuple[str, int]
"""(file name, part number from 0): identifies a part of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous range of a file's bytes, stored as one object."""

    object: str
    """Name of the object, relative to the checkpoint store."""
    size: Annotated[int, Field(ge=0, le=_MAX_PART_BYTES)]
    """In bytes."""
    sha256: _Sha256
    """In lower-case hexadecimal."""

    @classmethod
    def of(cls, name: str, data: bytes | memoryview) -> "Part":
        """Returns the part with this content, stored as the object ``name``."""
        return cls(name, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    parts: tuple[Part, ...]
    """In order; at least one."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(part.size for part in self.parts)

    @property
    def sha256(self) -> str:
        """Of the content, if there is one part; else of the joined hexadecimal SHA-256 of all parts."""
        if len(self.parts) == 1:
            return self.parts[0].sha256
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()


def digest_of_files(files: Mapping[str, FileEntry]) -> str:
    """Returns one SHA-256 of the names and digests of files."""
    lines = (f"{name}:{files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of a whole checkpoint."""

    step: int
    """Optimizer steps completed."""
    files: Mapping[str, FileEntry]
    """By plain file name."""
    state_sha256: str
    """Digest of model weights and buffers, optimizer and scheduler state."""
    metrics: Mapping[str, float]
    """The newest metrics at this step."""
    versions: Mapping[str, str]
    """Of the libraries that wrote it."""
    created: str
    """ISO 8601, UTC."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(entry.size for entry in self.files.values())

    def part_keys(self) -> list[PartKey]:
        """Returns the keys of all parts, file by file."""
        return [(name, number) for name, entry in self.files.items() for number in range(len(entry.parts))]

    def part(self, key: PartKey) -> Part:
        """Returns one part."""
        return self.files[key[0]].parts[key[1]]

    def objects(self) -> set[str]:
        """Returns the names of the objects that hold the parts."""
        return {part.object for entry in self.files.values() for part in entry.parts}


_Parts = Annotated[tuple[Part, ...], Field(min_length=1), FailFast()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Document:
    """A manifest as JSON. Parsing stops at the first bad value: a hostile document may have millions."""

    schema: int
    step: int
    created: _Utc
    state_sha256: _Sha256
    files: Annotated[dict[str, _Parts], Field(min_length=1), FailFast()]
    metrics: Annotated[dict[str, float], FailFast()]
    versions: Annotated[dict[str, str], FailFast()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The parts of a checkpoint that one of several workers has written."""

    step: int
    """Optimizer steps completed."""
    num_parts: Mapping[str, int]
    """Number of parts of each file, the same on all workers."""
    parts: Mapping[PartKey, Part]
    """The parts that this worker has written."""
    state_files: Collection[str]
    """The files that ``state_sha256`` covers."""
    metrics: Mapping[str, float]
    """The newest metrics at this step."""
    versions: Mapping[str, str]
    """The libraries that made it, by name."""
    created: str
    """When it was made: ISO 8601, UTC."""


def join(shares: Sequence[Share]) -> Manifest | None:
    """Returns the manifest of a checkpoint from all its shares; None while a share is missing."""
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
    """Splits things of these sizes into ``count`` contiguous shares of similar size; a share may be empty.

    Returns:
        The indices of the things in each share. The first thing is always in the first share.
    """
    starts = [0, *itertools.accumulate(sizes)]
    owners = [start * count // max(1, starts[-1]) for start in starts[:-1]]
    return [range(bisect_left(owners, owner), bisect_right(owners, owner)) for owner in range(count)]


def to_json(manifest: Manifest) -> bytes:
    """Serializes a manifest."""
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
    """Parses the manifest of a step from untrusted bytes.

    Raises:
        DefectError: ``to_json`` could not have written these bytes for this step.
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
    """Returns whether a manifest may name this object: a plain name in the folder of its own or an earlier step."""
    own = step_of(name)
    return own is not None and own <= step and is_file_name(name.partition("/")[2])
