"""Search order for the user's own modules: after everything else.

So nothing that the program or its libraries import, often late, is ever a user's file that happens to have the same
name. ``jobs.components.shadowing`` reports a user's module that is not found for this reason.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

OWN_PACKAGES = ("jobs", "cluster", "launcher")
REQUIRED = frozenset(
    {
        "PIL", "click", "fsspec", "matplotlib", "numpy", "omegaconf", "pathspec", "psutil", "pyarrow", "pydantic",
        "ray", "requests", "rich", "safetensors", "sklearn", "torch", "torchmetrics", "torchvision", "wandb", "yaml",
    }
)  # fmt: skip
"""The packages that the launcher needs, as in pyproject.toml."""
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD_LIBRARY = Path(os.__file__).parent

_users_paths: tuple[str, ...] = ()


def search_last(paths: Sequence[str]) -> None:
    """Makes this process search the user's folders, in this order, after all others."""
    global _users_paths
    _users_paths = tuple(dict.fromkeys((*_users_paths, *paths)))
    real = {os.path.realpath(path) for path in _users_paths}
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) not in real] + [*_users_paths]


def users_paths() -> tuple[str, ...]:
    """Returns the folders given to ``search_last`` in this process so far."""
    return _users_paths


def own_modules(import_paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yields name and file of the modules below the import paths that this process has imported."""
    folders = tuple(os.path.join(path, "") for path in import_paths)
    for name, module in sys.modules.copy().items():
        file = getattr(module, "__file__", None)
        # The cheap checks first: of thousands of modules, hardly any is below these folders.
        if not isinstance(file, str) or not file.startswith(folders) or name.partition(".")[0] in OWN_PACKAGES:
            continue
        if _is_source(Path(file)):
            yield name, Path(file)


def _is_source(file: Path) -> bool:
    """Returns whether a file is the user's source; compiled code may differ by where it was compiled."""
    is_installed = not _INSTALLED.isdisjoint(file.parts) or file.is_relative_to(_STANDARD_LIBRARY)
    return file.suffix == ".py" and not is_installed and file.is_file()
