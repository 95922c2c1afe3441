"""Where a run finds the user's own modules: in folders of this machine, or in a bundle that its directory holds.

A run that was submitted has a bundle, and takes it along wherever it goes on. One that was begun in place has none.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.host.scratch import is_own
from cluster.process.code_cache import cache_folder, enter_copy, fetch_code
from cluster.process.orders import Task
from cluster.run.run_directory import RunDirectory
from launcher.config.job_files import is_shipped


@dataclass(frozen=True, kw_only=True, slots=True)
class UserCode:
    """Where the user's own modules are.

    Attributes:
        folders: The import paths that every host has; of a bundle, all is in it.
        sha256: The digest of the bundle; none: there is no bundle.
        unpacked: The folder of the bundle on this host.
        submitted_from: The working directory of whoever made the bundle, for people to know.
        directory: The folder in the bundle in a copy of which relative paths start; none: they start in an empty one.
        git: The revision of the bundle's source, and the digest of its changes; none: it is in no repository.
        submission_id: Of the submission that brings the bundle, which the run has yet to take; none: no new one does.
    """

    folders: tuple[str, ...] = ()
    sha256: str | None = None
    unpacked: str | None = None
    submitted_from: str | None = None
    directory: str | None = None
    git: Mapping[str, str | None] | None = None
    submission_id: str | None = None

    @property
    def import_paths(self) -> tuple[str, ...]:
        """On this host, the first to be searched first."""
        return self.folders if self.unpacked is None else (self.unpacked, *self.folders)

    def task(self, entry: str, run_url: str, content: Any) -> Task:
        """What a process is told that runs with this code, on whatever host.

        Args:
            entry: ``module:function``.
            run_url: The run whose directory holds the bundle.
            content: What the entry is for.
        """
        return Task(
            entry=entry,
            run_url=run_url,
            import_paths=self.folders,
            code=self.sha256,
            code_directory=self.directory,
            working_directory=os.getcwd(),
            content=content,
        )


def has_bundle(run: RunDirectory) -> bool:
    """Whether a run that exists has a bundle."""
    return run.read_environment().get("code") is not None


def find_code(run: RunDirectory, submission_id: str | None = None) -> UserCode:
    """The code that a run goes on with: a bundle, fetched and verified, or folders of this machine.

    The working directory becomes the one in which relative paths of its description start: of a run with a bundle, a
    folder of this process's own, which goes with it, with a copy of what the bundle has of the submitter's; else that
    of whoever began the run, if this machine has it.

    Args:
        run: It exists.
        submission_id: Of the submission that it takes; none: it goes on with the code it had.

    Raises:
        StorageError: The bundle is missing or damaged, or cannot be unpacked here.
    """
    if submission_id is not None:
        submission = run.submissions.read(submission_id)
        return _fetch(
            run,
            UserCode(
                sha256=submission.code_sha256,
                submitted_from=submission.working_directory,
                directory=submission.code_directory,
                git=submission.git,
                submission_id=submission_id,
            ),
        )
    environment = run.read_environment()
    if environment.get("code") is not None:
        return _fetch(
            run,
            UserCode(
                sha256=environment["code"],
                submitted_from=environment.get("working_directory"),
                directory=environment.get("code_directory"),
                git=environment["attempts"][-1].get("git"),
            ),
        )
    if environment.get("working_directory") is not None:
        with contextlib.suppress(OSError):
            os.chdir(environment["working_directory"])
    return UserCode(folders=tuple(environment.get("import_paths", ())) or make_import_paths(Path.cwd()))


def _fetch(run: RunDirectory, code: UserCode) -> UserCode:
    assert code.sha256 is not None
    unpacked = fetch_code(run, code.sha256, check_store=True)
    enter_copy(unpacked, code.directory)
    return replace(code, unpacked=str(unpacked))


def lasting_directory(run_id: str) -> str:
    """Where this process puts what must outlive it: the working directory, unless that goes with the process.

    Then it is a folder of this user's cache, the same one for every attempt of a run on this host.

    Args:
        run_id: A plain name that no other run has.
    """
    here = os.getcwd()
    return str(cache_folder("records", run_id)) if is_own(here) else here


def import_root(folder: Path) -> Path:
    """The folder from which modules in a folder are imported: a package is imported from the folder above it."""
    folder = folder.resolve()
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def make_import_paths(folder: Path) -> tuple[str, ...]:
    """Where the user's own modules are looked for: from the job file's folder, and from the working directory.

    For a description that is shipped, from the working directory alone: its folder is the launcher's own.
    """
    roots = [] if is_shipped(folder) else [str(import_root(folder))]
    return tuple(dict.fromkeys([*roots, os.getcwd()]))


def code_folder(folder: Path) -> Path:
    """The folder that is the user's, to name it: that of the job file; of one that is shipped the working directory."""
    return Path.cwd() if is_shipped(folder) else folder.resolve()
