"""Modules in folders of ``PYTHONPATH`` that hide others, because Python searches those folders first of all.

The processes of Ray and the fork server search them too, so such a module is an error. ``launcher.cli`` calls this
before it imports anything else, and until it has looked, it imports nothing that may be hidden.
"""

import os
import sys

_OWN = frozenset({"cluster", "jobs", "launcher"})
_UNUSED = frozenset({"antigravity", "idlelib", "test", "this"})
"""Modules of Python that no program imports."""

problem = ""
"""What is wrong with ``PYTHONPATH``, in one line; the command line shows it instead of running a verb."""


def check_python_path() -> None:
    """Set ``problem`` if a module in ``PYTHONPATH`` hides another; then search none of its folders any more."""
    global problem
    folders = [] if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [folder for folder in map(os.path.abspath, folders if any(folders) else []) if os.path.isdir(folder)]
    problem = _hidden(folders, sys.stdlib_module_names - _UNUSED, "Python's own", os.path.dirname(os.__file__))
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    problem = problem or _hidden(folders, _OWN, "the launcher's own", home)
    if not problem:
        from cluster.host.import_paths import REQUIRED  # nothing that this imports is hidden

        problem = _hidden(folders, REQUIRED, "the package", "", packages=False)  # a package may be the real one
    if problem:
        sys.path[:] = [folder for folder in sys.path if folder == home or os.path.abspath(folder) not in folders]


def _hidden(folders: list[str], names: frozenset[str], whose: str, real: str, *, packages: bool = True) -> str:
    """Return which file hides a module, and what to do; empty if none does.

    Args:
        folders: The folders that Python searches first, in this order.
        names: The names of the modules.
        whose: Whose they are.
        real: The folder in which they are; what comes after it hides nothing.
        packages: Whether packages hide them too, and not files alone.
    """
    for folder in folders:
        if folder == real:
            return ""
        try:
            entries = sorted(os.listdir(folder))
        except OSError:  # this user may not list it
            continue
        for entry in entries:
            name = entry.removesuffix(".py")
            is_package = packages and os.path.isfile(os.path.join(folder, entry, "__init__.py"))
            if name in names and (is_package or name != entry):
                return (
                    f"PYTHONPATH: {os.path.join(folder, entry)} comes before {whose} {name}; rename it, or take its "
                    "folder out of PYTHONPATH: modules beside the job file are found without it"
                )
    return ""
