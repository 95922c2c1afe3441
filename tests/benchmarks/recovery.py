"""From a SIGKILL to the first new training step: ``python -m tests.benchmarks.recovery``.

Two arms take turns, each as a fresh process in a fresh folder: ``launcher run`` on a small description, and a script
as Ray's documentation has it, a stock ``TorchTrainer`` with ``FailureConfig`` that reports a checkpoint and resumes
from it, its settings otherwise the defaults. Both train the reference CNN on the digits with two gloo workers, and
save every 20 steps, of which they keep three. Whenever there is a new checkpoint, rank 1 is killed, in each run twice
for each kind of kill: in the stock script its one process, which is a Ray worker; in the launcher in turn the training
process, and the Ray worker that holds it, the agent.

The clock starts at the kill, and stops when every rank has taken an optimizer step in a process that did not exist at
the kill: both arms use one optimizer class that writes down the first step of each process that has a process group.
That step may repeat one from before the kill, in both arms alike: what lies behind the checkpoint is lost, and is no
part of the time.

Reported for each kind of kill: median, least and most seconds, and n; for the launcher also where they went, by its
event log. The last line is JSON.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.e2e.command import ancestors, events

_STAMPED_OPTIMIZER = '''
import os
import time
from pathlib import Path

import torch


class StampedSGD(torch.optim.SGD):
    """SGD that writes down when its first step in a training process was done."""

    stamped = False

    def step(self, closure=None):
        super().step(closure)
        if not self.stamped and torch.distributed.is_initialized():
            self.stamped = True
            stamp = Path(os.environ["STAMPS"], f"{torch.distributed.get_rank()}.{os.getpid()}")
            unfinished = stamp.with_name(f"unfinished-{stamp.name}")
            unfinished.write_text(repr(time.time()))
            unfinished.rename(stamp)
'''
_JOB = """
name: recovery
store: runs
model: {_target_: jobs.models.Net, in_channels: 1, num_classes: 10, image_size: 32}
data:
  train: {_target_: jobs.data.digits, split: train}
loss: {_target_: CrossEntropyLoss}
optimizer: {_target_: stamped.StampedSGD, lr: 0.01, momentum: 0.9}
train: {epochs: 100000, global_batch: 64, shards: 2}
workers: {num: 2, max_failures: 50}
checkpoint: {every_steps: 20, keep: 3}
tracking: {mode: disabled}
"""
_STOCK = """
import tempfile
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from jobs.data import digits
from jobs.models import Net
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from stamped import StampedSGD
from torch.utils.data import DataLoader


def train():
    model = Net(in_channels=1, num_classes=10, image_size=32)
    optimizer = StampedSGD(model.parameters(), lr=0.01, momentum=0.9)
    step = first_epoch = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, first_epoch = state["step"], state["epoch"]
    model = ray.train.torch.prepare_model(model)
    loader = ray.train.torch.prepare_data_loader(DataLoader(digits("train"), batch_size=32, shuffle=True))
    loss_function = torch.nn.CrossEntropyLoss()
    for epoch in range(first_epoch, 100000):
        loader.sampler.set_epoch(epoch)
        for images_NCHW, labels_N in loader:
            optimizer.zero_grad()
            loss = loss_function(model(images_NCHW), labels_N)
            loss.backward()
            optimizer.step()
            step += 1
            if step % 20 == 0:
                report(model.module, optimizer, step, epoch, loss.item())


def report(model, optimizer, step, epoch, loss):
    metrics = {"step": step, "loss": loss}
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "epoch": epoch}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "state.pt"))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


if __name__ == "__main__":
    ray.init(address="local")
    TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="recovery",
            storage_path=STORAGE,
            failure_config=FailureConfig(max_failures=50),
            checkpoint_config=CheckpointConfig(num_to_keep=3),
        ),
    ).fit()
"""
_RUN = "runs/recovery"
_NUM_WORKERS = 2
_KILLS_PER_RUN = 2
"""Of each kind: a start takes longer than a recovery."""
_PR_SET_CHILD_SUBREAPER = 36
_VICTIM = 1
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 20.0
_POLL_INTERVAL_S = 0.02
_LONGEST_PAUSE_S = 2.0
_PHASES = ("worker_lost", "attempt_started", "training")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Arm:
    """A way to train, and the kinds of process of it that are killed."""

    make_command: Callable[[Path], list[str]]
    committed: str
    """Pattern of the files of which one is written when a checkpoint is whole."""
    victims: dict[str, Callable[["_Run"], int]]
    """Kind of kill -> the process that it hits."""


class _Run:
    """An arm that trains, in a folder of its own."""

    def __init__(self, arm: _Arm, folder: Path) -> None:
        self.folder = folder
        self.num_kills = 0
        self._arm = arm
        self._stamps = folder / "stamps"
        self._stamps.mkdir()
        (folder / "stamped.py").write_text(_STAMPED_OPTIMIZER)
        command = arm.make_command(folder)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment["STAMPS"] = str(self._stamps)
        with open(folder / "output", "wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._trains_since = 0.0

    def wait_until_it_trains(self) -> None:
        self._trains_since = self._wait_for(lambda: self._stepped(set()))

    def kill(self, kind: str) -> tuple[float, float]:
        """Kills once; returns when that was, and when every rank had taken a step in a new process."""
        self._wait_for(self._has_new_checkpoint)
        # A stock controller looks at its workers every 2 s, and commits a checkpoint when it does: a kill at that
        # moment would always find it at the beginning of its longest wait.
        time.sleep(random.uniform(0, _LONGEST_PAUSE_S))
        victim = self._arm.victims[kind](self)
        before = set(self._stamps.iterdir())
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        self.num_kills += 1
        self._trains_since = self._wait_for(lambda: self._stepped(before))
        return killed, self._trains_since

    def training_process(self) -> int:
        """The process of the rank that is killed, as its newest stamp tells."""
        stamps = self._stamps.glob(f"{_VICTIM}.*")
        return int(max(stamps, key=lambda stamp: float(stamp.read_text())).suffix[1:])

    def agent(self) -> int:
        """The Ray worker of the rank that is killed, as the launcher's event log tells."""
        run = self.folder / _RUN
        # An event is readable some seconds after it happened: until then the newest would be of a former attempt.
        started = self._wait_for(lambda: found if len(found := events(run, "attempt_started")) > self.num_kills else [])
        (pid,) = [worker["pid"] for worker in started[-1]["workers"] if worker["rank"] == _VICTIM]
        return int(pid)

    def end(self) -> None:
        """Ends every process of it: as Ctrl-C does, and by their own numbers those that are left after that."""
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
        while left := _descendants():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL_INTERVAL_S)

    def _stepped(self, before: set[Path]) -> float | None:
        """When the slowest rank took its first step in a process without a stamp in ``before``, if all have."""
        first: dict[str, float] = {}
        for stamp in set(self._stamps.glob("[0-9]*.*")) - before:
            moment = float(stamp.read_text())
            first[stamp.stem] = min(moment, first.get(stamp.stem, moment))
        return max(first.values()) if len(first) == _NUM_WORKERS else None

    def _has_new_checkpoint(self) -> bool:
        for path in self.folder.glob(self._arm.committed):
            with suppress(FileNotFoundError):  # only the newest are kept
                if path.stat().st_mtime > self._trains_since:
                    return True
        return False

    def _wait_for(self, find: Callable[[], T | None]) -> T:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not (found := find()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                output = (self.folder / "output").read_text(errors="replace")[-4000:]
                raise SystemExit(f"it ended, or did nothing for {_START_TIMEOUT_S:.0f} s:\n{output}")
            time.sleep(_POLL_INTERVAL_S)
        return found


def _adopt_orphans() -> None:
    """Makes this process the parent of descendants that lose theirs, so that it finds them at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _descendants() -> list[int]:
    """The processes that descend from this one and have not ended."""
    parents, alive = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(parent)
        if state not in "ZX":
            alive.append(int(entry.name))
    return [pid for pid in alive if os.getpid() in ancestors(pid, parents)]


def _launcher(folder: Path) -> list[str]:
    (folder / "recovery.yaml").write_text(_JOB)
    return [str(Path(sys.executable).with_name("launcher")), "run", "recovery.yaml", "--json"]


def _stock(folder: Path) -> list[str]:
    (folder / "stock.py").write_text(_STOCK.replace("STORAGE", repr(str(folder / "results"))))
    return [sys.executable, "stock.py"]


_ARMS = {
    "launcher": _Arm(
        _launcher,
        f"{_RUN}/checkpoints/*/manifest.json",
        {"training_process": _Run.training_process, "agent": _Run.agent},
    ),
    "stock": _Arm(_stock, "results/recovery/checkpoint_manager_snapshot.json", {"worker": _Run.training_process}),
}


@contextmanager
def _running(arm: _Arm) -> Iterator[_Run]:
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-", ignore_cleanup_errors=True) as name:
        run = _Run(arm, Path(name))
        try:
            run.wait_until_it_trains()
            yield run
        finally:
            run.end()


def run_once(arm: _Arm) -> list[tuple[str, dict[str, float]]]:
    """For each kill its kind, and the seconds from it to the first new step and to what the launcher's events tell."""
    with _running(arm) as run:
        kills = [(kind, *run.kill(kind)) for _ in range(_KILLS_PER_RUN) for kind in arm.victims]
        run.end()  # all events are readable now
        # The event log is the launcher's; stock has none.
        times = {phase: [event["time"] for event in events(run.folder / _RUN, phase)] for phase in _PHASES}
        found = []
        for kind, killed, stepped in kills:
            moments = {phase: min(filter(killed.__lt__, times[phase])) for phase in _PHASES if times[phase]}
            moments["first_step"] = stepped
            found.append((kind, {phase: moment - killed for phase, moment in moments.items()}))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help=f"each has {_KILLS_PER_RUN} kills of each kind")
    arguments = parser.parse_args()
    _adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind by it either
    found: dict[tuple[str, str], list[dict[str, float]]] = {
        (name, kind): [] for name, arm in _ARMS.items() for kind in arm.victims
    }
    for number in range(arguments.rounds):
        for name, arm in _ARMS.items():
            for kind, moments in run_once(arm):
                found[name, kind].append(moments)
                times = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in moments.items())
                print(f"{number} {name} {kind}: {times}", file=sys.stderr)
    num_kills = arguments.rounds * _KILLS_PER_RUN
    document: dict[str, float] = {"n": num_kills}
    print(f"small CNN, 2 workers, seconds from SIGKILL, n={num_kills} of each kind: median (least-most)")
    for (name, kind), rounds in found.items():
        for phase in (*_PHASES, "first_step"):
            seconds = [moments[phase] for moments in rounds if phase in moments]
            if seconds:
                median = statistics.median(seconds)
                print(f"{name:9} {kind:17} {phase:16} {median:6.2f} ({min(seconds):.2f}-{max(seconds):.2f})")
                document[f"{name}_{kind}_{phase}"] = round(median, 3)
    stock = document["stock_worker_first_step"]
    for kind in _ARMS["launcher"].victims:
        document[f"{kind}_ratio"] = round(document[f"launcher_{kind}_first_step"] / stock, 3)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
