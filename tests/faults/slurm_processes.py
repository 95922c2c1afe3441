"""The processes on the nodes of a real Slurm, of which each has a process table of its own."""

import subprocess
from contextlib import suppress
from pathlib import Path

from tests.faults.slurm import Slurm


def processes(slurm: Slurm, node: str) -> list[str]:
    """The command lines of the processes of a node that are neither Slurm's nor of what holds the node."""
    listed = subprocess.run(
        slurm.nodes[node].command(["ps", "-eo", "args"], slurm.folder), capture_output=True, text=True, check=True
    )
    own = ("COMMAND", "sleep infinity", "ps -eo", "munged", "slurmd", "/usr/sbin/slurmd", "sh -c echo ready")
    return [line for line in listed.stdout.splitlines() if not line.startswith(own) and "munged" not in line]


def wait_until_none_is_left(slurm: Slurm) -> None:
    """Wait until no job has a process on any node."""
    left: list[str] = []

    def is_none_left() -> bool:
        left[:] = [line for node in slurm.nodes for line in processes(slurm, node)]
        return not left

    slurm.wait_until(is_none_left, about=lambda: "\n".join(left))


def files_with(text: str) -> list[str]:
    """The command lines and environments of this machine's processes that have a text."""
    found = []
    for path in [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]:
        with suppress(OSError):  # ended meanwhile
            found += [str(path)] * (text.encode() in path.read_bytes())
    return found
