"""The environment variables of a forked process: those of the process that asked for it, not those of the fork server.

Ray assigns GPUs to an agent by its environment variables, for example, and those of the fork server may differ.
"""

import os
import tempfile
from collections.abc import Mapping

_at_import: Mapping[str, str] | None = None


def take_environment(environment: Mapping[str, str]) -> None:
    """Give this forked process its environment variables, before it imports anything of the user's."""
    global _at_import
    _at_import = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the fork server may have cached another folder


def environment_at_import() -> Mapping[str, str]:
    """Return the environment variables with which torch was imported: the fork server's, if it imported it ahead."""
    return os.environ if _at_import is None else _at_import
