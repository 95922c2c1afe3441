"""How steady the test suite is: ``python -m tests.steadiness --times 5 --load 3 [--tier slow]``.

Runs a tier again and again, on a quiet machine or beside processes that keep it busy, and prints a table: whether each
time passed, how long it took, which tests failed, what it left behind. ``--interrupt INT --after 60`` sends that signal
to the suite after so many seconds and looks at what is left alone. ``--logs DIR`` keeps what pytest says. The exit
status is 1 if a test failed or anything was left.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.janitor import LEFT, SUITE_FOLDERS

CHECKOUT = Path(__file__).parents[1]
_MARK = "LAUNCHER_STEADINESS"
_HOG_BYTES = 256 * 2**20
_END_LIMIT_S = 120.0
"""How long a suite that was interrupted may take to end."""


@dataclass(kw_only=True)
class Time:
    """One time that the suite was run."""

    seconds: float
    exit_code: int
    num_tests: int = 0
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def run_once(tier: str, interrupt: signal.Signals | None, after_s: float, log: Path | None) -> Time:
    """Runs a tier; to its end, unless it is interrupted. ``log``: the file to keep what pytest says in."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    before = traces(mark)
    with tempfile.TemporaryDirectory(prefix="steadiness-") as folder:
        report, began = Path(folder, "report.xml"), time.monotonic()
        log = log or Path(folder, "log")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-m", tier]
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env={**os.environ, _MARK: mark},
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
            )
        if interrupt is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(after_s)
            process.send_signal(interrupt)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_LIMIT_S)
            process.kill()  # if it has not ended
        process.wait()
        seconds = time.monotonic() - began
        tests = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
        lines = log.read_text(errors="replace").splitlines()
    failed = [test for test in tests if test.find("failure") is not None or test.find("error") is not None]
    names = sorted({f"{test.get('classname')}::{test.get('name')}" for test in failed})
    if not names and process.returncode and interrupt is None:
        names = [f"pytest itself: {' | '.join(lines[-5:])}"]
    deadline = time.monotonic() + _END_LIMIT_S
    while (left := traces(mark) - before) and time.monotonic() < deadline:  # the janitor may still be at it
        time.sleep(0.5)
    if interrupt is None:
        left |= {line for line in lines if line.startswith(LEFT)}
    return Time(seconds=seconds, exit_code=process.returncode, num_tests=len(tests), failed=names, left=sorted(left))


def traces(mark: str) -> set[str]:
    """What a suite could leave: marked processes, mounts, namespaces, sockets, files in folders that all may write."""
    found = set[str]()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has just ended, or is another user's
            found.add(f"namespace {os.readlink(entry / 'ns/net')}")
            command = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
            marked = f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if marked or SUITE_FOLDERS in command:
                found.add(f"process {entry.name}: {command[:120]}")
    found |= {f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines()}
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    found |= {f"socket {words[7]}" for words in sockets if len(words) > 7 and words[7].startswith("/tmp")}
    for folder in (Path("/tmp"), Path("/dev/shm"), Path("/var/run/netns")):
        with suppress(FileNotFoundError):
            found |= {f"file {path}" for path in folder.iterdir()}
    return found


@contextmanager
def busy(load: int) -> Iterator[None]:
    """A machine with other work: so many processes, every third of which is a hog of memory bandwidth."""
    works = [_hog if number % 3 == 2 else _loop for number in range(load)]
    processes = [multiprocessing.get_context("spawn").Process(target=work, daemon=True) for work in works]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _loop() -> None:
    for _ in itertools.count():
        pass


def _hog() -> None:
    source, target = bytearray(_HOG_BYTES), bytearray(_HOG_BYTES)
    while True:
        target[:] = source


def table(times: list[Time]) -> str:
    lines = [f"{'time':>4} {'seconds':>8} {'tests':>6} {'failed':>6} {'left':>5}"]
    lines += [
        f"{number:4} {each.seconds:8.1f} {each.num_tests:6} {len(each.failed):6} {len(each.left):5}"
        for number, each in enumerate(times, 1)
    ]
    failures = Counter(name for each in times for name in each.failed)
    lines += [f"failed {count} of {len(times)} times: {name}" for name, count in failures.most_common()]
    lines += [f"left behind: {name}" for each in times for name in each.left]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--load", type=int, default=0, help="processes that keep the machine busy meanwhile")
    parser.add_argument("--tier", choices=["default", "slow"], default="default")
    parser.add_argument("--interrupt", choices=["INT", "TERM", "KILL"], help="the signal that ends the suite")
    parser.add_argument("--after", type=float, default=60.0, help="seconds until then")
    parser.add_argument("--logs", type=Path, help="the folder to keep what pytest says in, a file for each time")
    arguments = parser.parse_args()
    interrupt = signal.Signals[f"SIG{arguments.interrupt}"] if arguments.interrupt else None
    tier = "slow" if arguments.tier == "slow" else "not slow and not gpu"
    times: list[Time] = []
    with busy(arguments.load), contextlib.suppress(KeyboardInterrupt):
        if arguments.logs is not None:
            arguments.logs.mkdir(parents=True, exist_ok=True)
        for number in range(1, arguments.times + 1):
            log = arguments.logs and arguments.logs / f"{number}.log"
            times.append(run_once(tier, interrupt, arguments.after, log))
            print(table(times), flush=True)
    is_good = len(times) == arguments.times and not any(each.left or (each.failed and not interrupt) for each in times)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
