"""The record of an attempt in ``environment.json``: what the bits of the run depend on besides its description."""

import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from cluster.capacity import num_cores
from cluster.run.run_directory import RunDirectory
from launcher.code.user_code import UserCode
from launcher.planning.built_index import digests_of
from launcher.planning.plan import DryRunResult, Plan

_PACKAGES = (
    "launcher", "torch", "torchvision", "torchmetrics", "ray", "numpy", "fsspec", "omegaconf", "wandb", "safetensors",
)  # fmt: skip
"""Packages whose versions are recorded."""


def environment_with_attempt(run: RunDirectory, plan: Plan, code: UserCode) -> dict[str, Any]:
    """Return the run's environment document with an entry for the attempt that this process begins."""
    environment = run.read_environment()
    attempt = {
        "time": round(time.time(), 3),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "hardware": {"machine": platform.machine(), "cores": num_cores(), "gpus_per_worker": plan.gpus},
        "workers": plan.num_workers,
        "indexes": digests_of(plan.indexes),
        # With a bundle: the repository in which it was packed, not the folder in which it is unpacked.
        "git": git_state() if code.sha256 is None else code.git,
        "command": " ".join(map(os.path.basename, sys.argv[:2])),
    }
    return {
        "data_fingerprint": plan.data_fingerprint,
        "init_from": init_from_record(plan) or environment.get("init_from"),
        "working_directory": os.getcwd() if code.sha256 is None else code.submitted_from,
        "import_paths": list(code.folders),
        "code": code.sha256,
        "code_directory": code.directory,
        "attempts": [*environment.get("attempts", []), attempt],
    }


def recorded_indexes(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of the indexes that a run has, by the ids of their sources."""
    attempts = environment.get("attempts", [])
    return dict(attempts[-1].get("indexes", {})) if attempts else {}


def init_from_record(plan: Plan | DryRunResult) -> dict[str, str] | None:
    """Return URL and digest of the weights that a run begins with; None: it begins with weights of its own."""
    return None if plan.init_from is None else {"url": plan.init_from.url, "sha256": plan.init_from.sha256}


def git_state() -> dict[str, Any] | None:
    """Return the git revision of the working directory and the digest of its uncommitted changes.

    Returns:
        ``revision`` and ``changes_sha256``, which is None without changes. None: git is not installed, or the working
        directory is in no repository.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout

    try:
        revision = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision, "changes_sha256": hashlib.sha256(changes).hexdigest() if changes else None}
