"""Deaths of every kind, made for real: each is told by its cause, survived if it can be, and the bits stay the same."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, events, launcher
from tests.faults.injection import Fault, fired, release
from tests.faults.planned import bits, undisturbed

pytestmark = pytest.mark.slow

SHORT = ("train.epochs=2", "checkpoint.every_steps=5", "tracking.mode=disabled")
MORTAL = """\
import ctypes
import os
import signal
from pathlib import Path

import jobs.data
import extra


def crash(_):
    ctypes.string_at(0)


def killed(_):
    os.kill(os.getpid(), signal.SIGTERM)


def refused(_):
    bytearray(2**60)


def taken(cgroup):
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    hog = []
    while True:
        hog.append(b"x" * 2**24)


FAULTS = {18: crash, 603: killed, 1223: refused, 1323: taken}


class Mortal:
    \"\"\"The digits; some samples, in this order, end the process that reads them, each once in a run.\"\"\"

    def __init__(self, flags, cgroup, **of_digits):
        self.digits = jobs.data.digits(**of_digits)
        self.flags, self.cgroup = Path(flags), cgroup

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, number):
        fault = FAULTS.get(number)
        if fault is not None and (self.cgroup or fault is not taken) and not (self.flags / fault.__name__).exists():
            (self.flags / fault.__name__).touch()
            fault(self.cgroup)
        return self.digits[number]
"""


@contextmanager
def small_memory() -> Iterator[Path | None]:
    """A cgroup that holds little memory, where one can be made; who joins it and wants more is killed."""
    own = [line.rstrip("\n").split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    v1 = [Path("/sys/fs/cgroup/memory" + path) for _, controllers, path in own if controllers == "memory"]
    group = (v1[0] if v1 else Path("/sys/fs/cgroup")) / f"launcher-test-{time.time_ns()}"
    limits = {"memory.limit_in_bytes": 2**28} if v1 else {"memory.max": 2**28, "memory.swap.max": 0}
    try:
        group.mkdir()
        for name, limit in limits.items():
            (group / name).write_text(str(limit))
    except OSError:  # only root may, and not in every container
        yield None
    else:
        try:
            yield group
        finally:
            group.rmdir()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "mortal.py").write_text(MORTAL)
    (tmp_path / "extra.py").write_text("")
    (tmp_path / "digits.yaml").write_text((JOBS / "digits.yaml").read_text())
    return tmp_path


def overrides(flags: Path, cgroup: Path | None) -> tuple[str, ...]:
    data = {"_target_": "mortal.Mortal", "flags": flags, "cgroup": cgroup or "null"}
    return (*SHORT, *(f"data.train.{name}={value}" for name, value in data.items()), "--json")


def test_deaths_of_many_kinds_in_one_run(home: Path) -> None:
    with small_memory() as cgroup:
        ended = launcher("run", "digits.yaml", *overrides(home, cgroup), cwd=home)

    run = home / "runs/digits"
    assert bits(ended, run) == undisturbed(SHORT)

    told = [(lost["cause"], lost["rank"], lost["reason"]) for lost in events(run, "worker_lost")]
    crash, killed, refused, *taken = told
    assert crash[:2] == ("crash", 0)
    assert crash[2].startswith('crashed with SIGSEGV, File "')
    assert killed == ("killed", 1, "killed by SIGTERM")
    assert refused == ("out_of_memory", 0, "MemoryError")
    log_tails = [lost.get("log_tail", "") for lost in events(run, "worker_lost")]
    assert re.search(r'mortal.py", line \d+ in crash', log_tails[0])
    assert [bool(tail) for tail in log_tails] == [True, True, False] + [True] * len(taken)

    assert ended.document["attempts"] == 1 + len(told)
    assert ended.document["failures"] == {"machine": 1 + len(taken), "preemption": 0, "code": 2}
    assert (ended.document["failure"]["cause"], ended.document["failure"]["rank"]) == told[-1][:2]
    if cgroup is None:
        pytest.skip("all else passed, but no cgroup can be made here, and so the kernel killed nobody")
    assert taken == [("out_of_memory", 1, "killed by the kernel for want of memory (SIGKILL)")]


def test_a_module_that_a_worker_does_not_find(home: Path, make_plan) -> None:
    """The plan has found it; it goes while the workers start."""
    run = home / "runs/digits"
    faults = make_plan(*(Fault(kind="hold", doing="start", rank=rank) for rank in range(2)))
    running = Running(["run", "digits.yaml", *overrides(home, None)], home)
    running.wait_until(lambda: len(fired(faults)) == 2)
    (home / "extra.py").unlink()
    for rank in range(2):
        release(faults, rank)
    ended = running.wait()

    assert ended.exit_code == 5
    assert ended.document["error"].startswith("worker ")
    assert "data.train._target_ 'mortal.Mortal' imports 'extra', which is not installed" in ended.document["error"]
    assert "give every node the same modules, files and versions" in ended.document["error"]
    assert len(events(run, "attempt_started")) == 1, "trying again is of no use"
    failure = launcher("status", run, "--json", cwd=home).document["failure"]
    (lost,) = events(run, "worker_lost")
    assert failure["cause"] == lost["cause"] == "environment"
    assert failure["node"] == lost["node"] != ""
    assert failure["message"] == lost["reason"]


def test_a_lost_gpu_is_left_to_other_agents(home: Path, make_plan) -> None:
    """The first one in the middle of a step, the second one before a worker has begun its own."""
    faults = make_plan(
        Fault(kind="ecc", doing="forward", step=12, rank=1), Fault(kind="ecc", doing="data", step=10, rank=0, follows=0)
    )
    ended = launcher("run", "digits.yaml", *SHORT, "--json", cwd=home)

    run = home / "runs/digits"
    assert bits(ended, run) == undisturbed(SHORT)
    assert fired(faults).keys() == {0, 1}
    told = [(lost["cause"], lost["rank"]) for lost in events(run, "worker_lost")]
    assert told == [("gpu_lost", 1), ("gpu_lost", 0)]
    assert ended.document["failures"] == {"machine": 2, "preemption": 0, "code": 0}
    pids = [{worker["pid"] for worker in started["workers"]} for started in events(run, "attempt_started")]
    assert len(set.union(*pids)) == sum(map(len, pids)), "other agents run each attempt"
