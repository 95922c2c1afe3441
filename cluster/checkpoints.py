"""Checkpoints of a run: each is whole and verified, or it does not exist.

A checkpoint is the folder ``step-00000500`` of files and a ``manifest.json``, written last, that names every file
with its size and SHA-256. A folder without a manifest is no checkpoint; one whose bytes differ from its manifest
is refused by name. What the store gives back is not trusted: it is parsed strictly, hashed, and never unpickled.
This module does not know what the files mean.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from cluster.errors import CheckpointError
from cluster.storage import MissingObject, Store

MANIFEST = "manifest.json"

_SCHEMA = 1
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 50

_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a checkpoint, as it was when it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Of the bytes, in lower-case hexadecimal."""

    @classmethod
    def of(cls, data: bytes) -> "FileEntry":
        """The entry of these bytes."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


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


class Checkpoints:
    """The checkpoints in a store, which is the ``checkpoints`` folder of a run."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write_files(self, step: int, files: Mapping[str, bytes]) -> dict[str, FileEntry]:
        """Writes the files of a checkpoint, which exists only when its manifest is committed.

        An older checkpoint of the same step ceases to exist first, so that its manifest never stands over the
        files of two.

        Returns:
            The entries for the manifest.
        """
        for name in files:
            assert _is_file_name(name), f"{name!r} is no plain file name"
        folder = _folder(step)
        self._store.delete([f"{folder}/{MANIFEST}"])
        for name, data in files.items():
            self._store.write(f"{folder}/{name}", data)
        return {name: FileEntry.of(data) for name, data in files.items()}

    def commit(self, manifest: Manifest) -> None:
        """Makes a checkpoint exist; the last write of all, once everything it stands for is safe in the store."""
        data = _to_json(manifest)
        assert _parse(data, manifest.step) == manifest  # what we write, we accept
        self._store.write(f"{_folder(manifest.step)}/{MANIFEST}", data)

    def url(self, step: int) -> str:
        """Where the checkpoint of a step lies, or would."""
        return f"{self._store.url}/{_folder(step)}"

    def steps(self) -> list[int]:
        """The steps that have a manifest, ascending; whether it is true, ``read`` finds out."""
        return _committed(self._store.names())

    def manifest(self, step: int) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: There is none, or it is not one that ``commit`` could have written.
        """
        try:
            data = self._store.read(f"{_folder(step)}/{MANIFEST}")
        except MissingObject as error:
            raise self._bad(step, f"{MANIFEST} is missing: it was not written to the end") from error
        try:
            return _parse(data, step)
        except _DefectError as defect:
            raise self._bad(step, f"{MANIFEST} {defect}") from defect

    def read(self, step: int) -> tuple[Manifest, dict[str, bytes]]:
        """A checkpoint's manifest and files; each file is read once and held against the manifest.

        Raises:
            CheckpointError: The first file that is not what the manifest says, and how it differs.
        """
        manifest = self.manifest(step)
        return manifest, {name: self._read_file(step, name, entry) for name, entry in manifest.files.items()}

    def newest_good(
        self, on_bad: Callable[[int, CheckpointError], None], at_most: int | None = None
    ) -> tuple[Manifest, dict[str, bytes]] | None:
        """The newest checkpoint that is whole, or none.

        A store that does not answer is an error, not a bad checkpoint: it must not send a run back to step 0.

        Args:
            on_bad: Told of every newer checkpoint that was passed over, and why.
            at_most: Look at no step beyond this one.
        """
        for step in reversed(self.steps()):
            if at_most is None or step <= at_most:
                try:
                    return self.read(step)
                except CheckpointError as error:
                    on_bad(step, error)
        return None

    def retain(self, keep: int, best_step: int | None = None) -> list[int]:
        """Deletes all but the newest checkpoints and the best one, and what half-written ones have left behind.

        A folder without a manifest goes only when a newer checkpoint exists: it may be one that is being written.

        Returns:
            The steps of the checkpoints deleted.
        """
        assert keep >= 1
        names = self._store.names()
        committed = _committed(names)
        if not committed:
            return []
        kept = {*committed[-keep:], best_step}
        older = {step for step in _by_step(names) if step < committed[-1]}
        self._delete(names, older - kept)
        return [step for step in committed if step not in kept]

    def discard_after(self, step: int) -> list[int]:
        """Deletes everything beyond a step, which a run resumed at that step supersedes.

        Without it a bad or superseded checkpoint would count as the newest, and ``retain`` would give up the good
        ones for it.

        Returns:
            The steps of the checkpoints deleted.
        """
        names = self._store.names()
        self._delete(names, {later for later in _by_step(names) if later > step})
        return [later for later in _committed(names) if later > step]

    def _delete(self, names: list[str], steps: set[int]) -> None:
        """Oldest first, and of each the manifest first: from then on it does not exist, whatever is left."""
        folders = _by_step(names)
        for step in sorted(steps):
            self._store.delete(sorted(folders[step], key=lambda name: not name.endswith(f"/{MANIFEST}")))

    def _read_file(self, step: int, name: str, entry: FileEntry) -> bytes:
        try:
            data = self._store.read(f"{_folder(step)}/{name}")
        except MissingObject as error:
            raise self._bad(step, f"{name} is missing") from error
        if len(data) != entry.size:
            raise self._bad(step, f"{name} has {len(data)} bytes, the manifest says {entry.size}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise self._bad(step, f"{name} has other bytes than were written: its SHA-256 differs")
        return data

    def _bad(self, step: int, defect: str) -> CheckpointError:
        return CheckpointError(f"{self.url(step)}: {defect}; restore it, or use an older checkpoint")


def _folder(step: int) -> str:
    assert step >= 0
    return f"step-{step:08d}"


def _by_step(names: list[str]) -> dict[int, list[str]]:
    """The object names of each step's folder; what we would not have named so is not ours to touch."""
    found: dict[int, list[str]] = {}
    for name in names:
        folder = name.partition("/")[0]
        match = _STEP_FOLDER.fullmatch(folder)
        if match and folder == _folder(int(match[1])) and folder != name:
            found.setdefault(int(match[1]), []).append(name)
    return found


def _committed(names: list[str]) -> list[int]:
    return sorted(step for step, own in _by_step(names).items() if f"{_folder(step)}/{MANIFEST}" in own)


def _to_json(manifest: Manifest) -> bytes:
    files = {name: asdict(entry) for name, entry in sorted(manifest.files.items())}
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


class _DefectError(ValueError):
    """What is wrong with a manifest, as a predicate: ``is not JSON``."""


def _parse(data: bytes, step: int) -> Manifest:
    """The manifest in these bytes, which may be anything at all."""
    if len(data) > _MAX_MANIFEST_BYTES:
        _refuse(f"has {len(data)} bytes, more than any manifest")
    try:
        fields = json.loads(data.decode(), object_pairs_hook=_unique)
    except _DefectError:
        raise
    except (ValueError, RecursionError) as error:
        raise _DefectError("is not JSON: it is torn or was overwritten") from error
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
    metrics, versions = _mapping(fields, "metrics"), _mapping(fields, "versions")
    for name, value in metrics.items():
        if type(value) not in (int, float):
            _refuse(f"has metrics {_short(name)}: {_short(value)}, not a number")
    for name, value in versions.items():
        if not isinstance(value, str):
            _refuse(f"has versions {_short(name)}: {_short(value)}, not a text")
    return Manifest(
        step=step,
        files={name: _parse_entry(name, entry) for name, entry in files.items()},
        state_sha256=fields["state_sha256"],
        metrics=metrics,
        versions=versions,
        created=fields["created"],
    )


def _parse_entry(name: str, entry: Any) -> FileEntry:
    if not _is_file_name(name):
        _refuse(f"names the file {_short(name)}, not a plain name")
    if not isinstance(entry, dict):
        _refuse(f"has {_short(entry)} for {name}, not size and sha256")
    _check_keys(entry, {"size", "sha256"}, name)
    if type(entry["size"]) is not int or not 0 <= entry["size"] <= _MAX_FILE_BYTES:
        _refuse(f"gives {name} the size {_short(entry['size'])}")
    if not _matches(_SHA256, entry["sha256"]):
        _refuse(f"gives {name} the sha256 {_short(entry['sha256'])}, not a SHA-256")
    return FileEntry(size=entry["size"], sha256=entry["sha256"])


def _is_file_name(name: str) -> bool:
    return _matches(_FILE_NAME, name) and name != MANIFEST


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
    raise _DefectError(defect)
