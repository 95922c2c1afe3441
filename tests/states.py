"""The files of a state, and its digest, made at once and by one process."""

from collections.abc import Mapping
from typing import Any

import torch

from cluster.run.manifest import FileEntry, Part, digest_of_files
from jobs.checkpoint.layout import STATE_FILES, Layout, lay_out, memory_of


def encode(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a state; ``jobs.checkpoint.layout.decode`` takes them."""
    layout = lay_out(state)
    return {name: b"".join(parts) for name, parts in _parts(layout).items()}


def digest(state: Mapping[str, Any]) -> str:
    """The ``state_sha256`` that a checkpoint of the state has."""
    files = {
        name: FileEntry(tuple(Part.of("", part) for part in parts))
        for name, parts in _parts(lay_out(state)).items()
        if name in STATE_FILES
    }
    return digest_of_files(files)


def _parts(layout: Layout) -> dict[str, list[memoryview]]:
    buffer = torch.empty(layout.size, dtype=torch.uint8)
    layout.copy_to(buffer, range(layout.size))
    data = memory_of(buffer)
    return {name: [data[part.start : part.stop] for part in parts] for name, parts in layout.files.items()}
