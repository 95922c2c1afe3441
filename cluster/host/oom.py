"""Who was killed for want of memory: what the kernel counts, and whom it takes first. Linux alone tells."""

import time
from contextlib import suppress
from pathlib import Path

_LATELY_S = 10.0
_CGROUPS = Path("/sys/fs/cgroup")
_HOST_COUNTS = Path("/proc/vmstat")
_COUNT = "oom_kill "


def be_taken_first() -> None:
    """Makes this process the kernel's first choice when memory runs out.

    Ray marks its workers so. An agent among them would die in place of the training process that took the memory, and
    nobody could tell of what.
    """
    with suppress(OSError):  # no Linux, or a host that forbids it: then it chooses as it likes
        Path("/proc/self/oom_score_adj").write_text("1000")


class OomKills:
    """How many processes the kernel has killed for want of memory, of late, in the cgroup of one or on its host."""

    def __init__(self, pid: int) -> None:
        """The process must not have been waited for."""
        self._counts = _counts_of(pid)
        self._before = self._newest = self._count()
        self._read_at = time.monotonic()

    def look(self) -> None:
        """To be called now and then, so that what is long past is no evidence."""
        if time.monotonic() - self._read_at > _LATELY_S:
            self._before, self._newest = self._newest, self._count()
            self._read_at = time.monotonic()

    def any_lately(self) -> bool:
        """Whether there was one since the last look but one."""
        return self._count() > self._before

    def _count(self) -> int:
        return _count_in(self._counts) or 0


def _counts_of(pid: int) -> Path:
    """The file that tells of the process's cgroup (v2), or of the whole host where none does."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or it has just ended
        lines = []
    # In a container the path may be the host's, and what is mounted the container's own.
    groups = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    files = [_CGROUPS / group / "memory.events" for group in [*groups, ""]]
    return next((file for file in files if _count_in(file) is not None), _HOST_COUNTS)


def _count_in(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.removeprefix(_COUNT)) for line in lines if line.startswith(_COUNT)), None)
