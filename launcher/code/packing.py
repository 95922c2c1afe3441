"""Pack the user's code into a bundle.

The bundle has the files of the folder of a job file, or of the package that it lies in, and the user's modules that
were imported from elsewhere. ``launcher.code.listing`` decides which files those are; a file that contains a token for
a cluster is refused here. The format of the bundle is known to ``cluster.run.bundle``, which also unpacks it.
"""

import os
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cluster.errors import DescriptionError
from cluster.ray.token import known_tokens
from cluster.run.bundle import MAX_BYTES, MAX_FILES, Bundle, CodeFile, make_bundle
from launcher.code.file_messages import listed_names, mebibytes, unreadable
from launcher.code.gitignore import GitIgnore
from launcher.code.listing import Listing
from launcher.code.user_code import code_folder, import_root, make_import_paths
from launcher.config.job_files import is_shipped

_READINGS = 4
"""How often the folder is read at most, until two readings in a row agree."""

_SHORTEST_TOKEN = 8
"""Characters; a shorter token is not searched for in files, because it may be a word of any text."""


def pack(folder: Path) -> Bundle:
    """Pack the code in a folder; the bundle is empty if git ignores everything there.

    Raises:
        DescriptionError: Something there looks like a secret, is too large, is a symbolic link that leads out of the
            folder or nowhere, cannot be read, or does not stop changing.
    """
    folder = Path(os.path.realpath(folder))
    if not folder.is_dir():
        raise DescriptionError(f"{folder}: is not a folder; give the folder of the job file")
    return _pack(folder, {"": folder})


def pack_job(folder: Path, modules: Collection[str]) -> Bundle:
    """Pack the code of a job.

    Args:
        folder: The folder of the job file. If it is a package, the packages around it are packed too. The folder of a
            shipped description is not packed, only modules of the working directory are.
        modules: The names of the user's modules that the dry run imported. A module outside ``folder`` that is imported
            only later is not packed.

    Raises:
        DescriptionError: As in ``pack``; or an imported module would not be packed.
    """
    folder = Path(os.path.realpath(folder))
    named = code_folder(folder)
    bundle = _pack(named, _sources(folder, modules))
    left_out = [module for module in sorted(modules) if _is_left_behind(module, bundle.names, folder)]
    if left_out:
        raise DescriptionError(
            f"{named}: {listed_names(left_out)} would be missing on the cluster: the job imports what git ignores, "
            "or what is never packed; take it out of .gitignore, or move it"
        )
    return bundle


def directory_in_code(folder: Path) -> str | None:
    """Return the folder in a job's bundle that is the working directory; None: the working directory is not packed."""
    if is_shipped(folder):
        return None
    root, here = import_root(folder), Path.cwd().resolve()
    top = folder.resolve() if root == folder.resolve() else root / folder.resolve().relative_to(root).parts[0]
    return here.relative_to(root).as_posix() if here.is_relative_to(top) else None


def _sources(folder: Path, modules: Collection[str]) -> dict[str, Path]:
    """Return the files and folders to pack, by their names in the bundle, which is one import path.

    The name ``""`` stands for the root of the bundle.
    """
    root, found = import_root(folder), dict[str, Path]()
    if root == folder:
        found[""] = folder
    elif not is_shipped(folder):  # a shipped one's code is installed on the cluster
        package = folder.relative_to(root).parts[0]
        found[package] = root / package
    for name in sorted({module.partition(".")[0] for module in modules}):
        place = _place_of(name, make_import_paths(folder))
        if place is not None and not (place.parent == folder and "" in found):
            found.setdefault(place.name, place)
    return found


def _place_of(name: str, import_paths: Sequence[str]) -> Path | None:
    """Return the file of a module or the folder of a package, found as Python would; None: there is none."""
    for path in map(Path, import_paths):
        if (path / name / "__init__.py").exists():
            return path / name
        if (path / f"{name}.py").exists():
            return path / f"{name}.py"
    return next((Path(path) / name for path in import_paths if (Path(path) / name).is_dir()), None)


def _is_left_behind(module: str, packed: Collection[str], folder: Path) -> bool:
    """Return whether the file of a module is where its name says, and is not in the bundle."""
    stem = module.replace(".", "/")
    names = [f"{stem}/__init__.py", f"{stem}.py"]
    there = [name for name in names for path in make_import_paths(folder) if (Path(path) / name).exists()]
    return bool(there) and not set(names) & set(packed)


def _pack(folder: Path, sources: Mapping[str, Path]) -> Bundle:
    """Read the sources until two readings in a row agree, and make the bundle.

    Args:
        folder: Named in errors.
        sources: See ``_sources``.
    """
    before = _read_files(sources)
    for _ in range(_READINGS - 1):
        files = _read_files(sources)
        whole = {name: file for name, file in files.items() if file is not None}
        # Every file was read twice. If no file differs, the folder held exactly these files between the two readings.
        changed = [name for name in sorted(before.keys() | files.keys()) if whole.get(name, ...) != before.get(name)]
        if not changed:
            _check_whole(folder, whole)
            return make_bundle(whole)
        before = files
    raise DescriptionError(
        f"{folder}: {listed_names(changed)} changed while the code was read; "
        "wait until nothing writes there, or add what is not code to .gitignore"
    )


def _check_whole(folder: Path, files: Mapping[str, CodeFile]) -> None:
    """Check that no file contains a token, and that all sources together are within the limits.

    Raises:
        DescriptionError: A file does, or they are not.
    """
    tokens = [token.encode() for token in known_tokens() if len(token) >= _SHORTEST_TOKEN]
    leaks = [name for name, file in files.items() if any(token in file.data for token in tokens)]
    if leaks:
        raise DescriptionError(
            f"{folder}: files that hold a token of yours for a cluster would be uploaded: "
            f"{listed_names(sorted(leaks))}; take it out of them, or add them to .gitignore"
        )
    size = sum(len(file.data) for file in files.values())
    if size > MAX_BYTES or len(files) > MAX_FILES:
        raise DescriptionError(
            f"{folder}: with the modules that it uses, the code has {mebibytes(size)} in {len(files):,} files, the "
            f"limits are {MAX_BYTES >> 20} MiB and {MAX_FILES:,}; add what is not code to .gitignore"
        )


def _read_files(sources: Mapping[str, Path]) -> dict[str, CodeFile | None]:
    """Read all files of the sources; None stands for a file that was changed or deleted meanwhile."""
    files: dict[str, CodeFile | None] = {}
    for place, source in sources.items():
        is_folder = source.is_dir()
        top = source if is_folder else source.parent
        listing = Listing(top)
        if is_folder:
            listing.visit(top, GitIgnore.above(top), (os.path.realpath(top),))
        else:
            listing.add(source, source.name)
        listing.check()
        prefix = f"{place}/" if place and is_folder else ""
        files |= {prefix + name: _read(top / name, size) for name, size in listing.sizes.items()}
    return files


def _read(path: Path, size: int) -> CodeFile | None:
    """Read a file of ``size`` bytes; return None if it is no longer a regular file of that size."""
    try:
        # Without O_NONBLOCK, opening a named pipe that has just replaced the file would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(size + 1) if stat.S_ISREG(status.st_mode) else b""
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    is_whole = stat.S_ISREG(status.st_mode) and len(data) == size
    return CodeFile(data, bool(status.st_mode & stat.S_IXUSR)) if is_whole else None
