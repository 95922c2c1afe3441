"""Checks of values that the descriptions of several kinds of cluster have."""

import re
from collections.abc import Sequence

from cluster.errors import FieldError

_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_FOLDER = re.compile(r"/[^\x00-\x1f\x7f:]*[^\x00-\x1f\x7f:/]")
"""An absolute path without a colon, which separates the folders of PATH."""


def check_variables(names: Sequence[str]) -> None:
    """Check that each item of ``env`` is the name of an environment variable.

    Raises:
        FieldError: One is not. It may be a secret, so the text does not show it.
    """
    for number, name in enumerate(names):
        if not _VARIABLE.fullmatch(name):
            raise FieldError(f"env[{number}]", "must be the name of an environment variable; values have no place here")


def is_folder(path: str) -> bool:
    """Return whether a text is an absolute path that may stand on PATH."""
    return _FOLDER.fullmatch(path) is not None
