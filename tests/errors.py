"""Every class of error of the launcher, and one error of each."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import cluster
import jobs
import launcher
from cluster.errors import LauncherError


def kinds_of(kind: type[LauncherError]) -> Iterator[type[LauncherError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from kinds_of(each)


def all_kinds() -> list[type[LauncherError]]:
    """Returns every class of error of the launcher, of all modules."""
    rooms: tuple[ModuleType, ...] = (cluster, jobs, launcher)
    for room in rooms:
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return list(dict.fromkeys(kinds_of(LauncherError)))


def error_of(kind: type[LauncherError], text: str = "job.yaml: no") -> LauncherError:
    """Returns an error of a class, whatever its arguments are."""
    error = kind.__new__(kind, text)
    LauncherError.__init__(error, text, "Traceback ...", cause="preempted", step=7, place="step 7, mine.py:3")
    return error


def facts(error: LauncherError) -> tuple[Any, ...]:
    return str(error), error.traceback, error.cause, error.step, error.place, error.exit_code
