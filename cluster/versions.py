"""The versions that all processes of a run must share to understand each other.

It imports the standard library only, so that a node can report its versions at once, without importing torch.
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
"""The range of Ray versions with which the tests pass, as in pyproject.toml; see ``cluster.ray.private_train``."""
_TRAINING = ("jobs", "cluster")
_ALL = (*_TRAINING, "launcher")


def check_ray_version() -> None:
    """Check that the tests pass with the installed version of Ray; do not import it.

    Raises:
        ClusterError: Ray is not installed, or its version is out of range.
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
    """Return this process's versions of ``python``, ``torch`` and ``launcher``, by name; the last is a digest."""
    return {"python": python_version(), "torch": torch_version(), "launcher": launcher_digest()}


def python_version() -> str:
    """Return the major and minor version of Python; patch versions change no bit."""
    return ".".join(platform.python_version_tuple()[:2])


def torch_version() -> str:
    """Return ``torch.__version__`` without importing torch, which takes seconds; ``none``: it is not installed.

    The version of the installed package would not do: it lacks the version of CUDA.
    """
    if "torch" in sys.modules:
        return str(sys.modules["torch"].__version__)
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "none"
    # The build of torch writes this file, which imports nothing of torch.
    spec = importlib.util.spec_from_file_location("_version_of_torch", Path(found.origin).with_name("version.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__)


def launcher_digest() -> str:
    """Return the digest of the source of the packages that train, which decides the bits of a run.

    It covers all files, imported or not, and also a module of the user's in one of these folders of a checkout.
    """
    return _source_digest(_TRAINING)


def submission_versions() -> dict[str, str]:
    """Return ``versions`` with a digest of all packages: a cluster must understand the launcher that submits to it."""
    return {**versions(), "launcher": _source_digest(_ALL)}


@functools.cache
def _source_digest(packages: tuple[str, ...]) -> str:
    root = Path(__file__).parents[1]
    files = [file for package in packages for file in root.glob(f"{package}/**/*.py") if file.is_file()]
    lines = sorted(f"{file_digest(file)} {file.relative_to(root).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
