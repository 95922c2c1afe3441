"""Checkpoints of a run: each is whole and verified, or it does not exist.

A checkpoint is a manifest in a folder ``step-00000500``, written last, that names every file with its parts, and of
each part the object that holds it, its size and its SHA-256. The objects lie in the same folder, or, where a part has
not changed since, in that of an earlier step. A folder without a manifest is no checkpoint; one whose bytes differ from
its manifest is refused by name. What the store gives back is not trusted: it is parsed strictly, hashed, and never
unpickled. This module does not know what the files mean.

A driver that was taken over from may still commit: it checks its claim, is paused, and its manifest arrives long after
another driver has gone on from an earlier step. So a manifest is named after the claim of its writer,
``manifest-00000002-1f3ac0de.json``, and a driver that takes over first writes a fence, an empty object such as
``fences/00000003-9be05d17-after-00000020``: no manifest of an earlier claim counts beyond step 20, whenever it arrives.
A manifest counts if the fences of all later claims admit it. If a step has several that count, the latest claim's is
used. A manifest that does not count is treated as an object that no checkpoint needs.
"""

import hashlib
import itertools
import json
import re
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple, NoReturn, TypeVar

from cluster.errors import CheckpointError, StorageError
from cluster.storage.store import MissingObject, Store, Trouble

CONCURRENT_REQUESTS = 8
"""How many parts a process reads, writes or deletes at a time: most of a request to a remote store is waiting."""
_DELETED_AT_A_STRETCH = 64
"""Parts of a checkpoint: seconds of work at most, after which somebody may want to know that the store answers."""

_SCHEMA = 2
_MAX_MANIFEST_BYTES = 1 << 26
_MAX_PART_BYTES = 1 << 32

_MANIFEST = re.compile(r"manifest(?:-([0-9]{8}-[0-9a-f]{8}))?\.json")
"""With the claim of its writer, or without if it has none."""
_FENCES = "fences"
_FENCE = re.compile(rf"{_FENCES}/([0-9]{{8}}-[0-9a-f]{{8}})-after-([0-9]{{8,18}})")
"""Empty, and all in its name: a name cannot be torn."""
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WRITTEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{8}-[0-9]{5,}(\.[A-Za-z0-9_-]+)?")
"""The names that ``write_part`` gives, within a folder."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)", re.ASCII)


T = TypeVar("T")
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


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies in a store of checkpoints, as its names and the manifests tell it; no other object was read."""

    manifests: Mapping[int, Manifest]
    """By step, ascending: of the checkpoints that may be good. All their objects are there."""
    defects: Mapping[int, CheckpointError]
    """By step, ascending: what is wrong with the others."""
    orphans: tuple[str, ...]
    """Objects that no checkpoint needs: saves that were killed have left them, or are writing them now."""


class _Fence(NamedTuple):
    """Rules out the manifests of all earlier claims beyond a step."""

    claim: str
    step: int

    @property
    def object(self) -> str:
        return f"{_FENCES}/{self.claim}-after-{self.step:08d}"

    def admits(self, claim: str, step: int) -> bool:
        """Whether the manifest of a claim at a step may count."""
        return claim >= self.claim or step <= self.step

    def covers(self, other: "_Fence") -> bool:
        """Whether it rules out everything that another fence rules out."""
        return self.claim >= other.claim and self.step <= other.step


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


class Checkpoints:
    """The checkpoints in a store, which is the ``checkpoints`` folder of a run."""

    def __init__(self, store: Store, claim: str | None = None) -> None:
        """``claim``: that of the driver which commits here, if there is one; a later one's is greater."""
        self._store = store
        self._claim = claim
        self._fenced: int | None = None
        self._token = uuid.uuid4().hex[:8]
        self._manifest_name = f"manifest-{claim}.json" if claim else "manifest.json"
        self._manifests: dict[str, Manifest] = {}  # by object, as committed or read here, for retention

    def write_part(self, step: int, key: PartKey, data: bytes | memoryview, before: Part | None = None) -> Part:
        """Writes a part of a file under a name that nobody else gives.

        Args:
            step: Of the checkpoint that it is written for.
            key: Which part of which file.
            data: Its bytes.
            before: The same part in the checkpoint before this one; if its bytes are these, nothing is written.

        Returns:
            The part written, or ``before``.
        """
        file, number = key
        assert _is_file_name(file), f"{file!r} is no plain file name"
        path = PurePosixPath(file)
        part = Part.of(f"{_folder(step)}/{path.stem}-{self._token}-{number:05d}{path.suffix}", data)
        if before is not None and (before.size, before.sha256) == (part.size, part.sha256):
            return before
        self._store.write(part.object, data)
        return part

    def commit(self, manifest: Manifest) -> None:
        """Makes a checkpoint exist; the last write of all, once everything it stands for is safe in the store."""
        data = _to_json(manifest)
        assert _parse(data, manifest.step) == manifest  # what we write, we accept
        name = f"{_folder(manifest.step)}/{self._manifest_name}"
        self._manifests.pop(name, None)
        self._store.write(name, data)
        self._manifests[name] = manifest

    def fence(self, step: int) -> None:
        """Rules out the manifests of earlier claims beyond a step for good, also those that arrive later.

        Driver only: when it takes the run over, when the run goes back to a step, when the workers fall back to one.
        A fence of a driver that has lost the run meanwhile may come late: then steps are trained again.

        Raises:
            StorageError: It could not be written, or did not stay.
        """
        assert self._claim is not None, "only a driver that has claimed the run decides where it goes on"
        if self._fenced is not None and self._fenced <= step:
            return
        fence, fences = _Fence(self._claim, step), self._fences()
        self._store.write(fence.object, b"")
        if fence not in self._fences():  # the rows beyond it are cut off next
            raise StorageError(f"{self._store.url}/{fence.object}: is not there after it was written; check the store")
        self._fenced = step
        # Not those that the new one covers: a listing under way could miss both it and them. The next driver does that.
        self._store.delete(old.object for old in fences if any(new != old and new.covers(old) for new in fences))

    def newest_claim(self) -> str:
        """The latest claim that is in the name of a manifest or a fence here; empty if there is none."""
        names = self._store.names()
        of_manifests = [claim for own in _by_step(names).values() for claim, _ in _manifests(own)]
        return max([*of_manifests, *(fence.claim for fence in _fences_among(names))], default="")

    @property
    def trouble(self) -> Trouble | None:
        """What keeps the store from answering, if something does; for whoever does not want to wait for it."""
        return self._store.trouble

    def url(self, step: int) -> str:
        """Where the checkpoint of a step lies, or would."""
        return f"{self._store.url}/{_folder(step)}"

    def steps(self) -> list[int]:
        """The steps that have a manifest that counts, ascending; whether it is true, ``read`` finds out."""
        return list(self._committed(_by_step(self._store.names())))

    def manifest(self, step: int) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: There is none, or it is not one that ``commit`` could have written.
        """
        name = self._committed(_by_step(self._store.names(_folder(step)))).get(step)
        if name is None:
            raise self._bad(
                step, "its manifest is missing: it was not written to the end, or the run has gone on without it"
            )
        return self._read_manifest(step, name)

    def survey(self) -> Survey:
        """What is there, in time that hardly grows with the number of checkpoints; a live run may go on meanwhile."""
        names = self._store.names()
        there, own_of = set(names), _by_step(names)
        committed = self._committed(own_of)
        with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="survey") as pool:
            looks = pool.map(lambda step: self._look_at(step, committed[step], there), committed)
            found = dict(zip(committed, looks))
        manifests = {step: manifest for step, manifest in found.items() if isinstance(manifest, Manifest)}
        defects = {step: defect for step, defect in found.items() if isinstance(defect, CheckpointError)}
        needed = {name for manifest in manifests.values() for name in manifest.objects()}.union(committed.values())
        orphans = [
            name
            for step, own in own_of.items()
            # Up to a bad checkpoint everything may be of it: it is for whoever mends it.
            if step > max(defects, default=-1)
            for name in own
            if name not in needed and _is_ours(name.partition("/")[2])
        ]
        return Survey(manifests, defects, tuple(orphans))

    def remove_orphans(self, survey: Survey) -> None:
        """Deletes what a survey found to be needed by nobody, and files that killed writers have left unfinished.

        No run may have written here since before the survey.
        """
        for _ in self._delete(survey.orphans):
            pass
        self._store.sweep()

    def verify(self, manifest: Manifest) -> None:
        """Reads a whole checkpoint, and keeps nothing of it.

        Raises:
            CheckpointError: A part that is not what the manifest says, and how it differs.
        """
        self._for_each_part(manifest, lambda _, data: len(data))

    def copy_to(self, target: "Checkpoints", manifest: Manifest) -> None:
        """Copies a checkpoint, verified on the way, to another store; there it needs no folder but its own.

        Raises:
            CheckpointError: A part is not what the manifest says, and how it differs; there is no checkpoint then.
        """
        parts = self._for_each_part(manifest, lambda key, data: target.write_part(manifest.step, key, data))
        files = {
            name: FileEntry(tuple(parts[name, number] for number in range(len(entry.parts))))
            for name, entry in manifest.files.items()
        }
        target.commit(replace(manifest, files=files))

    def exists(self, step: int) -> bool:
        """Whether a step has a manifest that counts."""
        return step in self._committed(_by_step(self._store.names(_folder(step))))

    def read_parts(self, manifest: Manifest, wanted: Sequence[PartKey]) -> list[bytes]:
        """Parts of a checkpoint, several at a time; each is read once and held against the manifest.

        Args:
            manifest: Of the checkpoint.
            wanted: Which.

        Raises:
            CheckpointError: One of them is not what the manifest says, and how it differs.
        """
        parts = self._for_each_part(manifest, lambda _, data: data, wanted)
        return [parts[key] for key in wanted]

    def read(self, step: int, files: Collection[str] | None = None) -> tuple[Manifest, dict[str, bytes]]:
        """A checkpoint's manifest and files, or those of them that are wanted and there.

        Raises:
            CheckpointError: The first part that is not what the manifest says, and how it differs.
        """
        manifest = self.manifest(step)
        return manifest, self.read_files(manifest, files)

    def read_files(self, manifest: Manifest, files: Collection[str] | None = None) -> dict[str, bytes]:
        """The files of a checkpoint, or those of them that are wanted and there.

        Raises:
            CheckpointError: The first part that is not what the manifest says, and how it differs.
        """
        names = [name for name in manifest.files if files is None or name in files]
        wanted = [key for key in manifest.part_keys() if key[0] in names]
        data: dict[str, list[bytes]] = {name: [] for name in names}
        for (name, _), part in zip(wanted, self.read_parts(manifest, wanted)):
            data[name].append(part)
        return {name: b"".join(parts) for name, parts in data.items()}

    def newest_good(
        self, on_bad: Callable[[int, CheckpointError], None], files: Collection[str] | None = None
    ) -> tuple[Manifest, dict[str, bytes]] | None:
        """The newest checkpoint that is whole, or none.

        A store that does not answer is an error, not a bad checkpoint: it must not send a run back to step 0.

        Args:
            on_bad: Told of every newer checkpoint that was passed over, and why.
            files: Read and judge these alone.
        """
        for step, name in reversed(self._committed(_by_step(self._store.names())).items()):
            try:
                manifest = self._read_manifest(step, name)
                return manifest, self.read_files(manifest, files)
            except CheckpointError as error:
                on_bad(step, error)
        return None

    def retain(
        self,
        newest: int,
        keep: int,
        best_step: int | None = None,
        bad: Collection[int] = (),
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[int | None]:
        """Deletes all but the newest checkpoints and the best one, and the objects that no checkpoint needs.

        It may be left off at any point: a checkpoint rests on parts of earlier ones alone, so the latest goes first.

        What lies beyond the newest is neither touched nor counted: it may be of one that is being written, or of a
        writer that has taken over from this one, which does not know it yet.

        Args:
            newest: The step that was committed last.
            keep: How many of the newest are kept.
            best_step: Of one that is kept beside them.
            bad: Steps of checkpoints that are known to be bad: they stay as they are, and do not count.
            check: Called before something of a step is deleted; raises if the run is another driver's by now.

        Yields:
            The step of each checkpoint as soon as it does not exist any more, and None when other objects have gone.
        """
        assert keep >= 1
        own_of = {step: own for step, own in _by_step(self._store.names()).items() if step <= newest}
        committed = self._committed(own_of)
        kept, left_alone = list[Manifest](), set(bad)
        for step, name in reversed(committed.items()):
            if step not in left_alone and (len(kept) < keep or step == best_step):
                try:
                    kept.append(self._manifests.get(name) or self._read_manifest(step, name))
                except CheckpointError:  # it is for somebody to look at, who will hear of it when it is read
                    left_alone.add(step)
        if not kept:
            return
        needed = {name for manifest in kept for name in manifest.objects()}
        needed |= {committed[manifest.step] for manifest in kept}
        for step, own in sorted(own_of.items(), reverse=True):
            unneeded = [name for name in own if name not in needed]
            if step > kept[0].step or step in left_alone or not unneeded:
                continue
            check()
            gone = step if committed.get(step) in unneeded else None
            for _ in self._delete(unneeded):
                yield gone
                gone = None

    def discard_after(self, step: int) -> None:
        """Deletes everything beyond a step, of a run that nobody else writes to."""
        own_of = _by_step(self._store.names())
        for _ in self._delete(name for later, own in own_of.items() if later > step for name in own):
            pass

    def _fences(self) -> list[_Fence]:
        return _fences_among(self._store.names(_FENCES))

    def _committed(self, own_of: Mapping[int, list[str]]) -> dict[int, str]:
        """The manifest that counts of every step that has one, ascending; ``own_of``: the object names of each.

        The fences are listed after those names. A late manifest comes after the fence that rules it out: if the first
        listing has the manifest, the second has the fence. In the other order both could be written in between, and
        the manifest would count.
        """
        fences = self._fences()
        found = {
            step: [name for claim, name in _manifests(own) if all(fence.admits(claim, step) for fence in fences)]
            for step, own in sorted(own_of.items())
        }
        return {step: counting[-1] for step, counting in found.items() if counting}

    def _delete(self, names: Iterable[str]) -> Iterator[None]:
        """Manifests first, the oldest first: from then on their checkpoints do not exist, whatever is left.

        Yields whenever some have gone, the manifests before all else.
        """
        rest = set(names)
        manifests = [name for own in _by_step(sorted(rest)).values() for _, name in _manifests(own)]
        if manifests:
            self._store.delete(manifests)
            yield
        parts = sorted(rest.difference(manifests))
        for begin in range(0, len(parts), _DELETED_AT_A_STRETCH):
            self._store.delete(parts[begin : begin + _DELETED_AT_A_STRETCH], at_once=CONCURRENT_REQUESTS)
            yield

    def _read_manifest(self, step: int, name: str) -> Manifest:
        base = name.rpartition("/")[2]
        try:
            manifest = _parse(self._store.read(name), step)
        except MissingObject as error:
            raise self._bad(step, f"{base} is missing") from error
        except _DefectError as defect:
            raise self._bad(step, f"{base} {defect}") from defect
        self._manifests[name] = manifest
        return manifest

    def _look_at(self, step: int, name: str, there: Collection[str]) -> Manifest | CheckpointError | None:
        """The manifest or the defect of a checkpoint that was listed; none if it has been deleted since."""
        try:
            manifest = self._read_manifest(step, name)
            for part in sorted(manifest.objects().difference(there)):
                if not self._store.exists(part):  # nor was it written since
                    raise self._bad(step, f"{part.removeprefix(f'{_folder(step)}/')} is missing")
        except CheckpointError as defect:
            return defect if self.exists(step) else None
        return manifest

    def _for_each_part(
        self, manifest: Manifest, use: Callable[[PartKey, bytes], T], wanted: Sequence[PartKey] | None = None
    ) -> dict[PartKey, T]:
        """What ``use`` makes of parts, by default of all, several at a time; each is read once, and verified."""
        keys = manifest.part_keys() if wanted is None else wanted
        with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="parts") as pool:
            return dict(zip(keys, pool.map(lambda key: use(key, self._read_part(manifest, key)), keys)))

    def _read_part(self, manifest: Manifest, key: PartKey) -> bytes:
        step, part = manifest.step, manifest.part(key)
        name = part.object.removeprefix(f"{_folder(step)}/")
        try:
            data = self._store.read(part.object)
        except MissingObject as error:
            raise self._bad(step, f"{name} is missing") from error
        if len(data) != part.size:
            raise self._bad(step, f"{name} has {len(data)} bytes, the manifest says {part.size}")
        if hashlib.sha256(data).hexdigest() != part.sha256:
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


def _manifests(names: list[str]) -> list[tuple[str, str]]:
    """The claim and the name of those of one step, ascending; a manifest without a claim is earlier than any."""
    matches = ((_MANIFEST.fullmatch(name.partition("/")[2]), name) for name in names)
    return sorted((match[1] or "", name) for match, name in matches if match)


def _fences_among(names: Iterable[str]) -> list[_Fence]:
    return [_Fence(match[1], int(match[2])) for match in map(_FENCE.fullmatch, names) if match]


def _is_ours(name: str) -> bool:
    """Whether it is a name, within a folder, that is given here."""
    return _WRITTEN.fullmatch(name) is not None or _MANIFEST.fullmatch(name) is not None


def _to_json(manifest: Manifest) -> bytes:
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
    if not _is_file_name(name):
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
    folder, _, base = name.partition("/") if isinstance(name, str) else ("", "", "")
    match = _STEP_FOLDER.fullmatch(folder)
    return match is not None and int(match[1]) <= step and folder == _folder(int(match[1])) and _is_file_name(base)


def _is_file_name(name: str) -> bool:
    return _matches(_FILE_NAME, name) and not _matches(_MANIFEST, name)


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
