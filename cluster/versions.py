"""The versions that the processes of a run must have in common to understand each other.

Standard library only: a node that is asked for its versions answers at once, and need not import torch for that.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path

from cluster.errors import ClusterError

_OLDEST_RAY, _NEWEST_RAY = (2, 58), (2, 60)
"""Of the versions of Ray with which the tests pass, as in pyproject.toml; see ``cluster.ray.private_train``."""
_TRAINING = ("jobs", "cluster")
_ALL = (*_TRAINING, "launcher")


def check_ray_version() -> None:
    """Makes sure that the installed Ray is one of those with which the tests pass; does not import it.

    Raises:
        ClusterError: It is another, or there is none.
    """
    oldest, newest = (".".join(map(str, version)) for version in (_OLDEST_RAY, _NEWEST_RAY))
    advice = f"pip install 'ray[train]>={oldest},<{_NEWEST_RAY[0]}.{_NEWEST_RAY[1] + 1}'"
    try:
        installed = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError as error:
        raise ClusterError(f"Ray is not installed, and launcher needs it, also to submit; {advice}") from error
    minor = tuple(int(part) for part in installed.split(".")[:2])
    if not _OLDEST_RAY <= minor <= _NEWEST_RAY:
        raise ClusterError(
            f"Ray {installed} is installed, and launcher works with {oldest} to {newest}, whose private parts it uses; "
            f"{advice}"
        )


def versions() -> dict[str, str]:
    """Of this process: ``python``, ``torch`` and ``launcher``, the last a digest."""
    return {"python": python_version(), "torch": torch_version(), "launcher": launcher_digest()}


def python_version() -> str:
    """The major and the minor version: patches change no bit."""
    return ".".join(platform.python_version_tuple()[:2])


def torch_version() -> str:
    """What ``torch.__version__`` is, without the seconds that it takes to import torch; ``none``: it is not installed.

    The version of the installed package is another: it lacks the version of CUDA.
    """
    if "torch" in sys.modules:
        return str(sys.modules["torch"].__version__)
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "none"
    # torch writes this file when it is built; it imports nothing of torch.
    spec = importlib.util.spec_from_file_location("_version_of_torch", Path(found.origin).with_name("version.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__)


def launcher_digest() -> str:
    """The digest of the source of the packages that train, whatever of them is imported by now: it decides on bits.

    A module of the user's that lies among them, in a checkout, counts here.
    """
    return _source_digest(_TRAINING)


def submission_versions() -> dict[str, str]:
    """As ``versions``, with the source of all packages in the digest: a cluster must understand what submits to it."""
    return {**versions(), "launcher": _source_digest(_ALL)}


@functools.cache
def _source_digest(packages: tuple[str, ...]) -> str:
    root = Path(__file__).parents[1]
    files = [file for package in packages for file in root.glob(f"{package}/**/*.py") if file.is_file()]
    lines = sorted(f"{file_digest(file)} {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
