"""The environment of a worker: versions, hardware, user code and data, which affect the bits of a run.

Workers compare their environments before they train; the driver compares those of two attempts. The driver does not
import torch, so only ``make_environment`` imports it here. ``cluster/versions.py`` holds the versions that workers must
share to understand each other.
"""

import ctypes
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, listed, one_line
from cluster.host.import_paths import own_modules
from cluster.process.forked_environment import environment_at_import
from cluster.versions import file_digest, versions

if TYPE_CHECKING:
    from jobs.components.build import Components

_NONE = "none"
_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "CUBLAS_EMULATE_SINGLE_PRECISION",
    "CUBLAS_EMULATE_DOUBLE_PRECISION", "CUBLAS_EMULATION_STRATEGY", "CUBLAS_FIXEDPOINT_EMULATION_MANTISSA_BIT_COUNT",
    "DISABLE_ADDMM_CUDA_LT", "TORCH_CUDNN_USE_HEURISTIC_MODE_B", "TORCH_CUDNN_V8_API_DISABLED",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip
"""Environment variables that make libraries choose other kernels."""
_VARIABLES_AT_IMPORT = (
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINALG_PREFER_CUSOLVER",
    "ONEDNN_DEFAULT_FPMATH_MODE",
)  # fmt: skip
"""Such variables that torch reads while it is imported, which the fork server did."""
_OF_COMPILER = "TORCHINDUCTOR_"
"""How the variables of torch.compile begin, which torch reads while it is imported too."""
_CHANGE_NO_KERNEL = ("_DIR", "_PATH", "_LOGPATH", "_THREADS", "_CACHE", "_CACHE_DEFAULT")
"""How those of them end that may differ between hosts."""
_LABELS = {
    "python": "Python", "cuda": "CUDA", "gpu": "GPU", "cpu": "CPU",
}  # fmt: skip
"""How texts name a field, if not by its own name."""
_COMPILER_WAIT_S = 60.0
_CODE = "code of "
_DIGEST = re.compile("[0-9a-f]{64}")
_DIGITS = 12
"""How many digits of a digest a text shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """All that may change a bit of a worker's results, as text."""

    python: str
    """The major and minor version."""
    torch: str
    """The version; MKL, oneDNN and NCCL come with torch."""
    torchvision: str
    """The version."""
    numpy: str
    """The version."""
    launcher: str
    """The digest of the launcher's own packages."""
    cuda: str
    """The versions of CUDA, cuDNN and cuBLAS, and of NCCL if it adds up; ``none`` without a GPU."""
    gpu: str
    """The model of the GPU, or of its part, and the number of its multiprocessors; or ``none``."""
    cpu: str
    """The architecture, the vendor, by which MKL chooses kernels too, and the vector instructions that torch uses."""
    compiler: str
    """The compiler of the kernels that torch.compile writes, or ``none``."""
    variables: str
    """The environment variables that affect kernels and are set, or ``none``."""
    code: tuple[tuple[str, str], ...]
    """The name and the file's digest of each user module that is imported."""
    data: str
    """The data fingerprint."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, and the digests of the code by module."""
        return asdict(self) | {"code": dict(self.code)}


def make_environment(import_paths: Sequence[str], components: "Components") -> Environment:
    """Returns the environment of this process, which has built its components and not trained yet.

    Args:
        import_paths: Folders of user modules.
        components: What this process has built.
    """
    import numpy as np
    import torch
    import torchvision

    train, on_gpu = components.spec.train, components.device.type == "cuda"
    cpu = (platform.machine(), _cpu_vendor(), torch.backends.cpu.get_cpu_capability())
    return Environment(
        **versions(),
        torchvision=str(torchvision.__version__),
        numpy=np.__version__,
        cuda=_libraries_of_gpus(has_nccl_sums=not train.exact) if on_gpu else _NONE,
        gpu=_name_of_gpu(torch.cuda.get_device_properties(components.device)) if on_gpu else _NONE,
        cpu=" ".join(filter(None, cpu)),
        compiler=_compiler(on_gpu=on_gpu) if train.compile else _NONE,
        variables=_variables(os.environ, environment_at_import(), compiles=train.compile),
        code=tuple(sorted(code_digests(import_paths).items())),
        data=components.data_fingerprint(),
    )


def _variables(now: Mapping[str, str], at_import: Mapping[str, str], *, compiles: bool) -> str:
    """Returns the variables that affect kernels, each with the value that is in effect.

    Args:
        now: The environment of this process.
        at_import: That with which torch was imported.
        compiles: The model is compiled.
    """
    of_compiler = [
        name for name in sorted(at_import) if name.startswith(_OF_COMPILER) and not name.endswith(_CHANGE_NO_KERNEL)
    ]
    values = {name: now[name] for name in _VARIABLES if name in now}
    values |= {
        name: at_import[name]
        for name in (*_VARIABLES_AT_IMPORT, *(of_compiler if compiles else ()))
        if name in at_import
    }
    return " ".join(f"{name}={value}" for name, value in values.items()) or _NONE


def _libraries_of_gpus(*, has_nccl_sums: bool) -> str:
    import torch

    named = [f"{torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}", f"cuBLAS {_cublas_version()}"]
    if has_nccl_sums:
        named.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return ", ".join(named)


def _cublas_version() -> str:
    """Returns the version of the library that this process has loaded; a host may have several, unlike of cuDNN's."""
    import torch

    major = str(torch.version.cuda).partition(".")[0]
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError:  # a build of torch that contains it
        return "of torch"
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return str(library.cublasLtGetVersion())


def _name_of_gpu(properties: Any) -> str:
    """Returns the name, to which CUDA adds that of a MIG slice, and what libraries choose kernels by beside it."""
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors"


def _compiler(*, on_gpu: bool) -> str:
    """Returns the version of the compiler of torch.compile; torch does not fix it.

    Raises:
        ClusterError: This host has no compiler that answers.
    """
    if on_gpu:
        import triton

        return f"Triton {triton.__version__}"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        command = [*shlex.split(get_cpp_compiler()), "--version"]
        told = subprocess.run(command, capture_output=True, check=True, text=True, timeout=_COMPILER_WAIT_S)  # noqa: S603
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: torch finds none
        raise ClusterError(
            f"train.compile: {one_line(error)}; install a C++ compiler on every node, or write train.compile: false",
            cause="environment",
            step=0,
        ) from error
    return told.stdout.partition("\n")[0]


def code_digests(import_paths: Sequence[str]) -> dict[str, str]:
    """Returns the digests of the user modules that this process has imported, by name.

    Their folders may differ between hosts. Installed modules are left out, because they have versions; so are the
    launcher's own, which in a checkout may be below the import paths too.
    """
    return {name: file_digest(file) for name, file in own_modules(import_paths)}


def differences(
    nodes: Sequence[str], environments: Sequence[Mapping[str, Any]], planned_data: str | None = None
) -> str:
    """Returns what differs between workers and where, in one line; empty if nothing differs.

    A module is compared between the workers that have imported it: one that prepares missing data, for example, is
    imported only where the data is missing.

    Args:
        nodes: The address of each worker's node, by rank.
        environments: The environment of each worker, by rank: ``Environment.as_dict``, or some of its keys.
        planned_data: The data fingerprint that the plan found on the driver's host; None: do not compare it.
    """
    values_by_rank = [_values_by_label(environment) for environment in environments]
    found = []
    for label in dict.fromkeys(label for values in values_by_rank for label in values):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, values in enumerate(values_by_rank):
            if label in values:
                ranks_by_value.setdefault(values[label], []).append(rank)
        places = {value: _places(nodes, ranks) for value, ranks in ranks_by_value.items()}
        if label == "data" and planned_data is not None:
            places.setdefault(planned_data, []).append("the driver's host")
        if len(places) > 1:
            where = [f"{_short(value)} on {listed(of_value)}" for value, of_value in places.items()]
            found.append(f"{label} {listed(where)}")
    return _join(found)


def grouped(environments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns groups of workers with equal environments, each with its ``ranks``.

    Args:
        environments: The environment of each worker, by rank.
    """
    firsts = [rank for rank, environment in enumerate(environments) if environments.index(environment) == rank]
    return [
        {
            "ranks": [rank for rank, other in enumerate(environments) if other == environments[first]],
            **environments[first],
        }
        for first in firsts
    ]


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """Returns what differs between the workers of two attempts, in one line; empty if nothing differs.

    Args:
        before: The workers of the earlier attempt, as ``grouped`` returns them.
        now: The workers of the later attempt.
    """
    of_both = [[_values_by_label(group) for group in groups] for groups in (before, now)]
    found = []
    for label in dict.fromkeys(label for groups in of_both for group in groups for label in group):
        was, has_become = ({group[label] for group in groups if label in group} for groups in of_both)
        if was and has_become and was != has_become:
            texts = (listed(sorted(map(_short, values))) for values in (was, has_become))
            found.append(f"{label} {' -> '.join(texts)}")
    return _join(found)


def unlike(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the groups of ``now`` with values that no group of ``before`` has, where the groups of ``now`` differ.

    Args:
        before: The workers of the earlier attempt, as ``grouped`` returns them.
        now: The workers of the later attempt.
    """
    values_now = [_values_by_label(group) for group in now]
    labels = {label for values in values_now for label in values}
    common = {label for label in labels if len({values[label] for values in values_now if label in values}) == 1}
    values_before = [_values_by_label(group) for group in before]
    return [
        group
        for group, values in zip(now, values_now)
        if any(
            values[label] not in known
            for label in values.keys() - common
            if (known := {earlier[label] for earlier in values_before if label in earlier})
        )
    ]


def _values_by_label(environment: Mapping[str, Any]) -> dict[str, str]:
    """Returns the values to compare, by their names in texts."""
    modules = {f"{_CODE}{name}": digest for name, digest in environment.get("code", {}).items()}
    values = {name: value for name, value in environment.items() if name not in ("ranks", "code")}
    return {_LABELS.get(name, name): value for name, value in values.items()} | modules


def _join(found: Sequence[str]) -> str:
    """Returns differences in one line; of several that are in the code, it spells out the first and counts the rest."""
    of_code = [each for each in found if each.startswith(_CODE)]
    more = [f"code of {len(of_code) - 1} more modules"] if len(of_code) > 1 else []
    return "; ".join([*(each for each in found if not each.startswith(_CODE)), *of_code[:1], *more])


def _short(value: str) -> str:
    return value[:_DIGITS] if _DIGEST.fullmatch(value) else value


def _places(nodes: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """Returns texts that name each node and its workers."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    return [f"node {node} (worker{'s' * (len(there) > 1)} {listed(there)})" for node, there in by_node.items()]


def _cpu_vendor() -> str:
    """Returns the vendor of an x86 CPU on Linux; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
