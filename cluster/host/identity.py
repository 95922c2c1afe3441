"""Identity of processes on hosts and in containers, where host names and pids are reused."""

import os
from pathlib import Path


def place() -> str | None:
    """Returns a name for the set of processes that see each other: a boot of a machine and a pid namespace on it.

    None on other systems than Linux, and where /proc belongs to another namespace, whose pids mean other processes.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """Returns when a process was started, in clock ticks since boot; None if it has ended.

    Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]
