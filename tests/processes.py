"""The processes of this machine, as Linux tells of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A process that has not ended, or whose end nobody has asked for yet.

    Attributes:
        parent: The number of its parent.
        command: Its command line; empty when it has ended.
    """

    pid: int
    parent: int
    command: str


def descendants(ancestor: int) -> list[Process]:
    """Those processes, not yet ended, that descend from one."""
    processes = _processes()
    return [process for process in processes.values() if process.command and _descends(process, ancestor, processes)]


def _descends(process: Process, ancestor: int, processes: dict[int, Process]) -> bool:
    parent = processes.get(process.parent)
    return process.parent == ancestor or (parent is not None and _descends(parent, ancestor, processes))


def _processes() -> dict[int, Process]:
    processes = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            command = (entry / "cmdline").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        processes[int(entry.name)] = Process(int(entry.name), int(parent), command)
    return processes


def state(pid: int) -> str:
    """What a process does, such as ``T (stopped)``; nothing if it has ended, even if nobody has asked for its end."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (found,) = (line.partition("\t")[2] for line in lines if line.startswith("State:"))
        return "" if found.startswith(("Z", "X")) else found
    return ""


def wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Returns when something has happened in other processes.

    Raises:
        AssertionError: It has not in time.
    """
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, f"has not happened within {limit_s:.0f} s"
        time.sleep(0.01)


def memory(pid: int) -> Iterator[bytes]:
    """What a process of this user has written to its memory, stretch by stretch."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            stretch, access = line.split()[:2]
            if access.startswith("rw"):
                start, end = (int(address, 16) for address in stretch.split("-"))
                file.seek(start)
                with suppress(OSError):  # of a device
                    yield file.read(end - start)
