"""Runs with planned faults, and what they are held against."""

import functools
import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.run.run_directory import RunDirectory
from launcher.config.description import load
from tests.distributed.team_process import run_job
from tests.e2e.command import JOBS, Ended, rows
from tests.faults.injection import PLAN_VARIABLE
from tests.processes import descendants

_LINGERERS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/main.py")
"""Ray's own, by either name. Where a driver is killed with its Ray, they try for a minute to tell that they live."""

_CHANGES_NO_BIT = ("checkpoint.every_steps=", "tracking.", "workers.")

Bits = tuple[str, list[dict[str, Any]]]
"""What no fault may change: the digest of the whole state, and every row of metrics."""


def undisturbed(overrides: Sequence[str]) -> Bits:
    """The bits of ``jobs/digits.yaml``, trained once in a session by one process: no Ray, no agent, no driver."""
    return _undisturbed(tuple(override for override in overrides if not override.startswith(_CHANGES_NO_BIT)))


@functools.cache
def _undisturbed(overrides: tuple[str, ...]) -> Bits:
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as home:
        spec = replace(load(JOBS / "digits.yaml", overrides).spec, store=home)
        outcome = run_job(spec, world_size=1)
    return outcome.digest, outcome.rows


def bits(ended: Ended, run: Path) -> Bits:
    """The bits of a run that is complete."""
    assert ended.exit_code == 0, ended.stderr
    assert ended.document["status"] == "completed"
    return ended.document["state_sha256"], [json.loads(line) for line in rows(run).splitlines()]


def assert_nothing_was_lost(run: Path) -> None:
    """Every attempt went on from the newest checkpoint that was told of before it, or from a later one.

    A driver may be killed between a manifest and the event that tells of it.
    """
    newest = 0
    for event in RunDirectory(str(run)).events().read():
        if event["kind"] == "checkpoint":
            newest = event["step"]
        elif event["kind"] == "training":
            assert event["step"] >= newest, event


def processes_of(plan: Path) -> dict[int, str]:
    """The processes of commands with this plan that have not ended, by number, and their command lines.

    They have the plan in their environment, or, without Ray, were forked from this process's server.
    """
    named = f"{PLAN_VARIABLE}={plan}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if named in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has just ended, or is another user's
                continue
    own = descendants(os.getpid())
    servers = {each.pid for each in own if each.parent == os.getpid() and "multiprocessing.forkserver" in each.command}
    return found | {each.pid: each.command for each in own if each.parent in servers}


def wait_for_end_of(plan: Path, timeout_s: float) -> dict[int, str]:
    """Waits until nothing of a run is left; returns, and ends, what is left after that."""
    deadline = time.monotonic() + timeout_s
    while (left := _without_lingerers(processes_of(plan))) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in processes_of(plan):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def _without_lingerers(processes: dict[int, str]) -> dict[int, str]:
    return {pid: command for pid, command in processes.items() if not any(name in command for name in _LINGERERS)}
