"""Cleans up after the test suite, however it ends, and reports how much memory it took.

The suite's first process starts the janitor and holds a pipe to it. When the pipe closes, because the suite is over or
its process was killed, the janitor ends every process that still bears the suite's mark, unmounts what is mounted in
the suite's folder and removes the folder. The mark is an environment variable, which all descendants inherit; the
folder is where they make their temporary files.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.processes import descendants
from tests.stores import remove_sockets_of_the_dead

MARK = "LAUNCHER_SUITE"
"""The environment variable that holds the suite's folder."""
_GRACE_S = 20.0
"""How long processes may take to end by themselves when the suite has."""
_KILL_LIMIT_S = 30.0
_SAMPLE_INTERVAL_S = 0.5
SUITE_FOLDERS = "/tmp/s-"
"""How the path of a suite's folder begins."""
LEFT = "the suite had left process"
"""How the line begins that tells of a process that the janitor had to end."""


class Janitor:
    """The janitor, as the suite's first process sees it."""

    def __init__(self) -> None:
        """Makes the suite's folder and marks this process and its descendants."""
        # A short path: Ray makes unix sockets below it, and the path of one has at most 107 characters.
        folder = tempfile.mkdtemp(prefix=Path(SUITE_FOLDERS).name, dir=Path(SUITE_FOLDERS).parent)
        os.environ |= {MARK: folder, "TMPDIR": folder, "RAY_TMPDIR": folder}
        tempfile.tempdir = None  # found again, from TMPDIR
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != MARK},
            cwd=Path(__file__).parents[1],
            text=True,
            start_new_session=True,  # out of reach of Ctrl-C
        )

    def finish(self) -> str:
        """Has everything cleaned up; what there was to tell, in lines."""
        report, _ = self._process.communicate("over\n")
        return report


def marked_processes(folder: str) -> dict[int, str]:
    """The processes of a suite that have not ended, and their command lines.

    Some servers overwrite their environment with a title; those name a file in the suite's folder.
    """
    mark, found = f"{MARK}={folder}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # it has just ended, or is another user's
                command = (entry / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
                if mark in (entry / "environ").read_bytes().split(b"\0") or f"{folder}/" in command:
                    found[int(entry.name)] = command
    return found


def _watch(pipe: int) -> int:
    """Waits for the end of the suite. Returns the largest fall of the machine's available memory meanwhile."""
    least = before = _available_bytes()
    while not select.select([pipe], [], [], _SAMPLE_INTERVAL_S)[0]:
        least = min(least, _available_bytes())
    return before - least


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _end_processes(folder: str) -> dict[int, str]:
    """Ends what is left of the suite; what should have ended by itself and did not."""
    # Without xdist, the suite's first process has helpers of multiprocessing's, which end with it.
    helpers = {each.pid for each in descendants(os.getppid()) if each.parent == os.getppid()}
    deadline = time.monotonic() + _GRACE_S
    while (left := marked_processes(folder)).keys() - helpers and time.monotonic() < deadline:
        time.sleep(0.1)
    ended = dict[int, str]()
    deadline = time.monotonic() + _KILL_LIMIT_S
    while left and time.monotonic() < deadline:  # they may have made others meanwhile
        ended |= left
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        left = marked_processes(folder)
    return {pid: command for pid, command in ended.items() if pid not in helpers}


def _remove(folder: str) -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed([mount for mount in mounts if mount.startswith(f"{folder}/")]):
        subprocess.run(["umount", "--lazy", mount], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    folder = sys.argv[1]
    peak_bytes = _watch(sys.stdin.fileno())
    ended = _end_processes(folder)
    _remove(folder)
    remove_sockets_of_the_dead()
    with suppress(BrokenPipeError):  # nobody is there to read it
        for pid, command in ended.items():
            print(f"{LEFT} {pid}: {command[:160]}")
        print(f"peak memory of the suite: {peak_bytes / 2**30:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
