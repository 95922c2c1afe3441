"""Where a run finds the user's own modules: in folders of this machine, or in a bundle that its directory holds.

A run that was submitted has a bundle, and takes it along wherever it goes on. One that was begun in place has none.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
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
        submitted_from: The working directory of whoever made the bundle, in which relative paths start where there is
            such a folder.
        directory: The folder in the bundle in which they start elsewhere; none: it has none.
    """

    folders: tuple[str, ...]
    sha256: str | None = None
    unpacked: str | None = None
    submitted_from: str | None = None
    directory: str | None = None

    @property
    def import_paths(self) -> tuple[str, ...]:
        """On this host, the first to be searched first."""
        return self.folders if self.unpacked is None else (self.unpacked, *self.folders)


def takes_code_along(run: RunDirectory) -> bool:
    """Whether a run that exists has a bundle."""
    return _about_bundle(run.read_submission(), run.read_environment()) is not None


def find_code(run: RunDirectory) -> UserCode:
    """The code of a run that exists: its bundle, fetched and verified, or folders of this machine.

    The working directory becomes the one in which relative paths of its description start: that of whoever submitted
    or began it, if this machine has it; else what the bundle has of it; else it stays the one there is.

    Raises:
        StorageError: The bundle is missing or damaged, or cannot be unpacked here.
    """
    environment = run.read_environment()
    about = _about_bundle(run.read_submission(), environment)
    if about is None:
        _go_to_first([environment.get("working_directory")])
        return UserCode(folders=tuple(environment.get("import_paths", ())) or make_import_paths(Path.cwd()))
    unpacked = fetch_code(run, about["code"], check_store=True)
    submitted_from, directory = about.get("working_directory"), about.get("code_directory")
    _go_to_first([submitted_from, None if directory is None else str(unpacked / directory)])
    return UserCode(
        folders=(os.getcwd(),),
        sha256=about["code"],
        unpacked=str(unpacked),
        submitted_from=submitted_from,
        directory=directory,
    )


def _about_bundle(submission: Mapping[str, Any] | None, environment: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The document that names the bundle of a run; none: it has none.

    The newest submission has the last word: it was made with the run at rest, and may have repaired the code. A branch
    has no submission, and its environment names the bundle.
    """
    for document in (submission or {}, environment):
        if document.get("code") is not None:
            return document
    return None


def _go_to_first(places: Sequence[str | None]) -> None:
    for place in places:
        if place is not None:
            with contextlib.suppress(OSError):
                os.chdir(place)
                return


def import_root(folder: Path) -> Path:
    """The folder from which modules in a folder are imported: a package is imported from the folder above it."""
    folder = folder.resolve()
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def make_import_paths(folder: Path) -> tuple[str, ...]:
    """Where the user's own modules are looked for: from the job file's folder, and from the working directory."""
    return tuple(dict.fromkeys([str(import_root(folder)), os.getcwd()]))
