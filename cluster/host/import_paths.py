"""Where a process looks for the user's own modules: behind everything else.

What the program and its libraries import, often late, is then never a file of the user's that happens to have the name.
A module of the user's that is therefore not found is told by ``jobs.build.shadowing``.
"""

import os
import sys
from collections.abc import Sequence

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
