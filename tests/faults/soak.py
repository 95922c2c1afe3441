"""Random schedules of faults, one run after the other, each held against the bits of an undisturbed run.

    python -m tests.faults.soak --seed 1 --minutes 30
    python -m tests.faults.soak --seed 1 --only 17

A schedule is a function of the seed and its number, and nothing else. It is the life of one run: it begins, goes on
elsewhere with other numbers of workers after each stop, interruption or kill, and completes. What happens within the
training processes is a plan of ``tests.faults.injection``. What happens to others is done from here, when a ``note`` or
a ``hold`` of the plan says that its moment has come: the run is ended, its driver is paused until another one has it,
its disk is full for a while. Every fourth run is elastic, on hosts of its own that lose their power, are cut off and
come back.
"""

import argparse
import errno
import itertools
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.run.run_directory import RunDirectory
from tests.e2e.command import JOBS, Ended, Running, launcher
from tests.faults.hosts import HEAD_SETTINGS, Host, hosts, start_ray, why_there_can_be_none
from tests.faults.injection import Fault, Kind, environment, fired, write_plan
from tests.faults.planned import Bits, assert_nothing_was_lost, bits, processes_of, undisturbed, wait_for_end_of
from tests.stores import disk_in_memory

EPOCHS, STEPS_PER_EPOCH, EVERY_STEPS = 4, 22, 5
STEPS = EPOCHS * STEPS_PER_EPOCH
HANG_TIMEOUT_S = 8
ELASTIC_EVERY = 4
"""One schedule in so many runs on hosts of its own."""
LATE_STEPS = 14
"""What is done from outside ends a run so many steps after its moment, or fewer."""
LIFE_TIMEOUT_S = 300.0
END_TIMEOUT_S = 20.0
BLINK_S = 3.0
DISK_SIZE = "256m"
FULL_S = 5.0, 15.0
"""How long a disk is full: longer than between two writes of the status. A recovery from a fault waits meanwhile."""
POLL_INTERVAL_S = 0.01

ENDS = {
    "interrupt": 130,
    "stop": 0,
    "kill driver": -signal.SIGKILL,
    "kill all": -signal.SIGKILL,
    "kill ray::TrainController": 5,
    "kill ray::_Switchboard": 5,
    "pause driver": 5,
}
"""What is done to a run from outside to end it, and its exit code; one that was complete by then ends with 0. A paused
driver goes on when the next one trains, and then ends."""
ENDS_ON_FULL_DISK = ("kill driver", "kill all")
"""Those that need no room, and wait for none."""
MARKS = ("note", "hold")
"""The kinds of faults that say that the moment of a deed has come."""
HOSTS = ("second", "third")
"""Those that things happen to; the first one has the driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deed:
    """Something that is done from outside.

    Attributes:
        note: The number of the fault that says when.
        what: One of ``ENDS``, ``fill`` or ``free``, which are done to its disk, or what is done to a host.
        host: Which.
        delay_s: Seconds from the note to the deed.
    """

    note: int
    what: str
    host: str = ""
    delay_s: float = 0.0

    def __str__(self) -> str:
        delay = f", {self.delay_s:g} s later" if self.delay_s else ""
        return f"at {self.note}{delay} {self.what} {self.host}".rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One command, and what is done to it from outside; what ends it is the last, else it completes."""

    workers: str
    is_elastic: bool = False
    deeds: tuple[Deed, ...] = ()

    def __str__(self) -> str:
        return f"{self.workers} workers" + "".join(f", {deed}" for deed in self.deeds)

    @property
    def exit_code(self) -> int:
        """How it ends, unless it completes before."""
        return ENDS.get(self.deeds[-1].what, 0) if self.deeds else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The life of a run, command by command, and the faults within its processes."""

    number: int
    loaders: int
    """Of each worker."""
    lives: tuple[Life, ...]
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        faults = (f"{number} {_words(fault)}" for number, fault in enumerate(self.faults))
        return f"[{self.loaders} loaders; {'; '.join(map(str, self.lives))}: {', '.join(faults)}]"

    @property
    def has_small_disk(self) -> bool:
        return any(deed.what == "fill" for life in self.lives for deed in life.deeds)

    @property
    def needs_root(self) -> bool:
        return self.has_small_disk or self.lives[0].is_elastic


def draw(seed: int, number: int) -> Schedule:
    """The schedule of this number."""
    drawing = _Drawing(random.Random(f"{seed}/{number}"))
    if number % ELASTIC_EVERY == ELASTIC_EVERY - 1:
        drawing.elastic_run()
    else:
        drawing.run()
    return Schedule(number=number, loaders=drawing.loaders, lives=tuple(drawing.lives), faults=tuple(drawing.faults))


class _Drawing:
    """A schedule as it is drawn, from its beginning to its end."""

    def __init__(self, rng: random.Random) -> None:
        self.lives: list[Life] = []
        self.faults: list[Fault] = []
        self._rng = rng
        self.loaders = rng.choice((0, 2))

    def run(self) -> None:
        num_lives = self._rng.choice((1, 2, 2, 3))
        ends = [STEPS * (index + 1) // num_lives for index in range(num_lives)]
        begins = [0, *(end + LATE_STEPS for end in ends)]
        for begin, end in zip(begins, ends):
            self._life(range(begin, end), ends_run=end < STEPS)

    def elastic_run(self) -> None:
        """On hosts; it may go on without them."""
        deeds, off = [], set[str]()
        for step in sorted(self._rng.sample(range(4, STEPS // 2, 4), self._rng.randint(1, 3))):
            self._fault(step, num_workers=1)
            host = self._rng.choice(HOSTS)
            what = "return" if host in off else self._rng.choice(("power off", "power off", "cut", "blink"))
            off = off - {host} if what == "return" else off | {host} if what != "blink" else off
            deeds.append(Deed(note=self._note(step + 1), what=what, host=host))
        if self._rng.random() < 0.5:
            deeds.append(Deed(note=self._note(STEPS // 2 + 4), what="kill driver", delay_s=self._delay_s()))
        self.lives.append(Life(workers=f"[1,{1 + len(HOSTS)}]", is_elastic=True, deeds=tuple(deeds)))
        if deeds[-1].what in ENDS:
            self._life(range(STEPS // 2 + 4 + LATE_STEPS, STEPS), ends_run=False)

    def _life(self, steps: range, *, ends_run: bool) -> None:
        """A life that passes these steps, on this machine alone."""
        num_workers = self._rng.randint(1, 4)
        if self._rng.random() < 0.25:
            before = self.lives[-1].deeds[-1].note if self.lives else None
            self._kill("start", None, num_workers, follows=before)
        for step in sorted(self._rng.sample(steps, self._rng.randint(1, 4))):
            self._fault(step, num_workers)
        deeds = self._end(steps[-1]) if ends_run else []
        if self._rng.random() < 0.3:
            full = self._note(self._rng.choice(steps[:-1]))
            is_full_s = round(self._rng.uniform(*FULL_S), 3)
            deeds = [Deed(note=full, what="fill"), Deed(note=full, what="free", delay_s=is_full_s), *deeds]
        self.lives.append(Life(workers=str(num_workers), deeds=tuple(deeds)))

    def _end(self, step: int) -> list[Deed]:
        """Ends the run at a step, maybe on a full disk."""
        what = self._rng.choice(list(ENDS))
        # The workers of a paused driver would go on, and have the faults that are meant for those of the next one.
        note = self._note(step, "hold" if what == "pause driver" else "note")
        end = Deed(note=note, what=what, delay_s=self._delay_s())
        is_full = what in ENDS_ON_FULL_DISK and self._rng.random() < 0.5
        return [Deed(note=end.note, what="fill"), end] if is_full else [end]

    def _fault(self, step: int, num_workers: int) -> None:
        """One at a step; in the recovery from it there may be another, and in the recovery from that one."""
        doings = ["data", "forward", "backward", *(["exchange"] if num_workers > 1 else [])]
        if step and step % STEPS_PER_EPOCH == 0:
            doings += ["validation"] * 2
        if step and (step % STEPS_PER_EPOCH == 0 or step % EVERY_STEPS == 0):
            doings += ["storage"] * 2
        doing, rank = self._rng.choice(doings), self._rng.randrange(num_workers)
        # Who stands still in his first step may be at work, for all that anyone knows; others would wait in vain.
        standstills = ("stop", "hang") if num_workers > 1 else ()
        loader = ("loader", "loader") if self.loaders else ()
        kind = self._rng.choice(("kill",) * 5 + ("agent", "fork_server", "raise") + standstills + loader)
        if kind == "kill":
            self._kill(doing, step, num_workers)
        elif kind in ("agent", "fork_server", "loader"):
            self.faults.append(Fault(kind="kill", victim=kind, doing=doing, step=step, rank=rank))
        else:
            self.faults.append(Fault(kind=kind, doing=doing, step=step, rank=rank))
        while self._rng.random() < 0.25:
            self._kill(self._rng.choice(("start", "restore")), None, num_workers, follows=len(self.faults) - 1)

    def _kill(self, doing: str, step: int | None, num_workers: int, follows: int | None = None) -> None:
        longest_s = {"start": 0.5, "restore": 0.1}.get(doing, 0.03)
        after_s = self._rng.choice((0.0, round(self._rng.uniform(0, longest_s), 4)))
        rank = self._rng.randrange(num_workers)
        self.faults.append(Fault(kind="kill", doing=doing, step=step, rank=rank, after_s=after_s, follows=follows))

    def _note(self, step: int, kind: Kind = "note") -> int:
        self.faults.append(Fault(kind=kind, doing="forward", step=step))
        return len(self.faults) - 1

    def _delay_s(self) -> float:
        return round(self._rng.choice((0.0, self._rng.random())), 3)


class Stage:
    """Where a schedule is lived: a folder, and hosts if it needs them."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        self._schedule = schedule
        self._folder = folder
        self._hosts: dict[str, Host] = {}
        self._off: set[str] = set()
        self._paused: Running | None = None
        self.plan = folder / "plan.json"
        self.run = folder / "runs/digits"
        self.done: list[Deed] = []
        """The deeds so far."""

    def live(self, reference: Bits) -> None:
        """Lives the schedule, and holds its end against the undisturbed run.

        Raises:
            AssertionError: Something else happened than what is documented.
        """
        (self._folder / "tmp").mkdir(parents=True)
        os.environ["TMPDIR"] = str(self._folder / "tmp")  # what a kill leaves there goes with the folder
        os.environ |= environment(self.plan)
        write_plan(self._schedule.faults, self.plan)
        with self._disk():
            for number, life in enumerate(self._schedule.lives):
                with self._hosts_of(life):
                    ended = self._live_once(life, number)
                if ended is None:
                    continue
                left = wait_for_end_of(self.plan, END_TIMEOUT_S)
                assert not left, f"life {number} left {left}"
                if ended.exit_code == 0 and ended.document["status"] == "completed":
                    break
                assert life.deeds, f"life {number} has not completed: {ended}"
                assert life.deeds[-1] in self.done, f"life {number} ended by itself: {ended}"
                assert ended.exit_code == life.exit_code, f"life {number} ended with {ended.exit_code}: {ended}"
            assert ended is not None
            assert bits(ended, self.run) == reference, "other bits"
            assert_nothing_was_lost(self.run)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """A small disk for the store of a run whose disk is full at times; what lies there after a failure is kept."""
        if not self._schedule.has_small_disk:
            yield
            return
        with disk_in_memory(self.run.parent, DISK_SIZE):
            try:
                yield
            except AssertionError:
                self._leave_disk()
                if self.run.exists():
                    shutil.copytree(self.run, self._folder / "run-that-failed")
                raise
            finally:
                self._leave_disk()

    def _leave_disk(self) -> None:
        """Ends whatever may be on the disk still."""
        wait_for_end_of(self.plan, timeout_s=0)
        wait_for_end_of(self.plan, END_TIMEOUT_S)

    @contextmanager
    def _hosts_of(self, life: Life) -> Iterator[None]:
        """The hosts that a life is lived on, if it is elastic."""
        if not life.is_elastic:
            yield
            return
        with hosts("head", *HOSTS) as made:
            self._hosts = {host.name: host for host in made}
            start_ray(*made, head_settings=HEAD_SETTINGS)
            yield

    def _live_once(self, life: Life, number: int) -> Ended | None:
        """How a life ends; none if its driver is paused, with the next life beside it."""
        place = self._folder / f"place-{number}"
        place.mkdir()
        command: list[object] = ["resume", self.run]
        if not self.run.exists():
            command = ["run", JOBS / "digits.yaml", f"store={self.run.parent}", *overrides(self._brake)]
            command += [f"data.loaders={self._schedule.loaders}"]
        command += [f"workers.num={life.workers}", f"workers.cpus={1 if life.is_elastic else 0.5}", "--json"]
        paused, self._paused = self._paused, None
        command += ["--take-over"] if paused else []
        passed = fired(self.plan)  # a life may train past the moments of the next one, while its disk is filled
        num_trained = self._num_trained()
        if life.is_elastic:
            head = self._hosts["head"]
            running = Running(
                [*command, "--cluster", head.ray_address], place, lambda words: head.command(words, place), on_ray=True
            )
        else:
            running = Running(command, place, on_ray=True)
        if paused:
            self._go_on(paused, is_lost=_wait_until(lambda: self._num_trained() > num_trained, running))
        for deed in (each for each in life.deeds if each.note not in passed):
            if not _wait_until(lambda: deed.note in fired(self.plan), running):  # noqa: B023  # it is called here alone
                break
            time.sleep(deed.delay_s)
            if _has_ended(running):
                break
            if deed.host:
                self._do_to_host(deed, self._hosts[deed.host], running)
            else:
                self._do_to_run(deed, running)
            self.done.append(deed)
        if self._paused:
            return None
        try:
            return running.wait(LIFE_TIMEOUT_S)
        finally:
            self._make_room()

    def _do_to_run(self, deed: Deed, running: Running) -> None:
        if deed.what == "fill":
            self._fill_disk()
        elif deed.what == "free":
            self._make_room()
        elif deed.what == "pause driver":
            os.kill(running.pid, signal.SIGSTOP)
            self._paused = running
        elif deed.what == "interrupt":
            running.signal_group(signal.SIGINT)
        elif deed.what == "stop":
            launcher("stop", self.run, cwd=self._folder)
        elif deed.what == "kill all":
            running.signal_group(signal.SIGKILL)
        else:
            victims = [pid for pid, command in processes_of(self.plan).items() if _is_hit(command, deed)]
            assert victims, f"nothing there to {deed}"
            for pid in victims:
                os.kill(pid, signal.SIGKILL)

    def _go_on(self, paused: Running, *, is_lost: bool) -> None:
        """Lets a paused driver go on, and waits for its end; the run of the next one takes its time meanwhile.

        Args:
            paused: The driver.
            is_lost: Another one has trained since. Else the run was complete, which the paused one may say too.
        """
        self._brake.touch()
        os.kill(paused.pid, signal.SIGCONT)
        ended = paused.wait(LIFE_TIMEOUT_S)
        if is_lost or ended.exit_code != 0:
            assert ended.exit_code == ENDS["pause driver"], ended
            assert "has taken the run over" in ended.document["error"], ended
        else:
            assert ended.document["status"] == "completed", ended
        self._brake.unlink()

    def _fill_disk(self) -> None:
        self._brake.touch()  # the run would get to its end, and wait there
        with self._filler.open("wb", buffering=0) as file:
            while free := shutil.disk_usage(self._filler).free:
                try:
                    file.write(bytes(free))
                except OSError as error:
                    if error.errno != errno.ENOSPC:  # the run takes room too
                        raise

    def _make_room(self) -> None:
        self._filler.unlink(missing_ok=True)
        self._brake.unlink(missing_ok=True)

    def _do_to_host(self, deed: Deed, host: Host, running: Running) -> None:
        """Does it, and waits until the run goes on with the hosts there are, which takes longer than the run would."""
        self._brake.touch()
        if deed.what == "blink":
            host.cut()
            time.sleep(BLINK_S)
            host.mend()
        elif deed.what == "return":
            self._off.remove(host.name)
            host.end()
            host.power_on()
            host.start_ray(self._hosts["head"])
        else:
            self._off.add(host.name)
            host.power_off() if deed.what == "power off" else host.cut()
        there = {host.address for name, host in self._hosts.items() if name not in self._off}
        assert _wait_until(lambda: self._trains_on() == there, running), f"after {deed} it does not go on on {there}"
        self._brake.unlink()

    def _num_trained(self) -> int:
        """How many attempts have begun to train."""
        if not self.run.exists():
            return 0
        return sum(event["kind"] == "training" for event in RunDirectory(str(self.run)).events().read())

    def _trains_on(self) -> set[str]:
        """The hosts of the workers that train."""
        addresses: set[str] = set()
        trains = False
        for event in RunDirectory(str(self.run)).events().read():
            if event["kind"] == "attempt_started":
                addresses, trains = {worker["address"] for worker in event["workers"]}, False
            trains |= event["kind"] == "training"
        return addresses if trains else set()

    @property
    def _brake(self) -> Path:
        return self._folder / "brake"

    @property
    def _filler(self) -> Path:
        return self.run.parent / "filler"


def _is_hit(command: str, deed: Deed) -> bool:
    """Whether the process with this command line is the one that is to be killed."""
    if deed.what == "kill driver":
        return "/bin/launcher " in command and not command.startswith("nsenter")
    return command.startswith(deed.what.removeprefix("kill "))


def overrides(brake: Path) -> tuple[str, ...]:
    """What makes ``jobs/digits.yaml`` the job of the soak."""
    return (
        f"train.epochs={EPOCHS}",
        f"checkpoint.every_steps={EVERY_STEPS}",
        f"data.train.transform={{_target_: tests.faults.brake.Brake, size: 32, padding: 2, path: {brake}}}",
        "workers.max_failures={machine: 100, code: 100}",
        f"workers.hang_timeout_s={HANG_TIMEOUT_S}",
        "workers.timeout_s=20",
        "tracking.mode=disabled",
    )


def _wait_until(happened: Callable[[], bool], running: Running) -> bool:
    """Waits for something, or for the end of a command or of patience; returns whether it has happened."""
    deadline = time.monotonic() + LIFE_TIMEOUT_S
    while not (it_has := happened()) and time.monotonic() < deadline and not _has_ended(running):
        time.sleep(POLL_INTERVAL_S)
    return it_has


def _has_ended(running: Running) -> bool:
    """Its end stays to be waited for."""
    return os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@dataclass(slots=True)
class Tally:
    """What was drawn so far, what of it has happened, and how it went."""

    drawn: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def count(self, schedule: Schedule, stage: Stage) -> None:
        """A schedule is over."""
        happened = fired(stage.plan)
        for number, fault in enumerate(schedule.faults):
            if fault.kind not in MARKS:
                kind = fault.kind if fault.victim == "training" else f"{fault.kind} its {fault.victim}"
                self._count(f"a worker: {kind}", number in happened)
                self._count(f"moment: {fault.doing}" + " again" * (fault.follows is not None), number in happened)
        for deed in [deed for life in schedule.lives for deed in life.deeds]:
            self._count(f"{'a host' if deed.host else 'the run'}: {deed.what}", deed in stage.done)

    def table(self) -> str:
        """For people."""
        lines = [f"{'':32} drawn  fired"]
        lines += [f"{kind:32} {self.drawn[kind]:5}  {self.fired[kind]:5}" for kind in sorted(self.drawn)]
        passed = len(self.seconds) - len(self.failed)
        median = f"; median {statistics.median(self.seconds):.1f} s" if self.seconds else ""
        lines.append(f"{passed} of {len(self.seconds)} schedules passed{median}")
        if self.failed:
            lines.append(f"failed: {', '.join(map(str, self.failed))}")
        return "\n".join(lines)

    def _count(self, kind: str, has_happened: bool) -> None:
        self.drawn[kind] += 1
        self.fired[kind] += has_happened


def soak(seed: int, numbers: Iterable[int], limit_s: float) -> Tally:
    """Runs schedules one after the other, and tells of each; the folders of those that failed are kept."""
    began, tally = time.monotonic(), Tally()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    why_no_hosts = why_there_can_be_none()
    try:
        reference = undisturbed(overrides(home / "none"))
        for number in numbers:
            if time.monotonic() - began > limit_s:
                break
            schedule = draw(seed, number)
            if schedule.needs_root and why_no_hosts:
                print(f"{number} left out: {why_no_hosts}", flush=True)
            else:
                _live(schedule, home / str(number), reference, tally)
    finally:
        print(tally.table())
        if not tally.failed:
            shutil.rmtree(home)
    return tally


def _live(schedule: Schedule, folder: Path, reference: Bits, tally: Tally) -> None:
    begun, stage = time.monotonic(), Stage(schedule, folder)
    outcome = "passed"
    try:
        stage.live(reference)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        tally.failed.append(schedule.number)
        outcome = f"FAILED, see {folder}: {error!r}"
    finally:
        wait_for_end_of(stage.plan, timeout_s=0)
    tally.seconds.append(time.monotonic() - begun)
    tally.count(schedule, stage)
    if outcome == "passed":
        shutil.rmtree(folder)
    print(f"{schedule.number} {tally.seconds[-1]:.0f} s {schedule}: {outcome}", flush=True)


def _words(fault: Fault) -> str:
    words = [fault.kind if fault.victim == "training" else f"{fault.kind} {fault.victim}"]
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
    numbers: Iterable[int] = itertools.count() if arguments.schedules is None else range(arguments.schedules)
    if arguments.only is not None:
        numbers = [arguments.only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind by it either
    sys.exit(1 if soak(arguments.seed, numbers, arguments.minutes * 60).failed else 0)


if __name__ == "__main__":
    main()
