"""One training, twice: by ``launcher run``, and by a stock ``TorchTrainer`` as Ray's documentation has it.

Both train the reference CNN on the digits with two gloo workers, without end, and save every 20 steps, of which they
keep three; or a benchmark brings a job and a script of its own. All use one optimizer class that counts its steps, also
over a restart, for the count is in its state, and writes down when each was done in a process that has a process group:
by these stamps it is told when training began, or began again, where, and how far it came.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.e2e.command import events
from tests.processes import descendants

NUM_WORKERS = 2
LAUNCHER_RUN = "runs/twin"
"""The run directory, from the folder that the launcher is started in."""
_OPTIMIZER = '''
import os
import socket
import time
from pathlib import Path

import torch

STAMPS = Path(FOLDER_OF_STAMPS)


class StampedSGD(torch.optim.SGD):
    """SGD that counts its steps, and in a training process writes down when each was done."""

    stamps = None

    def step(self, closure=None):
        super().step(closure)
        group = self.param_groups[0]
        group["steps"] = group.get("steps", 0) + 1
        if torch.distributed.is_initialized():
            self.write(f"{group['steps']} {time.time()!r}\\n")

    def write(self, line):
        if self.stamps is not None:
            self.stamps.write(line)
            return
        stamp = STAMPS / f"{torch.distributed.get_rank()}.{socket.gethostname()}.{os.getpid()}"
        unfinished = stamp.with_name(f"unfinished-{stamp.name}")
        self.stamps = open(unfinished, "w", buffering=1)
        self.stamps.write(line)
        unfinished.rename(stamp)
'''
_JOB = """
name: twin
store: runs
model: {_target_: jobs.models.Net, in_channels: 1, num_classes: 10, image_size: 32}
data:
  train: {_target_: jobs.data.digits, split: train}
loss: {_target_: CrossEntropyLoss}
optimizer: {_target_: stamped.StampedSGD, lr: 0.01, momentum: 0.9}
train: {epochs: 100000, global_batch: 64, shards: 2}
workers: {num: 2, max_failures: {machine: null}}
checkpoint: {every_steps: 20, keep: 3}
tracking: {mode: disabled}
"""
_SCRIPT = """
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
            if step % EVERY_STEPS == 0:
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
    ray.init(**RAY_INIT)
    TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="twin",
            storage_path=STORAGE,
            failure_config=FailureConfig(max_failures=1000),
            checkpoint_config=CheckpointConfig(num_to_keep=3),
        ),
    ).fit()
"""
_TIMEOUT_S = 300.0
_END_TIMEOUT_S = 20.0
_POLL_INTERVAL_S = 0.02
_PR_SET_CHILD_SUBREAPER = 36

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Twin:
    """A way to train.

    Attributes:
        make_command: Writes what it needs into a folder, and says what to run there.
        committed: Pattern of the files of which one is written when a checkpoint is whole.
    """

    make_command: Callable[[Path], list[str]]
    committed: str


def launcher(*arguments: str, job: str = _JOB) -> Twin:
    """``launcher run``, with further arguments; a job of another kind is named twin too."""

    def make_command(folder: Path) -> list[str]:
        (folder / "twin.yaml").write_text(job)
        return [str(Path(sys.executable).with_name("launcher")), "run", "twin.yaml", "--json", *arguments]

    return Twin(make_command, f"{LAUNCHER_RUN}/checkpoints/*/manifest-*.json")


def stock(*, script: str = _SCRIPT, every_steps: int = 20, **ray_init: object) -> Twin:
    """A stock script that saves every so many steps; ``ray_init``: what it passes to ``ray.init``."""

    def make_command(folder: Path) -> list[str]:
        values = {"RAY_INIT": ray_init, "STORAGE": str(folder / "results"), "EVERY_STEPS": every_steps}
        text = script
        for name, value in values.items():
            text = text.replace(name, repr(value))
        (folder / "stock.py").write_text(text)
        return [sys.executable, "stock.py"]

    return Twin(make_command, "results/twin/checkpoint_manager_snapshot.json")


@dataclass(frozen=True, slots=True)
class Stamp:
    """The first step of a training process."""

    rank: int
    host: str
    pid: int
    time: float


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a training process, counted from 1."""

    number: int
    time: float


class Training:
    """A twin that trains, in a folder of its own."""

    def __init__(self, twin: Twin, folder: Path, wrap: Callable[[list[str]], list[str]] = list) -> None:
        """``wrap``: turns its command into one that runs elsewhere."""
        self.folder = folder
        self._committed = twin.committed
        self._stamps = folder / "stamps"
        self._stamps.mkdir()
        write_optimizer(folder, self._stamps)
        command = wrap(twin.make_command(folder))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with open(folder / "output", "wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._trains_since = 0.0

    def wait_until_it_trains(self, before: frozenset[Stamp] = frozenset()) -> float:
        """Waits until every rank has taken a step in a process without a stamp in ``before``; returns when that was."""

        def last_of_first_steps() -> float | None:
            first: dict[int, float] = {}
            for stamp in self.stamps() - before:
                first[stamp.rank] = min(stamp.time, first.get(stamp.rank, stamp.time))
            return max(first.values()) if len(first) == NUM_WORKERS else None

        self._trains_since = self.wait_for(last_of_first_steps)
        return self._trains_since

    def wait_for_checkpoint(self) -> None:
        """Waits for one that is newer than its training."""

        def is_committed() -> bool:
            for path in self.folder.glob(self._committed):
                with suppress(FileNotFoundError):  # only the newest are kept
                    if path.stat().st_mtime > self._trains_since:
                        return True
            return False

        self.wait_for(is_committed)

    def end(self) -> None:
        """Ends every process of it: as Ctrl-C does, and by their own numbers those that are left after that."""
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_TIMEOUT_S)
        while left := descendants(os.getpid()):
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(_POLL_INTERVAL_S)

    def wait_for(self, find: Callable[[], T | None]) -> T:
        """Waits until ``find`` finds something, and returns it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not (found := find()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"it ended, or did nothing for {_TIMEOUT_S:.0f} s:\n{self.output()}")
            time.sleep(_POLL_INTERVAL_S)
        return found

    def output(self) -> str:
        """The last of what it printed."""
        return (self.folder / "output").read_text(errors="replace")[-4000:]

    def stamps(self) -> frozenset[Stamp]:
        """The first steps of all training processes so far."""
        return stamps_in(self._stamps)

    def steps(self, rank: int) -> list[list[Step]]:
        """All steps that a rank has taken so far, a list for each process that it had."""
        return [list(map(_read_step, path.read_text().splitlines())) for path in self._stamps.glob(f"{rank}.*")]

    def newest_stamp(self, rank: int) -> Stamp:
        """The first step of the process that a rank has now."""
        return max((stamp for stamp in self.stamps() if stamp.rank == rank), key=lambda stamp: stamp.time)


def write_optimizer(folder: Path, stamps: Path) -> None:
    """Writes ``stamped.py``, the optimizer of all twins; ``stamps``: the folder that it writes to, wherever it runs."""
    (folder / "stamped.py").write_text(_OPTIMIZER.replace("FOLDER_OF_STAMPS", repr(str(stamps))))


def stamps_in(folder: Path) -> frozenset[Stamp]:
    """The first steps of all training processes so far that write to a folder."""
    return frozenset(map(_read_stamp, folder.glob("[0-9]*.*")))


@contextmanager
def running(twin: Twin) -> Iterator[Training]:
    """A twin that trains, until the context ends; then, at the latest, all its processes end."""
    _adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="launcher-benchmark-", ignore_cleanup_errors=True) as folder:
        training = Training(twin, Path(folder))
        try:
            training.wait_until_it_trains()
            yield training
        finally:
            training.end()


def seconds_to(training: Training, fault: float, kinds: Sequence[str]) -> dict[str, float]:
    """From a fault to the first event of each kind after it, as the launcher's event log tells; stock has none."""
    moments = {kind: [event["time"] for event in events(training.folder / LAUNCHER_RUN, kind)] for kind in kinds}
    return {kind: min(after) - fault for kind, times in moments.items() if (after := [*filter(fault.__lt__, times)])}


def _read_stamp(path: Path) -> Stamp:
    rank, _, rest = path.name.partition(".")
    host, _, pid = rest.rpartition(".")
    with open(path) as steps:
        return Stamp(int(rank), host, int(pid), _read_step(steps.readline()).time)


def _read_step(line: str) -> Step:
    number, moment = line.split()
    return Step(int(number), float(moment))


def _adopt_orphans() -> None:
    """Makes this process the parent of descendants that lose theirs, so that it finds them at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
