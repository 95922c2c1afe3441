"""How error messages show files: their names, their sizes, and why one cannot be read."""

import math
from pathlib import Path

from cluster.errors import DescriptionError, listed

NUM_NAMED = 10
"""How many files an error names at most."""


def listed_names(names: list[str]) -> str:
    """Return the names as a list for a sentence, the first ``NUM_NAMED`` of them."""
    return listed([shown(name) for name in names], NUM_NAMED)


def shown(name: str) -> str:
    """Return the name of a file in one printable line."""
    return name if name.isprintable() else ascii(name)


def mebibytes(size: int) -> str:
    """Return a number of bytes in MiB, rounded up so that a size above a limit looks so."""
    return f"{math.ceil(size / 2**20 * 100) / 100:,.2f} MiB"


def unreadable(path: Path, error: OSError) -> DescriptionError:
    """Return the error for a file or folder that cannot be read."""
    return DescriptionError(
        f"{shown(str(path))}: cannot be read, {error.strerror}; make it readable, or add it to .gitignore"
    )
