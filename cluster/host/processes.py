"""Processes of this host."""

from pathlib import Path


def state_of(pid: int | None) -> str:
    """Return the state of a process as Linux reports it, such as ``State:  T (stopped)``; empty if there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # not Linux, or it has just ended
        return ""
    return next((line for line in lines if line.startswith("State")), "")
