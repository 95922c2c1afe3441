"""Random schedules of faults, one run after the other, each held against the bits of an undisturbed run.

    python -m tests.faults.soak --seed 1 --minutes 30
    python -m tests.faults.soak --seed 1 --only 17

A schedule is a function of the seed and its number, and nothing else. It is the life of one run: it begins, goes on
elsewhere with other numbers of workers after each stop, interruption or kill, and completes. What happens within the
training processes is a plan of ``cluster.faults``; what happens to others is done from here, when a fault of the kind
``note`` says that its moment has come.
"""

import argparse
import itertools
import math
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.agent import FAULTS_VARIABLE
from cluster.faults import Fault, fired, write_plan
from tests.e2e.command import JOBS, Ended, Running, launcher
from tests.faults.planned import Bits, assert_nothing_was_lost, bits, processes_of, undisturbed, wait_for_end_of

EPOCHS, STEPS_PER_EPOCH, EVERY_STEPS = 4, 22, 5
STEPS = EPOCHS * STEPS_PER_EPOCH
SHORT = (f"train.epochs={EPOCHS}", f"checkpoint.every_steps={EVERY_STEPS}", "tracking.mode=disabled")
OVERRIDES = (
    *SHORT,
    "workers.max_failures={machine: 100, code: 100}",
    "workers.hang_timeout_s=4",
    "workers.timeout_s=20",
)
LATE_STEPS = 14
"""A deed from outside hits the run so many steps after its moment, or less."""
LIFE_TIMEOUT_S = 180.0
END_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 0.01

EXIT_CODES = {
    "interrupt": 130,
    "stop": 0,
    "kill driver": -signal.SIGKILL,
    "kill all": -signal.SIGKILL,
    "kill ray::TrainController": 5,
    "kill ray::_Switchboard": 5,
}
"""What is done to a run from outside, and what it ends with; one that was complete by then ends with 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One command, and what happens to it."""

    num_workers: int
    faults: tuple[Fault, ...]
    deed: str | None
    """What ends it, one of ``EXIT_CODES``, when the last fault, a ``note``, has come; none: it completes."""
    delay_s: float
    """From the note to the deed."""

    def __str__(self) -> str:
        faults = ", ".join(f"{number} {_words(fault)}" for number, fault in enumerate(self.faults))
        deed = f", {self.delay_s:g} s later {self.deed}" if self.deed else ""
        return f"{self.num_workers} workers [{faults}]{deed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The life of a run, command by command."""

    number: int
    lives: tuple[Life, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.lives))


def draw(seed: int, number: int) -> Schedule:
    """The schedule of this number."""
    rng = random.Random(f"{seed}/{number}")
    num_lives = rng.choice((1, 2, 2, 3))
    ends = [STEPS * (index + 1) // num_lives for index in range(num_lives)]
    begins = [0, *(end + LATE_STEPS for end in ends)]
    lives = [_draw_life(rng, range(begin, end), is_last=end == STEPS) for begin, end in zip(begins, ends)]
    return Schedule(number=number, lives=tuple(lives))


def _draw_life(rng: random.Random, steps: range, *, is_last: bool) -> Life:
    """A life that passes these steps."""
    num_workers = rng.randint(1, 4)
    faults: list[Fault] = []
    if rng.random() < 0.25:
        faults.append(_draw_kill(rng, "start", None, num_workers))
    for step in sorted(rng.sample(steps, rng.randint(1, 4))):
        faults.append(_draw_fault(rng, step, num_workers))
        while rng.random() < 0.25:  # in the recovery from it, and in that from this one
            doing = rng.choice(("start", "restore"))
            faults.append(_draw_kill(rng, doing, None, num_workers, follows=len(faults) - 1))
    deed, delay_s = None, 0.0
    if not is_last:
        faults.append(Fault(kind="note", doing="forward", step=steps[-1]))
        deed, delay_s = rng.choice(list(EXIT_CODES)), round(rng.choice((0.0, rng.random())), 3)
    return Life(num_workers=num_workers, faults=tuple(faults), deed=deed, delay_s=delay_s)


def _draw_fault(rng: random.Random, step: int, num_workers: int) -> Fault:
    doings = ["data", "forward", "backward", "exchange"]
    if step and step % STEPS_PER_EPOCH == 0:
        doings += ["validation"] * 2
    if step and (step % STEPS_PER_EPOCH == 0 or step % EVERY_STEPS == 0):
        doings += ["storage"] * 2
    doing, rank = rng.choice(doings), rng.randrange(num_workers)
    # Nobody tells a process that stands still from one that is long about its first step, but those that wait for it.
    standstills = ("stop", "hang") if num_workers > 1 else ()
    kind = rng.choice(("kill",) * 5 + ("kill agent", "raise") + standstills)
    if kind == "kill":
        return _draw_kill(rng, doing, step, num_workers)
    if kind == "kill agent":
        return Fault(kind="kill", victim="agent", doing=doing, step=step, rank=rank)
    return Fault(kind=kind, doing=doing, step=step, rank=rank)


def _draw_kill(rng: random.Random, doing: str, step: int | None, num_workers: int, follows: int | None = None) -> Fault:
    longest_s = {"start": 0.5, "restore": 0.1}.get(doing, 0.03)
    after_s = rng.choice((0.0, round(rng.uniform(0, longest_s), 4)))
    return Fault(kind="kill", doing=doing, step=step, rank=rng.randrange(num_workers), after_s=after_s, follows=follows)


def live(schedule: Schedule, folder: Path, reference: Bits, tally: "Tally") -> None:
    """Lives it in a folder, and holds its end against the undisturbed run.

    Raises:
        AssertionError: Something else happened than what is documented.
    """
    run, completed = folder / "runs/digits", False
    for number, life in enumerate(schedule.lives):
        place, plan = folder / f"place-{number}", folder / f"plan-{number}.json"
        place.mkdir()
        write_plan(life.faults, plan)
        os.environ[FAULTS_VARIABLE] = str(plan)
        command = ["resume", run] if run.exists() else ["run", JOBS / "digits.yaml", f"store={run.parent}", *OVERRIDES]
        try:
            ended = _live_once([*command, f"workers.num={life.num_workers}", "--json"], place, life, plan)
        finally:
            tally.count(life, fired(plan).keys())
        completed = ended.exit_code == 0 and ended.document["status"] == "completed"
        if not completed:
            wanted = None if life.deed is None else EXIT_CODES[life.deed]
            assert ended.exit_code == wanted, f"life {number} ended with {ended.exit_code}: {ended.stderr}"
        left = wait_for_end_of(plan, END_TIMEOUT_S)
        assert not left, f"life {number} left {left}"
        if completed:
            break
    assert bits(ended, run) == reference, "other bits"
    assert_nothing_was_lost(run)


def _live_once(command: list[object], place: Path, life: Life, plan: Path) -> Ended:
    """Runs a command; when the moment of the deed has come, does it."""
    running = Running(command, place)
    deadline = time.monotonic() + LIFE_TIMEOUT_S
    while life.deed is not None and not _has_ended(running) and time.monotonic() < deadline:
        if len(life.faults) - 1 in fired(plan):
            time.sleep(life.delay_s)
            _do(life.deed, running, plan)
            break
        time.sleep(POLL_INTERVAL_S)
    return running.wait(LIFE_TIMEOUT_S)


def _do(deed: str, running: Running, plan: Path) -> None:
    if deed == "interrupt":
        running.signal_group(signal.SIGINT)
    elif deed == "stop":
        launcher("stop", plan.parent / "runs/digits", cwd=plan.parent)
    elif deed == "kill driver":
        os.kill(running.pid, signal.SIGKILL)
    elif deed == "kill all":
        running.signal_group(signal.SIGKILL)
    else:
        for pid, command in processes_of(plan).items():
            if command.startswith(deed.removeprefix("kill ")):
                os.kill(pid, signal.SIGKILL)


def _has_ended(running: Running) -> bool:
    """Leaves its end to be waited for."""
    return os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@dataclass(slots=True)
class Tally:
    """What was drawn so far, what of it has happened, and how it went."""

    drawn: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def count(self, life: Life, happened: Collection[int]) -> None:
        """A life is over; ``happened``: the numbers of its faults that have."""
        for number, fault in enumerate(life.faults):
            for kind in _kinds(fault, life.deed):
                self.drawn[kind] += 1
                self.fired[kind] += number in happened

    def table(self) -> str:
        """For people."""
        lines = [f"{'':32} drawn  fired"]
        lines += [f"{kind:32} {self.drawn[kind]:5}  {self.fired[kind]:5}" for kind in sorted(self.drawn)]
        passed = len(self.seconds) - len(self.failed)
        lines.append(
            f"{passed} of {len(self.seconds)} schedules passed; median {statistics.median(self.seconds):.1f} s"
        )
        if self.failed:
            lines.append(f"failed: {', '.join(map(str, self.failed))}")
        return "\n".join(lines)


def _kinds(fault: Fault, deed: str | None) -> list[str]:
    """What a fault is counted as."""
    if fault.kind == "note":
        return [f"the run: {deed}"]
    kind = fault.kind if fault.victim == "training" else f"{fault.kind} its agent"
    return [f"a worker: {kind}", f"moment: {'recovery' if fault.follows is not None else fault.doing}"]


def _words(fault: Fault) -> str:
    words = [fault.kind if fault.victim == "training" else f"{fault.kind} agent"]
    words += [f"rank {fault.rank}"] if fault.rank is not None else []
    words += [fault.doing if fault.step is None else f"{fault.doing} {fault.step}"]
    words += [f"+{fault.after_s:g} s"] if fault.after_s else []
    words += [f"after {fault.follows}"] if fault.follows is not None else []
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no schedule after so many")
    parser.add_argument("--schedules", type=int, default=None, help="so many, from number 0")
    parser.add_argument("--only", type=int, default=None, help="the schedule of this number")
    arguments = parser.parse_args()
    if arguments.only is not None:
        numbers: Iterable[int] = [arguments.only]
    else:
        numbers = itertools.count() if arguments.schedules is None else range(arguments.schedules)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind by it either
    sys.exit(1 if soak(arguments.seed, numbers, arguments.minutes * 60) else 0)


def soak(seed: int, numbers: Iterable[int], limit_s: float) -> list[int]:
    """Runs schedules one after the other; returns the numbers of those that failed, whose folders are kept."""
    began, tally = time.monotonic(), Tally()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        reference = undisturbed(home / "undisturbed", SHORT)
        for number in numbers:
            if time.monotonic() - began > limit_s:
                break
            _live_in(home / str(number), draw(seed, number), reference, tally)
    finally:
        print(tally.table())
        if not tally.failed:
            shutil.rmtree(home)
    return tally.failed


def _live_in(folder: Path, schedule: Schedule, reference: Bits, tally: Tally) -> None:
    """Lives a schedule and tells how that went; what of it runs then is ended, and its folder kept if it failed."""
    begun = time.monotonic()
    (folder / "tmp").mkdir(parents=True)
    os.environ["TMPDIR"] = str(folder / "tmp")  # what a kill leaves there goes with the folder
    try:
        live(schedule, folder, reference, tally)
        outcome = "passed"
    except AssertionError as error:
        tally.failed.append(schedule.number)
        outcome = f"FAILED, see {folder}: {error}"
    finally:
        for plan in folder.glob("plan-*.json"):
            wait_for_end_of(plan, timeout_s=0)
    if outcome == "passed":
        shutil.rmtree(folder)
    tally.seconds.append(time.monotonic() - begun)
    print(f"{schedule.number} {tally.seconds[-1]:.1f} s {schedule}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
