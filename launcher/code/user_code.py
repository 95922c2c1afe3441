"""Where a run finds the user's own modules: in folders of this machine, or in a bundle in its run directory.

A run that was submitted has a bundle, and uses it wherever it goes on. A run begun by ``launcher run`` has none.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.host.scratch import is_own
from cluster.process.code_cache import enter_copy, fetch_code
from cluster.process.host_cache import cache_folder
from cluster.process.orders import Task
from cluster.run.run_directory import RunDirectory
from launcher.config.job_files import is_shipped


@dataclass(frozen=True, kw_only=True, slots=True)
class UserCode:
    """Where the user's own modules are.

    Attributes:
        folders: Import paths that every host has; empty with a bundle, which contains all modules.
        sha256: The digest of the bundle; None: there is no bundle.
        unpacked: The folder of the unpacked bundle on this host.
        submitted_from: The working directory of the submitter, for information.
        directory: The folder in the bundle from which relative paths start, in a copy; None: they start in an empty
            folder.
        git: The git revision of the bundle's source, and the digest of its changes; None: it is in no repository.
        submission_id: The submission that the bundle comes from, which the run has yet to take; None: the run has it.
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
        """The import paths on this host, in search order."""
        return self.folders if self.unpacked is None else (self.unpacked, *self.folders)

    def task(self, entry: str, run_url: str, content: Any) -> Task:
        """Return the task of a process that runs with this code on any host.

        Args:
            entry: The function to call, ``module:function``.
            run_url: The run whose directory holds the bundle.
            content: The argument of the function.
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
    """Return whether an existing run has a bundle."""
    return run.read_environment().get("code") is not None


def find_code(run: RunDirectory, submission_id: str | None = None) -> UserCode:
    """Return the code with which a run goes on: a bundle, fetched and verified, or folders of this machine.

    Changes the working directory to the one from which relative paths of the description start. With a bundle that is a
    temporary folder of this process, with a copy of the bundle's part of the submitter's working directory. Without one
    it is the working directory in which the run was begun, if this machine has it.

    Args:
        run: The run.
        submission_id: The submission that it takes; None: it goes on with the code that it has.

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
    """Unpack the bundle on this host and change into a copy of its working directory; return the code with it."""
    assert code.sha256 is not None
    unpacked = fetch_code(run, code.sha256, check_store=True)
    enter_copy(unpacked, code.directory)
    return replace(code, unpacked=str(unpacked))


def lasting_directory(run_id: str) -> str:
    """Return a folder for files that must outlive this process.

    That is the working directory; or, if that is deleted with the process, a folder in the user's cache, the same for
    every attempt of a run on this host.

    Args:
        run_id: A name, without slashes, that no other run has.
    """
    here = os.getcwd()
    return str(cache_folder("records", run_id)) if is_own(here) else here


def import_root(folder: Path) -> Path:
    """Return the import path of the modules in a folder: the folder itself, or the one above its outermost package."""
    folder = folder.resolve()
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def make_import_paths(folder: Path) -> tuple[str, ...]:
    """Return the import paths of the user's own modules: that of the job file's folder, then the working directory.

    For a shipped description it is the working directory alone, because its folder is the launcher's own.
    """
    roots = [] if is_shipped(folder) else [str(import_root(folder))]
    return tuple(dict.fromkeys([*roots, os.getcwd()]))


def code_folder(folder: Path) -> Path:
    """Return the user's folder for messages: the job file's; for a shipped description the working directory."""
    return Path.cwd() if is_shipped(folder) else folder.resolve()
