"""Reading the parts of a checkpoint, each held against its manifest."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.errors import CheckpointError
from cluster.run.checkpoint_names import folder
from cluster.run.manifest import Manifest, PartKey
from cluster.storage.store import MissingObject, Store

T = TypeVar("T")


def map_parts(
    store: Store, manifest: Manifest, keys: Sequence[PartKey], use: Callable[[PartKey, bytes], T], num_threads: int
) -> dict[PartKey, T]:
    """Reads and verifies each part once, and returns what ``use`` makes of it.

    Thread: ``use`` is called from ``num_threads`` threads.

    Raises:
        CheckpointError: A part is missing or differs from the manifest, and how.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="parts") as pool:
        return dict(zip(keys, pool.map(lambda key: use(key, _read_part(store, manifest, key)), keys)))


def checkpoint_error(store: Store, step: int, defect: str) -> CheckpointError:
    """Returns the error for the bad checkpoint of a step; ``defect`` is a clause."""
    return CheckpointError(f"{store.url}/{folder(step)}: {defect}; restore it, or use an older checkpoint")


def _read_part(store: Store, manifest: Manifest, key: PartKey) -> bytes:
    step, part = manifest.step, manifest.part(key)
    name = part.object.removeprefix(f"{folder(step)}/")
    try:
        data = store.read(part.object)
    except MissingObject as error:
        raise checkpoint_error(store, step, f"{name} is missing") from error
    if len(data) != part.size:
        raise checkpoint_error(store, step, f"{name} has {len(data)} bytes, the manifest says {part.size}")
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise checkpoint_error(store, step, f"{name} has other bytes than were written: its SHA-256 differs")
    return data
