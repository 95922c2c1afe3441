"""Fault injection: which training process fails, how, and at which moment of its work.

A plan is a JSON file of faults. Commands that run with ``environment(plan)`` make their training processes call
``faulty_activity`` through the product's one hook for drills, ``ACTIVITY_VARIABLE``. A fault fires at a mark of the
activity, once in the life of a run, however many processes pass that mark; just before it fires, the process writes a
proof file beside the plan. This module knows marks and signals, and no job. The modules that training processes import
must stay cheap, so it imports nothing of the other tests.
"""

import json
import math
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.process.activity import Activity
from cluster.process.messages import DOING, Doing
from cluster.process.training_process import ACTIVITY_VARIABLE

PLAN_VARIABLE = "LAUNCHER_FAULTS"
"""The environment variable that holds the path of the plan."""
EXIT_CODE = 3
"""The exit code of a process that the fault ``exit`` ends."""

ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"
"""What torch says of a GPU whose memory fails."""

Kind = Literal["kill", "stop", "hang", "hold", "raise", "ecc", "exit", "note"]
Victim = Literal["training", "agent", "fork_server", "loader"]

_LOOP_INTERVAL_S = 0.05
_PEER = struct.Struct("3i")  # pid, uid, gid


class InjectedFault(Exception):  # noqa: N818  # it is none of ours: it stands for what the user's code may raise
    """What the fault ``raise`` raises: no code that looks for real bugs should know it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that goes wrong, once."""

    kind: Kind
    """``kill`` and ``stop`` send SIGKILL and SIGSTOP; ``hang`` loops without end, ``hold`` until ``release``; ``raise``
    raises an ``InjectedFault``, ``ecc`` what torch raises when the GPU's memory fails; ``exit`` ends the process with
    ``EXIT_CODE``; ``note`` only leaves its proof, for a test that waits for the moment to do something to another
    process."""
    doing: str
    """The mark it happens at, one of ``DOING``; ``start`` is a process's first moment."""
    step: int | None = None
    """The steps completed by then; none: any."""
    rank: int | None = None
    """The worker; none: the one that comes first."""
    after_s: float = 0.0
    """Seconds from the mark, to hit the midst of what it marks; the work goes on meanwhile."""
    victim: Victim = "training"
    """The process that gets the signal: the one that passes the mark, its agent, the server it was forked from, or one
    that loads data for it; at a mark at which none does, nothing happens."""
    follows: int | None = None
    """The number of the fault in the plan that must have happened before, to hit the recovery from it."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.victim not in get_args(Victim) or self.doing not in DOING:
            raise ValueError(f"no such fault: {self}; the kinds are {get_args(Kind)}, the marks {DOING}")
        if not 0 <= self.after_s < math.inf:
            raise ValueError(f"after_s must be finite and at least 0, got {self.after_s}")
        if self.victim == "agent" and self.kind not in ("kill", "stop"):
            raise ValueError(f"an agent gets signals alone, not {self.kind!r}")
        if self.victim == "fork_server" and self.kind != "kill":
            raise ValueError(f"a fork server is killed, not {self.kind!r}")
        if self.victim == "loader" and (self.kind != "kill" or self.after_s):
            raise ValueError(f"a loader is killed at the mark, not {self.kind!r} {self.after_s} s later")
        if self.after_s and self.kind in ("hang", "hold", "raise", "ecc"):
            raise ValueError(f"{self.kind!r} happens to the thread that passes the mark, so not {self.after_s} s later")


def write_plan(faults: Sequence[Fault], path: Path) -> None:
    """Writes a plan; the number of a fault is its place in it."""
    path.write_text(json.dumps([asdict(fault) for fault in faults], indent=1) + "\n")


def read_plan(path: Path) -> list[Fault]:
    return [Fault(**fault) for fault in json.loads(path.read_text())]


def environment(plan: Path) -> dict[str, str]:
    """Return the environment variables with which a command's training processes follow a plan.

    They must be able to import this module: ``PYTHONPATH`` holds the checkout, on each host and where Ray is started.
    """
    return {ACTIVITY_VARIABLE: f"{__name__}:{faulty_activity.__name__}", PLAN_VARIABLE: str(plan)}


def faulty_activity(connection: Connection, rank: int, attempt: int) -> "FaultyActivity":
    """Make the activity of a training process that follows the plan in its environment."""
    return FaultyActivity(connection, Path(os.environ[PLAN_VARIABLE]), rank, attempt)


def fired(path: Path) -> dict[int, dict[str, Any]]:
    """The faults of the plan at ``path`` that have happened, by number: when, to whom, and what that was doing."""
    found = {}
    for number in range(len(read_plan(path))):
        with suppress(FileNotFoundError):
            found[number] = json.loads(_proof(path, number).read_text())
    return found


def release(path: Path, number: int) -> None:
    """Lets the process go on that fault ``number``, a ``hold``, holds. If it holds none yet, it will hold none."""
    _release(path, number).touch()


class FaultyActivity(Activity):
    """An activity whose marks are the moments of a plan."""

    def __init__(self, connection: Connection, plan_path: Path, rank: int, attempt: int) -> None:
        super().__init__()
        self._plan_path = plan_path
        self._stamp = {"rank": rank, "attempt": attempt, "pid": os.getpid()}
        self._pids = {"training": os.getpid(), "agent": _maker_of(connection), "fork_server": os.getppid()}
        plan = enumerate(read_plan(plan_path))
        self._faults = [(number, fault) for number, fault in plan if fault.rank in (None, rank)]
        self._pass(DOING[0], 0)

    def mark(self, doing: Doing, step: int) -> None:
        super().mark(doing, step)
        self._pass(doing, step)

    def _pass(self, doing: str, step: int) -> None:
        for number, fault in self._faults:
            if fault.doing != doing or fault.step not in (None, step):
                continue
            if fault.follows is not None and not _proof(self._plan_path, fault.follows).exists():
                continue
            if fault.after_s:
                later = threading.Timer(fault.after_s, self._happen, (number, fault))
                later.daemon = True
                later.start()
            else:
                self._happen(number, fault)

    def _happen(self, number: int, fault: Fault) -> None:
        now = self.beat()
        victim = _loader() if fault.victim == "loader" else self._pids[fault.victim]
        content = {**self._stamp, "doing": now.doing, "step": now.step}
        if victim is None or not _claim(_proof(self._plan_path, number), content):
            return
        match fault.kind:
            case "kill":
                os.kill(victim, signal.SIGKILL)
            case "stop":
                os.kill(victim, signal.SIGSTOP)
            case "exit":
                os._exit(EXIT_CODE)
            case "raise":
                raise InjectedFault(f"fault {number} of the plan, in {now.doing} after step {now.step}")
            case "ecc":
                raise RuntimeError(ECC)
            case "hang":
                while True:
                    time.sleep(_LOOP_INTERVAL_S)
            case "hold":
                while not _release(self._plan_path, number).exists():
                    time.sleep(_LOOP_INTERVAL_S)


def _proof(plan_path: Path, number: int) -> Path:
    return plan_path.with_name(f"{plan_path.name}.fired-{number:03d}")


def _release(plan_path: Path, number: int) -> Path:
    return plan_path.with_name(f"{plan_path.name}.released-{number:03d}")


def _claim(proof: Path, content: dict[str, Any]) -> bool:
    """Whether this process, of all that pass the moment, is the one: it has written the proof, whole at once."""
    if proof.exists():
        return False
    draft = proof.with_name(f"{proof.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_text(json.dumps({"time": time.time(), **content}) + "\n")
    try:
        os.link(draft, proof)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _loader() -> int | None:
    """A process that loads data for this one; none if there is none. Thread: the main one, which makes the loaders."""
    return next((child.pid for child in multiprocessing.active_children()), None)


def _maker_of(connection: Connection) -> int:
    """The process that made the pipe: the agent. Linux keeps its number with the pipe."""
    with socket.socket(fileno=os.dup(connection.fileno())) as pipe:
        pid, _, _ = _PEER.unpack(pipe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(pid)
