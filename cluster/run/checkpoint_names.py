"""Names of the objects in a checkpoint store: step folders, and the parts and manifests in them.

The folder of a step is ``step-00000500``. The name of a manifest holds the fencing token of its writer,
``manifest-00000002-1f3ac0de.json``; a writer without a lease writes ``manifest.json``. The name of a part holds its
file, its writer and its number, ``model-1f3ac0de-00000.safetensors``. The program never touches an object with any
other name.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_MANIFEST = re.compile(r"manifest(?:-([0-9]{8}-[0-9a-f]{8}))?\.json")
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{8}-[0-9]{5,}(\.[A-Za-z0-9_-]+)?")
"""Names that ``part_object`` makes, without the folder."""


def folder(step: int) -> str:
    """Returns the name of a step's folder."""
    assert step >= 0
    return f"step-{step:08d}"


def part_object(step: int, file: str, writer: str, number: int) -> str:
    """Returns the object name of a part; ``writer`` is 8 hexadecimal digits, unique to the writer."""
    assert is_file_name(file), f"{file!r} is no plain file name"
    path = PurePosixPath(file)
    return f"{folder(step)}/{path.stem}-{writer}-{number:05d}{path.suffix}"


def manifest_object(step: int, token: str | None) -> str:
    """Returns the object name of a step's manifest; ``token`` is the fencing token of the driver, if it has one."""
    return f"{folder(step)}/manifest-{token}.json" if token else f"{folder(step)}/manifest.json"


def step_of(name: str) -> int | None:
    """Returns the step in whose folder an object lies, or None if it lies in no step folder."""
    base, slash, _ = name.partition("/")
    match = _STEP_FOLDER.fullmatch(base) if slash else None
    return int(match[1]) if match and base == folder(int(match[1])) else None


def by_step(names: Iterable[str]) -> dict[int, list[str]]:
    """Groups object names by step."""
    found: dict[int, list[str]] = {}
    for name in names:
        step = step_of(name)
        if step is not None:
            found.setdefault(step, []).append(name)
    return found


def manifests_among(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (fencing token, name) of each manifest, ascending; the token of a manifest without one is empty."""
    matches = ((_MANIFEST.fullmatch(name.partition("/")[2]), name) for name in names)
    return sorted((match[1] or "", name) for match, name in matches if match)


def is_ours(name: str) -> bool:
    """Returns whether this module could have given the name to an object in a step's folder."""
    base = name.partition("/")[2]
    return _PART.fullmatch(base) is not None or _MANIFEST.fullmatch(base) is not None


def is_file_name(name: str) -> bool:
    """Returns whether a checkpoint's file, or a part within its step folder, may have this name."""
    return _FILE_NAME.fullmatch(name) is not None and _MANIFEST.fullmatch(name) is None
