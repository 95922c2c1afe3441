"""User modules that Python does not find, because the standard library or an installed package has the same name.

Such a name is ambiguous, so using it in a description or in a user module is an error; an unused one is not. A user
module that imports the standard library or a package that the launcher needs means that one.
"""

import importlib.util
import os
import symtable
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType

from cluster.errors import DescriptionError
from cluster.host.import_paths import OWN_PACKAGES, REQUIRED, own_modules, users_paths


@dataclass(frozen=True, slots=True)
class Shadowed:
    """A user file that cannot be imported under its name.

    Attributes:
        file: The file.
        has_it: Whether the file defines the name that was looked for, as far as its source shows.
        why: Which module comes first, and what to do.
    """

    file: Path
    has_it: bool
    why: str

    def __str__(self) -> str:
        return f"{self.file} is not found under that name, because {self.why}"


def find_shadowed(path: str) -> Shadowed | None:
    """Returns the user file that an import path ``package.module.Name`` may mean, if the path leads to another file."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        file, why = _shadowed(parts[:length])
        if file is not None:
            has_it = _has(file, parts[length])
            return Shadowed(file, has_it, why) if has_it or length == len(parts) - 1 else None
    return None


def check_imports() -> None:
    """Checks that no user module has imported an installed module in place of a user file of that name.

    Raises:
        DescriptionError: A user module has.
    """
    for name, module_file in own_modules(users_paths()):
        for used in sorted(_imported(sys.modules[name]) - sys.stdlib_module_names - REQUIRED):
            file, why = _shadowed([used])
            if file is not None:
                raise DescriptionError(f"{module_file}: imports {used}, but {Shadowed(file, True, why)}")


def _shadowed(module: Sequence[str]) -> tuple[Path | None, str]:
    """Returns the user file with the name of a module that Python does not find, and why; None if there is no such."""
    found, users = _found_in(module[0]), users_paths()
    if not found or found & {os.path.realpath(folder) for folder in users}:
        return None, ""
    for folder in users:
        file = _module_file(folder, module)
        if file is not None and not _is_copy(folder, file, module[0], found):
            return file, _why(module[0], found, is_file=file.parent == Path(folder))
    return None, ""


def _imported(module: ModuleType) -> set[str]:
    """Returns the top-level names of the modules that a module has imported, or has classes and functions of."""
    names = set()
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            names.add(value.__name__)
        elif isinstance(value, (type, FunctionType)):
            names.add(str(value.__module__))
    return {name.partition(".")[0] for name in names}


def _found_in(name: str) -> set[str]:
    """Returns the folders in which Python finds a top-level module; empty if there is no such module."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module object without a spec
        return set()
    if spec is None:
        return set()
    if spec.submodule_search_locations:
        return {os.path.realpath(os.path.dirname(place)) for place in spec.submodule_search_locations}
    if spec.origin is not None and spec.has_location:
        return {os.path.realpath(os.path.dirname(spec.origin))}
    return {os.path.realpath(os.path.dirname(os.__file__))}  # built-in or frozen


def _module_file(folder: str, parts: Sequence[str]) -> Path | None:
    """Returns the file of a module below a folder, if there is one."""
    place = Path(folder, *parts)
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _is_copy(folder: str, file: Path, name: str, found: set[str]) -> bool:
    """Returns whether the found module has the same bytes as the user's file.

    The rest of the package must be the same too, unless it is one of the launcher's own.
    """
    top = Path(folder, name)
    files = [file, *(top.rglob("*.py") if top.is_dir() and name not in OWN_PACKAGES else [])]
    for other in map(Path, found):
        if (other / file.relative_to(folder)).is_file():
            pairs = ((each, other / each.relative_to(folder)) for each in files)
            return all(theirs.read_bytes() == each.read_bytes() for each, theirs in pairs if theirs.is_file())
    return False


def _has(file: Path, name: str) -> bool:
    """Returns whether a module's source binds a name; does not run the module."""
    try:
        table = symtable.symtable(file.read_text(encoding="utf-8-sig"), str(file), "exec")
    except (SyntaxError, ValueError, OSError):
        return False
    return any(each.get_name() == name and (each.is_assigned() or each.is_imported()) for each in table.get_symbols())


def _why(name: str, found: set[str], *, is_file: bool) -> str:
    """Returns which module comes before the user's, and what to do."""
    whole = "the file" if is_file else f"the folder {name}"
    if name in sys.stdlib_module_names:
        return f"Python's own {name} comes first; rename {whole}"
    if name in OWN_PACKAGES:
        return f"the launcher's own {name} comes first; rename {whole}"
    advice = "" if name in REQUIRED else ", or uninstall that"
    return f"the installed {name} in {min(found)} comes first; rename {whole}{advice}"
