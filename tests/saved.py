"""Checkpoints made by tests."""

from collections.abc import Mapping

from cluster.run.checkpoints import Checkpoints
from cluster.run.manifest import FileEntry, Manifest, digest_of_files
from cluster.storage.store import Store


def write_files(checkpoints: Checkpoints, step: int, files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Writes each file as one part; without a manifest they are no checkpoint."""
    return {name: FileEntry((checkpoints.write_part(step, (name, 0), data),)) for name, data in files.items()}


def manifest_of(step: int, files: Mapping[str, FileEntry]) -> Manifest:
    return Manifest(
        step=step,
        files=files,
        state_sha256=digest_of_files(files),
        metrics={"val/loss": 0.5, "train/loss": float("inf")},
        versions={"torch": "2.13.0"},
        created="2026-11-23T11:24:00.123456+00:00",
    )


def manifest_name(store: Store, step: int) -> str:
    """The object, in a store of checkpoints, that says what the checkpoint of a step holds; there is one."""
    [name] = [name for name in store.names(f"step-{step:08d}") if "/manifest" in name]
    return name


def save(checkpoints: Checkpoints, step: int, files: Mapping[str, bytes]) -> None:
    checkpoints.commit(manifest_of(step, write_files(checkpoints, step, files)))
