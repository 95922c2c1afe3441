"""What the bits of a run depend on beside its description: versions, hardware, the user's code, the data.

Workers compare theirs before they train, and the driver compares those of two attempts. The driver does without torch,
which is imported here by the function that asks it what it has.
"""

import functools
import hashlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import listed

if TYPE_CHECKING:
    from jobs.parts import Parts

_NONE = "none"
_OWN_PACKAGES = ("jobs", "cluster", "launcher")
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD_LIBRARY = Path(os.__file__).parent
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip
"""Environment variables by which libraries choose their kernels."""
_LABELS = {"python": "Python", "cuda": "CUDA", "gpu": "GPU", "cpu": "CPU"}
"""What fields are called in a line, where that is not their name."""
_DIGESTS = ("launcher", "code", "data")
_DIGITS = 12
"""Of a digest, in a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What may change a bit of what a worker computes, as text."""

    python: str
    """The major and the minor version."""
    torch: str
    """The version; MKL, oneDNN and NCCL come with torch."""
    torchvision: str
    """The version."""
    numpy: str
    """The version."""
    launcher: str
    """The digest of this product's packages."""
    cuda: str
    """The versions of CUDA and cuDNN; ``none`` without a GPU."""
    gpu: str
    """The model of the GPU, or ``none``."""
    cpu: str
    """Architecture, vendor (MKL chooses its kernels by that too) and the vector instructions that torch uses."""
    variables: str
    """The environment variables that choose kernels, as far as they are set, or ``none``."""
    code: str
    """The digest of the user's own modules, or ``none``."""
    data: str
    """The data fingerprint."""


def make_environment(import_paths: Sequence[str], parts: "Parts") -> Environment:
    """The environment of this process, which has built its parts and trained nothing.

    Every worker calls it at this same moment, so that a module which only some of them import later counts for none.

    Args:
        import_paths: Folders of the user's own modules.
        parts: What this process has built.
    """
    import numpy as np
    import torch
    import torchvision

    on_gpu = parts.device.type == "cuda"
    cpu = (platform.machine(), _cpu_vendor(), torch.backends.cpu.get_cpu_capability())
    return Environment(
        python=python_version(),
        torch=str(torch.__version__),
        torchvision=str(torchvision.__version__),
        numpy=np.__version__,
        launcher=launcher_digest(),
        cuda=f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if on_gpu else _NONE,
        gpu=torch.cuda.get_device_name(parts.device) if on_gpu else _NONE,
        cpu=" ".join(filter(None, cpu)),
        variables=" ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ) or _NONE,
        code=code_digest(import_paths),
        data=parts.data_fingerprint(),
    )


def python_version() -> str:
    """The major and the minor version: patches change no bit."""
    return ".".join(platform.python_version_tuple()[:2])


@functools.cache
def launcher_digest() -> str:
    """The digest of the source of the packages that train, whatever of them is imported by now.

    A module of the user's that lies among them, in a checkout, counts here.
    """
    root = Path(__file__).parents[1]
    files = [file for package in ("jobs", "cluster") for file in root.glob(f"{package}/**/*.py")]
    return _digest({file.relative_to(root).as_posix(): file for file in files})


def code_digest(import_paths: Sequence[str]) -> str:
    """The digest of the modules below the import paths that this process has imported; ``none`` if there are none.

    It is of their names and the bytes of their files: where the files lie may differ between hosts. Left out is what is
    installed, which has versions, and what is this product's own: in a checkout it may lie there too, and how much of
    it is imported depends on the server that the process was forked from.
    """
    files: dict[str, Path] = {}
    for name, module in sys.modules.copy().items():
        file = getattr(module, "__file__", None)
        if (
            isinstance(file, str)
            and name.partition(".")[0] not in _OWN_PACKAGES
            and _is_users(Path(file), import_paths)
        ):
            files[name] = Path(file)
    return _digest(files) if files else _NONE


def differences(nodes: Sequence[str], environments: Sequence[Environment], planned_data: str | None = None) -> str:
    """What differs between workers and where, in a line; nothing if they are alike.

    Args:
        nodes: The address of each worker's node, by rank.
        environments: By rank.
        planned_data: The data fingerprint that the plan has found on the driver's host; none: not to be compared.
    """
    found = []
    for name in _names():
        ranks_by_value: dict[str, list[int]] = {}
        for rank, environment in enumerate(environments):
            ranks_by_value.setdefault(getattr(environment, name), []).append(rank)
        places = {value: _places(nodes, ranks) for value, ranks in ranks_by_value.items()}
        if name == "data" and planned_data is not None:
            places.setdefault(planned_data, []).append("the driver's host")
        if len(places) > 1:
            where = [f"{_short(name, value)} on {listed(of_value)}" for value, of_value in places.items()]
            found.append(f"{_LABELS.get(name, name)} {listed(where)}")
    return "; ".join(found)


def grouped(environments: Sequence[Environment]) -> list[dict[str, Any]]:
    """Environments by rank as plain values, equal ones once, with their ranks."""
    ranks: dict[Environment, list[int]] = {}
    for rank, environment in enumerate(environments):
        ranks.setdefault(environment, []).append(rank)
    return [{"ranks": of_environment, **asdict(environment)} for environment, of_environment in ranks.items()]


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """What is different about the workers of two attempts, in a line; nothing if they are alike.

    Args:
        before, now: The workers of each attempt, as ``grouped`` returns them.
    """
    found = []
    for name in _names():
        was, has_become = ({group[name] for group in groups if name in group} for groups in (before, now))
        if was and was != has_become:  # else it was not recorded yet
            of_both = (listed(sorted(_short(name, value) for value in values)) for values in (was, has_become))
            found.append(f"{_LABELS.get(name, name)} {' -> '.join(of_both)}")
    return "; ".join(found)


def _names() -> list[str]:
    return [field.name for field in fields(Environment)]


def _short(name: str, value: str) -> str:
    return value[:_DIGITS] if name in _DIGESTS else value


def _places(nodes: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """Where some workers are, by node."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    return [f"node {node} (worker{'s' * (len(there) > 1)} {listed(there)})" for node, there in by_node.items()]


def _is_users(file: Path, import_paths: Sequence[str]) -> bool:
    is_installed = not _INSTALLED.isdisjoint(file.parts) or file.is_relative_to(_STANDARD_LIBRARY)
    return not is_installed and any(map(file.is_relative_to, import_paths)) and file.is_file()


def _digest(files: Mapping[str, Path]) -> str:
    """The digest of the bytes of files and of what they are called."""
    lines = [f"{hashlib.sha256(files[name].read_bytes()).hexdigest()} {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _cpu_vendor() -> str:
    """Who has made the CPU, as Linux tells it of x86; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
