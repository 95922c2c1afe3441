"""Where a process looks for the user's own modules: behind everything else.

What the program and its libraries import, often late, is then never a file of the user's that happens to have the name.
A module of the user's that is therefore not found is told by ``jobs.build.shadowing``.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

OWN_PACKAGES = ("jobs", "cluster", "launcher")
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD_LIBRARY = Path(os.__file__).parent

_users: tuple[str, ...] = ()


def search_last(paths: Sequence[str]) -> None:
    """Has this process look for modules in folders of the user's, in their order, after it has looked elsewhere."""
    global _users
    _users = tuple(dict.fromkeys((*_users, *paths)))
    real = {os.path.realpath(path) for path in _users}
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) not in real] + [*_users]


def users_paths() -> tuple[str, ...]:
    """The folders of the user's own modules, as far as this process has been told of any."""
    return _users


def own_modules(import_paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The modules below the import paths that this process has imported, by name and file."""
    folders = tuple(os.path.join(path, "") for path in import_paths)
    for name, module in sys.modules.copy().items():
        file = getattr(module, "__file__", None)
        # Of thousands of modules, hardly any is below these folders.
        if not isinstance(file, str) or not file.startswith(folders) or name.partition(".")[0] in OWN_PACKAGES:
            continue
        if _is_source(Path(file)):
            yield name, Path(file)


def _is_source(file: Path) -> bool:
    """Whether it is one of the user's; what was compiled may differ by where that was done."""
    is_installed = not _INSTALLED.isdisjoint(file.parts) or file.is_relative_to(_STANDARD_LIBRARY)
    return file.suffix == ".py" and not is_installed and file.is_file()
