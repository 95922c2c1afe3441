"""Which process is which, on hosts and in containers where names and numbers come again."""

import os
from pathlib import Path


def place() -> str | None:
    """Names the processes that can see each other: a boot of a machine, and a namespace on it; none but on Linux.

    None also where /proc is that of another namespace, whose numbers mean other processes.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; none if it has ended.

    Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]
