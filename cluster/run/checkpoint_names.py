"""How the objects in a store of checkpoints are named: folders of steps, and in them parts and manifests.

A step's folder is ``step-00000500``. A manifest has the claim of its writer in its name,
``manifest-00000002-1f3ac0de.json``, or none if it has none. A part is named after its file, its writer and its number,
``model-1f3ac0de-00000.safetensors``. What has another name is not ours to touch.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_MANIFEST = re.compile(r"manifest(?:-([0-9]{8}-[0-9a-f]{8}))?\.json")
_STEP_FOLDER = re.compile(r"step-([0-9]{8,18})")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WRITTEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{8}-[0-9]{5,}(\.[A-Za-z0-9_-]+)?")
"""The names that ``part_object`` gives, within a folder."""


def folder(step: int) -> str:
    """The folder of a step."""
    assert step >= 0
    return f"step-{step:08d}"


def part_object(step: int, file: str, writer: str, number: int) -> str:
    """The object of a part of a file; ``writer``: 8 hexadecimal digits that no other one has."""
    assert is_file_name(file), f"{file!r} is no plain file name"
    path = PurePosixPath(file)
    return f"{folder(step)}/{path.stem}-{writer}-{number:05d}{path.suffix}"


def manifest_object(step: int, claim: str | None) -> str:
    """The manifest of a step, by the driver with this claim."""
    return f"{folder(step)}/manifest-{claim}.json" if claim else f"{folder(step)}/manifest.json"


def step_of(name: str) -> int | None:
    """The step in whose folder an object lies; none if that is no folder of a step."""
    base, slash, _ = name.partition("/")
    match = _STEP_FOLDER.fullmatch(base) if slash else None
    return int(match[1]) if match and base == folder(int(match[1])) else None


def by_step(names: Iterable[str]) -> dict[int, list[str]]:
    """The object names of each step's folder."""
    found: dict[int, list[str]] = {}
    for name in names:
        step = step_of(name)
        if step is not None:
            found.setdefault(step, []).append(name)
    return found


def manifests_among(names: Iterable[str]) -> list[tuple[str, str]]:
    """The claim and the name of those of one step, ascending; a manifest without a claim is earlier than any."""
    matches = ((_MANIFEST.fullmatch(name.partition("/")[2]), name) for name in names)
    return sorted((match[1] or "", name) for match, name in matches if match)


def is_ours(name: str) -> bool:
    """Whether it is a name that is given here, to an object in a step's folder."""
    base = name.partition("/")[2]
    return _WRITTEN.fullmatch(base) is not None or _MANIFEST.fullmatch(base) is not None


def is_file_name(name: str) -> bool:
    """Whether a file of a checkpoint, or the object of a part within its folder, may have this name."""
    return _FILE_NAME.fullmatch(name) is not None and _MANIFEST.fullmatch(name) is None
