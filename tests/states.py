"""The files of a state, and its digest, made at once and by one process."""

from collections.abc import Mapping
from typing import Any

import torch

from cluster.run.manifest import FileEntry, Part, digest_of_files
from jobs.checkpoint import layout
from jobs.checkpoint.file_content import HeaderError, file_of, memory_of
from jobs.checkpoint.layout import STATE_FILES, Layout, lay_out


def encode(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a state."""
    return {name: b"".join(parts) for name, parts in _parts(lay_out(state)).items()}


def decode(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The state in files."""
    try:
        return layout.decode({name: file_of(name, data) for name, data in files.items()})
    except HeaderError as error:
        raise layout.decode_error(error) from error


def digest(state: Mapping[str, Any]) -> str:
    """The ``state_sha256`` that a checkpoint of the state has."""
    files = {
        name: FileEntry(tuple(Part.of("", part) for part in parts))
        for name, parts in _parts(lay_out(state)).items()
        if name in STATE_FILES
    }
    return digest_of_files(files)


def _parts(laid_out: Layout) -> dict[str, list[memoryview]]:
    buffer = torch.empty(laid_out.size, dtype=torch.uint8)
    laid_out.copy_to(buffer, range(laid_out.size))
    data = memory_of(buffer)
    return {name: [data[part.start : part.stop] for part in parts] for name, parts in laid_out.files.items()}
