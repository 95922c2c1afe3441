"""The manifest of a checkpoint: which files it has, in which parts, and which object holds each part.

Of each part it tells the size and the SHA-256. What the store gives back is not trusted: it is parsed strictly, and
never unpickled. This module reads and writes no store, and does not know what the files mean.
"""

import hashlib
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cluster.run.checkpoint_names import is_file_name, step_of

_SCHEMA = 2
_MAX_MANIFEST_BYTES = 1 << 26
_MAX_PART_BYTES = 1 << 32

_SHA256 = re.compile(r"[0-9a-f]{64}")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)", re.ASCII)

PartKey = tuple[str, int]
"""A part of a checkpoint: its file, and its number there, from 0."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file, as it was when it was written."""

    object: str
    """The name of the object that holds it, below the folder of checkpoints."""
    size: int
    """Bytes."""
    sha256: str
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
        _refuse(f"has {len(data)} bytes, more than any manifest")
    try:
        fields = json.loads(data.decode(), object_pairs_hook=_unique)
    except DefectError:
        raise
    except (ValueError, RecursionError) as error:
        raise DefectError("is not JSON: it is torn or was overwritten") from error
    if not isinstance(fields, dict) or type(fields.get("schema")) is not int:
        _refuse("has no schema version")
    if fields["schema"] != _SCHEMA:
        _refuse(f"has schema {fields['schema']}, this version reads {_SCHEMA}")
    _check_keys(fields, {"schema", "step", "created", "state_sha256", "files", "metrics", "versions"}, "it")
    if type(fields["step"]) is not int or fields["step"] != step:
        _refuse(f"says step {_short(fields['step'])}")
    if not _matches(_UTC, fields["created"]):
        _refuse(f"has created {_short(fields['created'])}, not a time in UTC")
    if not _matches(_SHA256, fields["state_sha256"]):
        _refuse(f"has state_sha256 {_short(fields['state_sha256'])}, not a SHA-256")
    files = _mapping(fields, "files")
    if not files:
        _refuse("names no file")
    entries = {name: _parse_entry(name, parts, step) for name, parts in files.items()}
    objects = [part.object for entry in entries.values() for part in entry.parts]
    if len(set(objects)) != len(objects):
        _refuse("names an object twice")
    metrics, versions = _mapping(fields, "metrics"), _mapping(fields, "versions")
    for name, value in metrics.items():
        if type(value) not in (int, float):
            _refuse(f"has metrics {_short(name)}: {_short(value)}, not a number")
    for name, value in versions.items():
        if not isinstance(value, str):
            _refuse(f"has versions {_short(name)}: {_short(value)}, not a text")
    return Manifest(
        step=step,
        files=entries,
        state_sha256=fields["state_sha256"],
        metrics=metrics,
        versions=versions,
        created=fields["created"],
    )


def _parse_entry(name: str, parts: Any, step: int) -> FileEntry:
    if not is_file_name(name):
        _refuse(f"names the file {_short(name)}, not a plain name")
    if not isinstance(parts, list) or not parts:
        _refuse(f"has {_short(parts)} for {name}, not its parts")
    return FileEntry(tuple(_parse_part(name, part, step) for part in parts))


def _parse_part(file: str, part: Any, step: int) -> Part:
    if not isinstance(part, dict):
        _refuse(f"has {_short(part)} for a part of {file}, not object, size and sha256")
    _check_keys(part, {"object", "size", "sha256"}, file)
    if not _is_object_name(part["object"], step):
        _refuse(f"says that {file} is in {_short(part['object'])}, not an object of a step up to its own")
    if type(part["size"]) is not int or not 0 <= part["size"] <= _MAX_PART_BYTES:
        _refuse(f"gives a part of {file} the size {_short(part['size'])}")
    if not _matches(_SHA256, part["sha256"]):
        _refuse(f"gives a part of {file} the sha256 {_short(part['sha256'])}, not a SHA-256")
    return Part(part["object"], part["size"], part["sha256"])


def _is_object_name(name: object, step: int) -> bool:
    """Whether a manifest may name it: a plain name in the folder of its own step or of an earlier one."""
    own = step_of(name) if isinstance(name, str) else None
    return own is not None and own <= step and is_file_name(str(name).partition("/")[2])


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _mapping(fields: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(fields[key], dict):
        _refuse(f"has {key} {_short(fields[key])}, not a mapping")
    return fields[key]


def _check_keys(fields: dict[str, Any], expected: set[str], where: str) -> None:
    if missing := expected - fields.keys():
        _refuse(f"lacks {', '.join(sorted(missing))} of {where}")
    if unknown := fields.keys() - expected:
        _refuse(f"has unknown keys {_short(sorted(unknown))} in {where}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        _refuse("has a key twice")
    return fields


def _short(value: object) -> str:
    """The value on one line; a hostile one may be long or hold line ends."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _refuse(defect: str) -> NoReturn:
    raise DefectError(defect)
