"""Checkpoints of a run: each is whole and verified, or it does not exist.

A checkpoint is a manifest in a folder ``step-00000500``. The manifest is written last. It names every file and its
parts, and for each part the object that holds it, its size and its SHA-256. A part's object lies in the same folder or,
if the part has not changed since, in that of an earlier step. A folder without a manifest is no checkpoint; one whose
bytes differ from its manifest is refused with the name of the bad object. What the store returns is not trusted: it is
parsed strictly, hashed, and never unpickled. This module does not know what the files mean.

``cluster.run.fences`` decides which manifest of a step is admitted. One that is not admitted is treated as an object
that no checkpoint needs.
"""

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.errors import CheckpointError
from cluster.run.checkpoint_names import by_step, folder, is_ours, manifest_object, manifests_among, part_object
from cluster.run.fences import Fences, fences_among
from cluster.run.manifest import DefectError, FileEntry, Manifest, Part, PartKey, parse, to_json
from cluster.run.verified_parts import checkpoint_error, map_parts
from cluster.storage.retrying_calls import Trouble
from cluster.storage.store import MissingObject, Store

CONCURRENT_REQUESTS = 8
"""Objects that a process reads, writes or deletes at a time: a request to a remote store is mostly waiting."""
_DELETED_AT_A_STRETCH = 64
"""Parts deleted between two yields: seconds at most, then a caller may have to renew its lease."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Survey:
    """The content of a checkpoint store according to object names and manifests; no other object was read."""

    manifests: Mapping[int, Manifest]
    """By step, ascending: checkpoints that may be good. All their objects exist."""
    defects: Mapping[int, CheckpointError]
    """By step, ascending: what is wrong with the other checkpoints."""
    orphans: tuple[str, ...]
    """Objects that no checkpoint needs: killed saves left them, or a running save is writing them."""


class Checkpoints:
    """The checkpoints in a store, the ``checkpoints`` folder of a run."""

    def __init__(self, store: Store, fencing_token: str | None = None) -> None:
        """``fencing_token``: of the driver that commits here, if there is one; a later driver's is greater."""
        self._store = store
        self._fencing_token = fencing_token
        self._fences = Fences(store, fencing_token)
        self._writer_id = uuid.uuid4().hex[:8]
        self._manifests: dict[str, Manifest] = {}  # by object name: committed or read here, kept for ``retain``

    def write_part(self, step: int, key: PartKey, data: bytes | memoryview, before: Part | None = None) -> Part:
        """Writes a part of a file under a name that no other writer uses.

        Args:
            step: The step of the checkpoint.
            key: Which part of which file.
            data: The content.
            before: The same part in the previous checkpoint; if the content is equal, nothing is written.

        Returns:
            The part written, or ``before``.
        """
        file, number = key
        part = Part.of(part_object(step, file, self._writer_id, number), data)
        if before is not None and (before.size, before.sha256) == (part.size, part.sha256):
            return before
        self._store.write(part.object, data)
        return part

    def commit(self, manifest: Manifest) -> None:
        """Makes a checkpoint exist. Call it last, once everything the checkpoint stands for is safe in the store."""
        data = to_json(manifest)
        assert parse(data, manifest.step) == manifest  # what we write, we accept
        name = manifest_object(manifest.step, self._fencing_token)
        self._manifests.pop(name, None)
        self._store.write(name, data)
        self._manifests[name] = manifest

    def fence(self, step: int) -> None:
        """Rules out the manifests of earlier drivers beyond a step for good, including those that arrive later.

        Driver only: when it takes over the run, when the run goes back to a step, and when the workers fall back to
        one. The fence of a driver that has lost the lease meanwhile may arrive late; steps are then trained again.

        Raises:
            StorageError: The fence could not be written, or was gone right after.
        """
        self._fences.put(step)

    def newest_token(self) -> str:
        """Returns the greatest fencing token in the name of a manifest or fence here, or ''."""
        names = self._store.names()
        of_manifests = [token for own in by_step(names).values() for token, _ in manifests_among(own)]
        return max([*of_manifests, *(fence.token for fence in fences_among(names))], default="")

    @property
    def trouble(self) -> Trouble | None:
        """Why the store does not answer at the moment, if it does not; for a caller that does not want to wait."""
        return self._store.trouble

    def url(self, step: int) -> str:
        """Returns the URL of a step's checkpoint, which need not exist."""
        return f"{self._store.url}/{folder(step)}"

    def steps(self) -> list[int]:
        """Returns the steps with an admitted manifest, ascending; only ``read`` tells whether a checkpoint is good."""
        return list(self._fences.admitted(by_step(self._store.names())))

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a checkpoint.

        Raises:
            CheckpointError: There is none, or ``commit`` could not have written it.
        """
        name = self._fences.admitted(by_step(self._store.names(folder(step)))).get(step)
        if name is None:
            raise self._error(
                step, "its manifest is missing: it was not written to the end, or the run has gone on without it"
            )
        return self._read_manifest(step, name)

    def survey(self) -> Survey:
        """Lists the store and reads the manifests, several at a time; a run may be writing meanwhile."""
        names = self._store.names()
        there, names_by_step = set(names), by_step(names)
        committed = self._fences.admitted(names_by_step)
        with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="survey") as pool:
            looks = pool.map(lambda step: self._inspect(step, committed[step], there), committed)
            found = dict(zip(committed, looks))
        manifests = {step: manifest for step, manifest in found.items() if isinstance(manifest, Manifest)}
        defects = {step: defect for step, defect in found.items() if isinstance(defect, CheckpointError)}
        needed = {name for manifest in manifests.values() for name in manifest.objects()}.union(committed.values())
        orphans = [
            name
            for step, own in names_by_step.items()
            # Objects up to a bad checkpoint may belong to it: keep them for whoever repairs it.
            if step > max(defects, default=-1)
            for name in own
            if name not in needed and is_ours(name)
        ]
        return Survey(manifests, defects, tuple(orphans))

    def remove_orphans(self, survey: Survey) -> None:
        """Deletes the orphans that a survey found, and files that killed writers left unfinished.

        No run may have written here since before the survey.
        """
        for _ in self._delete_objects(survey.orphans):
            pass
        self._store.sweep()

    def verify(self, manifest: Manifest) -> None:
        """Reads and verifies a whole checkpoint, and keeps none of it.

        Raises:
            CheckpointError: A part is missing or differs from the manifest, and how.
        """
        self._map_parts(manifest, lambda _, data: len(data))

    def copy_to(self, target: "Checkpoints", manifest: Manifest) -> None:
        """Copies a checkpoint to another store, and verifies it on the way. The copy needs no folder but its own.

        Raises:
            CheckpointError: A part is missing or differs from the manifest, and how; the target gets no checkpoint.
        """
        parts = self._map_parts(manifest, lambda key, data: target.write_part(manifest.step, key, data))
        files = {
            name: FileEntry(tuple(parts[name, number] for number in range(len(entry.parts))))
            for name, entry in manifest.files.items()
        }
        target.commit(replace(manifest, files=files))

    def exists(self, step: int) -> bool:
        """Returns whether a step has an admitted manifest."""
        return step in self._fences.admitted(by_step(self._store.names(folder(step))))

    def read_parts(self, manifest: Manifest, wanted: Sequence[PartKey], use: Callable[[PartKey, bytes], None]) -> None:
        """Reads parts of a checkpoint, several at a time, each once, and verifies them; keeps none of them.

        Args:
            manifest: The manifest of the checkpoint.
            wanted: Which parts to read.
            use: Called with each part that is verified.

        Thread: ``use`` is called from several threads.

        Raises:
            CheckpointError: A part is missing or differs from the manifest, and how.
        """
        self._map_parts(manifest, use, wanted)

    def read(self, step: int, files: Collection[str] | None = None) -> tuple[Manifest, dict[str, bytes]]:
        """Returns a checkpoint's manifest and files, or those of ``files`` that exist.

        Raises:
            CheckpointError: A part is missing or differs from the manifest, and how.
        """
        manifest = self.manifest(step)
        return manifest, self.read_files(manifest, files)

    def read_files(self, manifest: Manifest, files: Collection[str] | None = None) -> dict[str, bytes]:
        """Returns the files of a checkpoint, or those of ``files`` that exist.

        Raises:
            CheckpointError: A part is missing or differs from the manifest, and how.
        """
        names = [name for name in manifest.files if files is None or name in files]
        wanted = [key for key in manifest.part_keys() if key[0] in names]
        parts = self._map_parts(manifest, lambda _, data: data, wanted)
        return {
            name: b"".join(parts.pop((name, number)) for number in range(len(manifest.files[name].parts)))
            for name in names
        }

    def newest_good(
        self, on_bad: Callable[[int, CheckpointError], None], files: Collection[str] | None = None
    ) -> tuple[Manifest, dict[str, bytes]] | None:
        """Returns the newest checkpoint that is whole, or None.

        A store that does not answer is an error, not a bad checkpoint: it must not send a run back to step 0.

        Args:
            on_bad: Called with each newer checkpoint that was skipped, and why.
            files: Read and verify only these.
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

        The caller may stop iterating at any point: a checkpoint depends on parts of earlier ones only, and the latest
        is deleted first.

        Everything beyond ``newest`` is left alone and not counted: it may be a checkpoint in progress, or belong to a
        driver that has taken over without this one knowing it yet.

        Args:
            newest: The step committed last.
            keep: How many of the newest checkpoints to keep.
            best_step: The step of one more checkpoint to keep.
            bad: Steps of checkpoints known to be bad: they are left alone and not counted.
            check: Called before anything of a step is deleted; raises if another driver has taken over the run.

        Yields:
            The step of each checkpoint as soon as it no longer exists, and None whenever other objects were deleted.
        """
        assert keep >= 1
        names_by_step = {step: own for step, own in by_step(self._store.names()).items() if step <= newest}
        committed = self._fences.admitted(names_by_step)
        kept, left_alone = list[Manifest](), set(bad)
        for step, name in reversed(committed.items()):
            if step not in left_alone and (len(kept) < keep or step == best_step):
                try:
                    kept.append(self._manifests.get(name) or self._read_manifest(step, name))
                except CheckpointError:  # reported when the checkpoint is read; a person has to look at it
                    left_alone.add(step)
        if not kept:
            return
        needed = {name for manifest in kept for name in manifest.objects()}
        needed |= {committed[manifest.step] for manifest in kept}
        for step, own in sorted(names_by_step.items(), reverse=True):
            unneeded = [name for name in own if name not in needed]
            if step > kept[0].step or step in left_alone or not unneeded:
                continue
            check()
            gone = step if committed.get(step) in unneeded else None
            for _ in self._delete_objects(unneeded):
                yield gone
                gone = None

    def discard_after(self, step: int) -> None:
        """Deletes everything beyond a step of a run that nobody else writes to."""
        names_by_step = by_step(self._store.names())
        for _ in self._delete_objects(name for later, own in names_by_step.items() if later > step for name in own):
            pass

    def _delete_objects(self, names: Iterable[str]) -> Iterator[None]:
        """Deletes manifests first, oldest first, so that their checkpoints stop existing before they lose parts.

        Yields after the manifests and then after every stretch of parts.
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
            raise self._error(step, f"{base} is missing") from error
        except DefectError as defect:
            raise self._error(step, f"{base} {defect}") from defect
        self._manifests[name] = manifest
        return manifest

    def _inspect(self, step: int, name: str, there: Collection[str]) -> Manifest | CheckpointError | None:
        """Returns the manifest or the defect of a checkpoint that was listed; None if it has been deleted since."""
        try:
            manifest = self._read_manifest(step, name)
            for part in sorted(manifest.objects().difference(there)):
                if not self._store.exists(part):  # may have been written since the listing
                    raise self._error(step, f"{part.removeprefix(f'{folder(step)}/')} is missing")
        except CheckpointError as defect:
            return defect if self.exists(step) else None
        return manifest

    def _map_parts(
        self, manifest: Manifest, use: Callable[[PartKey, bytes], T], keys: Sequence[PartKey] | None = None
    ) -> dict[PartKey, T]:
        """Reads and verifies parts, all of them by default, and returns what ``use`` makes of each."""
        wanted = manifest.part_keys() if keys is None else keys
        return map_parts(self._store, manifest, wanted, use, CONCURRENT_REQUESTS)

    def _error(self, step: int, defect: str) -> CheckpointError:
        return checkpoint_error(self._store, step, defect)
