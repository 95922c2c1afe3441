"""Which job description is meant by ``JOB``: a file, or the name of one that is here or shipped."""

from pathlib import Path
from typing import Final

import jobs
from cluster.errors import DescriptionError, nearest

SHIPPED: Final = Path(jobs.__file__).resolve().parent
"""The folder of the descriptions that are shipped. It is the launcher's own, and holds no code of the user's."""


def find_job(named: str) -> Path:
    """The file that describes a job.

    Args:
        named: Its path; or a name without suffix and slash: a file of this name, else NAME.yaml in the working
            directory, else the one of the name that is shipped.

    Raises:
        DescriptionError: There is none of the name.
    """
    path = Path(named)
    if "/" in named or path.suffix or path.is_file():
        return path
    shipped = _descriptions(SHIPPED)
    known = shipped | _descriptions(Path())
    if named in known:
        return known[named]
    if path.is_dir():
        return path  # reading it tells what it is
    raise DescriptionError(
        f"{named}: is no file here, and no description that is shipped{nearest(named, known)}; write the path of a "
        f"YAML file, or one of {', '.join(sorted(shipped))}"
    )


def is_shipped(folder: Path) -> bool:
    """Whether the folder of a job file is the launcher's own, which every host has."""
    return folder.resolve().is_relative_to(SHIPPED)


def _descriptions(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.yaml")}
