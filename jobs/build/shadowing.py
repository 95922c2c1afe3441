"""Modules of the user's that Python does not find, because the standard library or an installed package has their name.

Such a name may mean either, so it is an error where a description, or a module of the user's, uses one. Where nobody
does, it is none. A module of the user's that imports the standard library, or what the launcher is made of, means that.
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
from cluster.host.import_paths import OWN_PACKAGES, own_modules, users_paths

REQUIRED = frozenset(
    {
        "PIL", "click", "fsspec", "matplotlib", "numpy", "omegaconf", "pathspec", "ray", "requests", "rich",
        "safetensors", "sklearn", "torch", "torchmetrics", "torchvision", "wandb", "yaml",
    }
)  # fmt: skip
"""What the launcher needs, as in pyproject.toml."""


@dataclass(frozen=True, slots=True)
class Shadowed:
    """A file of the user's that cannot be imported by the name that it has.

    Attributes:
        file: What is not found.
        has_it: Whether it has what was looked for, as far as reading it tells.
        why: What comes first, and what to do.
    """

    file: Path
    has_it: bool
    why: str

    def __str__(self) -> str:
        return f"{self.file} is not found under that name, because {self.why}"


def find_shadowed(path: str) -> Shadowed | None:
    """The user's file that an import path such as ``package.module.Name`` may mean, if it leads to another one."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        file, why = _shadowed(parts[:length])
        if file is not None:
            has_it = _has(file, parts[length])
            return Shadowed(file, has_it, why) if has_it or length == len(parts) - 1 else None
    return None


def check_imports() -> None:
    """Makes sure that no module of the user's has got an installed one in place of the user's own of that name.

    Raises:
        DescriptionError: One has.
    """
    for name, module_file in own_modules(users_paths()):
        for used in sorted(_imported(sys.modules[name]) - sys.stdlib_module_names - REQUIRED):
            file, why = _shadowed([used])
            if file is not None:
                raise DescriptionError(f"{module_file}: imports {used}, but {Shadowed(file, True, why)}")


def _shadowed(module: Sequence[str]) -> tuple[Path | None, str]:
    """The file of the user's that has the name of a module and is not found, and why; none: there is no such file."""
    found, users = _found_in(module[0]), users_paths()
    if not found or found & {os.path.realpath(folder) for folder in users}:
        return None, ""
    for folder in users:
        file = _module_file(folder, module)
        if file is not None and not _is_copy(folder, file, module[0], found):
            return file, _why(module[0], found, is_file=file.parent == Path(folder))
    return None, ""


def _imported(module: ModuleType) -> set[str]:
    """The top-level names of the modules that a module has something of."""
    names = set()
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            names.add(value.__name__)
        elif isinstance(value, (type, FunctionType)):
            names.add(str(value.__module__))
    return {name.partition(".")[0] for name in names}


def _found_in(name: str) -> set[str]:
    """The folders that Python finds a top-level module in; none: there is no such module."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that somebody has made
        return set()
    if spec is None:
        return set()
    if spec.submodule_search_locations:
        return {os.path.realpath(os.path.dirname(place)) for place in spec.submodule_search_locations}
    if spec.origin is not None and spec.has_location:
        return {os.path.realpath(os.path.dirname(spec.origin))}
    return {os.path.realpath(os.path.dirname(os.__file__))}  # built-in or frozen


def _module_file(folder: str, parts: Sequence[str]) -> Path | None:
    """The file in a folder that has the name of a module."""
    place = Path(folder, *parts)
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _is_copy(folder: str, file: Path, name: str, found: set[str]) -> bool:
    """Whether a file is what is found instead, byte by byte, with the rest of its package if that is none of ours."""
    top = Path(folder, name)
    files = [file, *(top.rglob("*.py") if top.is_dir() and name not in OWN_PACKAGES else [])]
    for other in map(Path, found):
        if (other / file.relative_to(folder)).is_file():
            pairs = ((each, other / each.relative_to(folder)) for each in files)
            return all(theirs.read_bytes() == each.read_bytes() for each, theirs in pairs if theirs.is_file())
    return False


def _has(file: Path, name: str) -> bool:
    """Whether a module binds a name, which it is not run to find out."""
    try:
        table = symtable.symtable(file.read_text(encoding="utf-8-sig"), str(file), "exec")
    except (SyntaxError, ValueError, OSError):
        return False
    return any(each.get_name() == name and (each.is_assigned() or each.is_imported()) for each in table.get_symbols())


def _why(name: str, found: set[str], *, is_file: bool) -> str:
    whole = "the file" if is_file else f"the folder {name}"
    if name in sys.stdlib_module_names:
        return f"Python's own {name} comes first; rename {whole}"
    if name in OWN_PACKAGES:
        return f"the launcher's own {name} comes first; rename {whole}"
    advice = "" if name in REQUIRED else ", or uninstall that"
    return f"the installed {name} in {min(found)} comes first; rename {whole}{advice}"
