"""Checkpoints of a run: each is whole and verified, or it does not exist.

A checkpoint is a manifest in a folder ``step-00000500``, written last, that names every file with its parts, and of
each part the object that holds it, its size and its SHA-256. The objects lie in the same folder, or, where a part has
not changed since, in that of an earlier step. A folder without a manifest is no checkpoint; one whose bytes differ from
its manifest is refused by name. What the store gives back is not trusted: it is parsed strictly, hashed, and never
unpickled. This module does not know what the files mean.

Which manifest of a step counts, ``cluster.run.fences`` tells; another one is treated as an object that no checkpoint
needs.
"""

import hashlib
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.errors import CheckpointError
from cluster.run.checkpoint_names import by_step, folder, is_ours, manifest_object, manifests_among, part_object
from cluster.run.fences import Fences, fences_among
from cluster.run.manifest import DefectError, FileEntry, Manifest, Part, PartKey, parse, to_json
from cluster.storage.store import MissingObject, Store, Trouble

CONCURRENT_REQUESTS = 8
"""How many parts a process reads, writes or deletes at a time: most of a request to a remote store is waiting."""
_DELETED_AT_A_STRETCH = 64
"""Parts of a checkpoint: seconds of work at most, after which somebody may want to know that the store answers."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies in a store of checkpoints, as its names and the manifests tell it; no other object was read."""

    manifests: Mapping[int, Manifest]
    """By step, ascending: of the checkpoints that may be good. All their objects are there."""
    defects: Mapping[int, CheckpointError]
    """By step, ascending: what is wrong with the others."""
    orphans: tuple[str, ...]
    """Objects that no checkpoint needs: saves that were killed have left them, or are writing them now."""


class Checkpoints:
    """The checkpoints in a store, which is the ``checkpoints`` folder of a run."""

    def __init__(self, store: Store, claim: str | None = None) -> None:
        """``claim``: that of the driver which commits here, if there is one; a later one's is greater."""
        self._store = store
        self._lease = claim
        self._fences = Fences(store, claim)
        self._token = uuid.uuid4().hex[:8]
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
        part = Part.of(part_object(step, file, self._token, number), data)
        if before is not None and (before.size, before.sha256) == (part.size, part.sha256):
            return before
        self._store.write(part.object, data)
        return part

    def commit(self, manifest: Manifest) -> None:
        """Makes a checkpoint exist; the last write of all, once everything it stands for is safe in the store."""
        data = to_json(manifest)
        assert parse(data, manifest.step) == manifest  # what we write, we accept
        name = manifest_object(manifest.step, self._lease)
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
        self._fences.put(step)

    def newest_token(self) -> str:
        """The latest claim that is in the name of a manifest or a fence here; empty if there is none."""
        names = self._store.names()
        of_manifests = [claim for own in by_step(names).values() for claim, _ in manifests_among(own)]
        return max([*of_manifests, *(fence.token for fence in fences_among(names))], default="")

    @property
    def trouble(self) -> Trouble | None:
        """What keeps the store from answering, if something does; for whoever does not want to wait for it."""
        return self._store.trouble

    def url(self, step: int) -> str:
        """Where the checkpoint of a step lies, or would."""
        return f"{self._store.url}/{folder(step)}"

    def steps(self) -> list[int]:
        """The steps that have a manifest that counts, ascending; whether it is true, ``read`` finds out."""
        return list(self._fences.admitted(by_step(self._store.names())))

    def manifest(self, step: int) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: There is none, or it is not one that ``commit`` could have written.
        """
        name = self._fences.admitted(by_step(self._store.names(folder(step)))).get(step)
        if name is None:
            raise self._bad(
                step, "its manifest is missing: it was not written to the end, or the run has gone on without it"
            )
        return self._read_manifest(step, name)

    def survey(self) -> Survey:
        """What is there, in time that hardly grows with the number of checkpoints; a live run may go on meanwhile."""
        names = self._store.names()
        there, own_of = set(names), by_step(names)
        committed = self._fences.admitted(own_of)
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
            if name not in needed and is_ours(name)
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
        return step in self._fences.admitted(by_step(self._store.names(folder(step))))

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
        for step, name in reversed(self._fences.admitted(by_step(self._store.names())).items()):
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
        own_of = {step: own for step, own in by_step(self._store.names()).items() if step <= newest}
        committed = self._fences.admitted(own_of)
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
        own_of = by_step(self._store.names())
        for _ in self._delete(name for later, own in own_of.items() if later > step for name in own):
            pass

    def _delete(self, names: Iterable[str]) -> Iterator[None]:
        """Manifests first, the oldest first: from then on their checkpoints do not exist, whatever is left.

        Yields whenever some have gone, the manifests before all else.
        """
        rest = set(names)
        manifests = [name for own in by_step(sorted(rest)).values() for _, name in manifests_among(own)]
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
            manifest = parse(self._store.read(name), step)
        except MissingObject as error:
            raise self._bad(step, f"{base} is missing") from error
        except DefectError as defect:
            raise self._bad(step, f"{base} {defect}") from defect
        self._manifests[name] = manifest
        return manifest

    def _look_at(self, step: int, name: str, there: Collection[str]) -> Manifest | CheckpointError | None:
        """The manifest or the defect of a checkpoint that was listed; none if it has been deleted since."""
        try:
            manifest = self._read_manifest(step, name)
            for part in sorted(manifest.objects().difference(there)):
                if not self._store.exists(part):  # nor was it written since
                    raise self._bad(step, f"{part.removeprefix(f'{folder(step)}/')} is missing")
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
        name = part.object.removeprefix(f"{folder(step)}/")
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
