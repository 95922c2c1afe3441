"""The kernel's out-of-memory killer: how often it killed, and which process it takes first. Linux only."""

import time
from contextlib import suppress
from pathlib import Path

_LATELY_S = 10.0
_CGROUPS = Path("/sys/fs/cgroup")
_HOST_COUNTS = Path("/proc/vmstat")
_COUNT_PREFIX = "oom_kill "


def be_taken_first() -> None:
    """Makes this process the kernel's first choice when memory runs out.

    Ray does this to its workers. An agent, which is such a worker, would otherwise die in place of the training process
    that took the memory, and nobody could report the cause.
    """
    with suppress(OSError):  # not Linux, or not allowed: keep the kernel's choice
        Path("/proc/self/oom_score_adj").write_text("1000")


class OomKills:
    """Detects recent out-of-memory kills in a process's cgroup or, where there is none, on its host."""

    def __init__(self, pid: int) -> None:
        """The process must not have been waited for yet."""
        self._counter_file = _find_counter_file(pid)
        self._before = self._newest = self._count()
        self._read_at = time.monotonic()

    def look(self) -> None:
        """Reads the count if it is due. Call it regularly, so that old kills do not count as evidence."""
        if time.monotonic() - self._read_at > _LATELY_S:
            self._before, self._newest = self._newest, self._count()
            self._read_at = time.monotonic()

    def any_lately(self) -> bool:
        """Returns whether there was a kill since the last reading but one."""
        return self._count() > self._before

    def _count(self) -> int:
        return _read_count(self._counter_file) or 0


def _find_counter_file(pid: int) -> Path:
    """Returns the file with the counter of the process's cgroup (v2), or of the whole host if there is none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:  # not Linux, or the process has just ended
        lines = []
    # In a container the path may be the host's, while the mounted file system is the container's own.
    groups = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    files = [_CGROUPS / group / "memory.events" for group in [*groups, ""]]
    return next((file for file in files if _read_count(file) is not None), _HOST_COUNTS)


def _read_count(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.removeprefix(_COUNT_PREFIX)) for line in lines if line.startswith(_COUNT_PREFIX)), None)
