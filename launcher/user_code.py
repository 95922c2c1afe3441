"""Where a run finds the user's own modules: in folders of this machine, or in a bundle that its directory holds.

A run that was submitted has a bundle, and takes it along wherever it goes on. One that was begun in place has none.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.code_cache import fetch_code
from cluster.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class UserCode:
    """Where the user's own modules are.

    Attributes:
        folders: The import paths that every host has.
        sha256: The digest of the bundle; none: there is no bundle.
        unpacked: The folder of the bundle on this host.
    """

    folders: tuple[str, ...]
    sha256: str | None = None
    unpacked: str | None = None

    @property
    def import_paths(self) -> tuple[str, ...]:
        """On this host, the first to be searched first."""
        return self.folders if self.unpacked is None else (self.unpacked, *self.folders)


def find_bundle(run: RunDirectory, environment: Mapping[str, Any], submission: Mapping[str, Any] | None) -> UserCode:
    """The code that a run takes along, fetched and verified; without a bundle there is none, and no folder either.

    The newest submission has the last word: it was made with the run at rest, and may have repaired the code.

    Raises:
        StorageError: The bundle is missing or damaged, or cannot be unpacked here.
    """
    sha256 = (submission or {}).get("code") or environment.get("code")
    if sha256 is None:
        return UserCode(folders=())
    folder = fetch_code(run, sha256, check_store=True)
    return UserCode(folders=(os.getcwd(),), sha256=sha256, unpacked=str(folder))


def import_root(folder: Path) -> Path:
    """The folder from which modules in a folder are imported: a package is imported from the folder above it."""
    folder = folder.resolve()
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def make_import_paths(folder: Path) -> tuple[str, ...]:
    """Where the user's own modules are looked for: from the job file's folder, and from the working directory."""
    return tuple(dict.fromkeys([str(import_root(folder)), os.getcwd()]))
