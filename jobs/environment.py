"""What the bits of a run depend on beside its description: versions, hardware, the user's code, the data.

Workers compare theirs before they train, and the driver compares those of two attempts. The driver does without torch,
which is imported here by the function that asks it what it has. What workers must have in common to understand each
other is in ``cluster/versions.py``.
"""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import listed
from cluster.host.import_paths import own_modules
from cluster.versions import file_digest, versions

if TYPE_CHECKING:
    from jobs.build.components import Components

_NONE = "none"
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip
"""Environment variables by which libraries choose their kernels."""
_LABELS = {
    "python": "Python", "cuda": "CUDA", "gpu": "GPU", "cpu": "CPU",
}  # fmt: skip
"""What fields are called in a line, where that is not their name."""
_CODE = "code of "
_DIGEST = re.compile("[0-9a-f]{64}")
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
    code: tuple[tuple[str, str], ...]
    """The user's own modules that are imported, by name, each with the digest of its file."""
    data: str
    """The data fingerprint."""

    def as_dict(self) -> dict[str, Any]:
        """The same by name, and the code by module."""
        return asdict(self) | {"code": dict(self.code)}


def make_environment(import_paths: Sequence[str], parts: "Components") -> Environment:
    """The environment of this process, which has built its parts and trained nothing.

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
        **versions(),
        torchvision=str(torchvision.__version__),
        numpy=np.__version__,
        cuda=f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if on_gpu else _NONE,
        gpu=torch.cuda.get_device_name(parts.device) if on_gpu else _NONE,
        cpu=" ".join(filter(None, cpu)),
        variables=" ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ) or _NONE,
        code=tuple(sorted(code_digests(import_paths).items())),
        data=parts.data_fingerprint(),
    )


def code_digests(import_paths: Sequence[str]) -> dict[str, str]:
    """The digests of the modules below the import paths that this process has imported, by their names.

    Where the files lie may differ between hosts. Left out is what is installed, which has versions, and what is this
    product's own, which in a checkout may lie there too.
    """
    return {name: file_digest(file) for name, file in own_modules(import_paths)}


def differences(
    nodes: Sequence[str], environments: Sequence[Mapping[str, Any]], planned_data: str | None = None
) -> str:
    """What differs between workers and where, in a line; nothing if they are alike.

    A module that only some of them have imported, such as one that prepares the data where that is missing, is compared
    between these.

    Args:
        nodes: The address of each worker's node, by rank.
        environments: By rank, each as ``Environment.as_dict`` or a part of that.
        planned_data: The data fingerprint that the plan has found on the driver's host; none: not to be compared.
    """
    told = [_told(environment) for environment in environments]
    found = []
    for label in dict.fromkeys(label for of_worker in told for label in of_worker):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, of_worker in enumerate(told):
            if label in of_worker:
                ranks_by_value.setdefault(of_worker[label], []).append(rank)
        places = {value: _places(nodes, ranks) for value, ranks in ranks_by_value.items()}
        if label == "data" and planned_data is not None:
            places.setdefault(planned_data, []).append("the driver's host")
        if len(places) > 1:
            where = [f"{_short(value)} on {listed(of_value)}" for value, of_value in places.items()]
            found.append(f"{label} {listed(where)}")
    return _joined(found)


def grouped(environments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Environments by rank, as ``differences`` takes them: equal ones once, with their ranks."""
    firsts = [rank for rank, environment in enumerate(environments) if environments.index(environment) == rank]
    return [
        {
            "ranks": [rank for rank, other in enumerate(environments) if other == environments[first]],
            **environments[first],
        }
        for first in firsts
    ]


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """What is different about the workers of two attempts, in a line; nothing if they are alike.

    Args:
        before, now: The workers of each attempt, as ``grouped`` returns them.
    """
    of_both = [[_told(group) for group in groups] for groups in (before, now)]
    found = []
    for label in dict.fromkeys(label for groups in of_both for group in groups for label in group):
        was, has_become = ({group[label] for group in groups if label in group} for groups in of_both)
        if was and has_become and was != has_become:
            texts = (listed(sorted(map(_short, values))) for values in (was, has_become))
            found.append(f"{label} {' -> '.join(texts)}")
    return _joined(found)


def unlike(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The groups of workers of now that are unlike those before, in what the groups of now differ in.

    Args:
        before, now: The workers of each attempt, as ``grouped`` returns them.
    """
    told = [_told(group) for group in now]
    labels = {label for group in told for label in group}
    common = {label for label in labels if len({group[label] for group in told if label in group}) == 1}
    was = [_told(group) for group in before]
    return [
        group
        for group, of_group in zip(now, told)
        if any(
            of_group[label] not in values
            for label in of_group.keys() - common
            if (values := {of_before[label] for of_before in was if label in of_before})
        )
    ]


def _told(plain: Mapping[str, Any]) -> dict[str, str]:
    """The values to compare, by what they are called in a line."""
    modules = {f"{_CODE}{name}": digest for name, digest in plain.get("code", {}).items()}
    values = {name: value for name, value in plain.items() if name not in ("ranks", "code")}
    return {_LABELS.get(name, name): value for name, value in values.items()} | modules


def _joined(found: Sequence[str]) -> str:
    """Differences in a line, of which many may be in the code."""
    of_code = [each for each in found if each.startswith(_CODE)]
    more = [f"code of {len(of_code) - 1} more modules"] if len(of_code) > 1 else []
    return "; ".join([*(each for each in found if not each.startswith(_CODE)), *of_code[:1], *more])


def _short(value: str) -> str:
    return value[:_DIGITS] if _DIGEST.fullmatch(value) else value


def _places(nodes: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """Where some workers are, by node."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    return [f"node {node} (worker{'s' * (len(there) > 1)} {listed(there)})" for node, there in by_node.items()]


def _cpu_vendor() -> str:
    """Who has made the CPU, as Linux tells it of x86; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
