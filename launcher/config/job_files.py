"""Resolves ``JOB``: a file, or the name of a job description in the working directory or of a shipped one."""

from pathlib import Path
from typing import Final

import jobs
from cluster.errors import DescriptionError, nearest

SHIPPED: Final = Path(jobs.__file__).resolve().parent
"""The folder of the shipped job descriptions. It belongs to the launcher and holds no user code."""


def find_job(named: str) -> Path:
    """Return the path of a job description.

    Args:
        named: A path; or a name without suffix and slash, which is looked up as a file of this name, then as NAME.yaml
            in the working directory, then among the shipped descriptions.

    Raises:
        DescriptionError: There is no description of this name.
    """
    path = Path(named)
    if "/" in named or path.suffix or path.is_file():
        return path
    shipped = _descriptions(SHIPPED)
    known = shipped | _descriptions(Path())
    if named in known:
        return known[named]
    if path.is_dir():
        return path  # reading it raises the error for a directory
    raise DescriptionError(
        f"{named}: is no file here, and no description that is shipped{nearest(named, known)}; write the path of a "
        f"YAML file, or one of {', '.join(sorted(shipped))}"
    )


def is_shipped(folder: Path) -> bool:
    """Return whether a folder belongs to the launcher, so that every host has it."""
    return folder.resolve().is_relative_to(SHIPPED)


def _descriptions(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("[!.]*.yaml")}
