"""A model, data and a loss of one's own, beside the job file; and what happens when they raise."""

import signal
from pathlib import Path

import pytest

from tests.e2e.command import Ended, Running, events, launcher, rows

MINE = '''
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset


class Points(Dataset):
    """x in the unit square; the class says on which side of the diagonal it lies."""

    def __init__(self, length, noise=0.0, broken_at=None, repaired=None):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(length, 2, generator=generator)
        self.noise, self.broken_at, self.repaired = noise, broken_at, repaired

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        if number == self.broken_at and not (self.repaired and Path(self.repaired).exists()):
            if self.repaired:
                Path(self.repaired).touch()
            raise OSError(f"disk of sample {number} is on fire")
        x = self.x[number] + self.noise * torch.randn(2)
        return x, torch.tensor(float(self.x[number].sum() > 1))


def side(width):
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 1), nn.Flatten(0))


def distance(output, target, power=2.0):
    return (output - target).abs() ** power


class Descent(torch.optim.SGD):
    pass
'''
JOB = """
model: {_target_: mine.side, width: 16}
data:
  train: {_target_: mine.Points, length: 256, noise: 0.05}
  val: {_target_: mine.Points, length: 37}
loss: {_target_: mine.distance, power: 2.0}
optimizer: {_target_: mine.Descent, lr: 0.1}
train: {epochs: 3, global_batch: 32, shards: 4}
workers: {num: 2}
tracking: {mode: disabled}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "own.yaml").write_text(JOB)
    return tmp_path


def run(home: Path, *overrides: str) -> Ended:
    return launcher("run", home / "own.yaml", *overrides, "--json", cwd=home / "work")


def test_own_parts_train(home: Path) -> None:
    ended = run(home)
    assert ended.exit_code == 0, ended.stderr
    result = ended.document
    assert result["step"] == 24
    assert result["metrics"]["val/loss"] < 0.25
    assert "val/accuracy" not in result["metrics"], "float targets have no classes"
    assert Path(result["run"]) == home / "work/runs/own"


def test_accuracy_of_no_classes_is_refused(home: Path) -> None:
    ended = run(home, "checkpoint.best={metric: val/accuracy, mode: max}")
    assert ended.exit_code == 2
    assert "checkpoint.best.metric val/accuracy needs targets that are class numbers" in ended.stderr


def test_an_exception_of_theirs_is_told_once(home: Path) -> None:
    """The second time it is raised at the same step and line it is the code's, whatever the budget says."""
    ended = run(home, "data.train.broken_at=100", "workers.max_failures.code=5")
    assert ended.exit_code == 1
    assert ended.document["status"] == "failed"
    assert "disk of sample 100" in ended.document["error"]
    assert ended.stderr.count("OSError: disk of sample 100 is on fire") == 3, "warning, message and traceback"
    assert ended.stderr.count("Traceback (most recent call last)") == 1
    assert 'mine.py", line' in ended.stderr
    assert "/jobs/training/loop.py" not in ended.stderr
    assert "worker" in ended.stderr
    assert "step" in ended.stderr
    started = events(home / "work/runs/own", "attempt_started")
    assert len(started) == 2
    status = launcher("status", home / "work/runs/own", "--json", cwd=home).document
    assert status["status"] == "failed"
    assert "disk of sample 100" in status["error"]
    assert (status["failure"]["cause"], status["failures"]["code"]) == ("code", 2)


def test_an_exception_that_does_not_come_back_is_survived(home: Path) -> None:
    ended = run(home, "data.train.broken_at=100", f"data.train.repaired={home / 'repaired'}")
    assert ended.exit_code == 0, ended.stderr
    assert (ended.document["status"], ended.document["step"], ended.document["attempts"]) == ("completed", 24, 2)
    (lost,) = events(home / "work/runs/own", "worker_lost")
    assert "OSError: disk of sample 100 is on fire" in lost["reason"]


def test_a_driver_killed_as_soon_as_the_run_exists_is_resumed_from_elsewhere(home: Path) -> None:
    """What a resume needs beside the description, such as where the own parts lie, is written before it."""
    (home / "elsewhere").mkdir()
    killed = Running(("run", home / "own.yaml"), cwd=home / "work")
    store = home / "work/runs/own"
    killed.wait_until((store / "job.yaml").exists)
    killed.signal_group(signal.SIGKILL)
    killed.wait()
    resumed = launcher("resume", store, "--json", cwd=home / "elsewhere")
    assert resumed.exit_code == 0, resumed.stderr
    assert run(home, "name=undisturbed").exit_code == 0
    assert rows(store) == rows(home / "work/runs/undisturbed")


def test_a_resume_with_other_code_says_so_once(home: Path) -> None:
    first = run(home, "train.max_steps=8")
    (home / "mine.py").write_text(MINE + "# one more line\n")
    resumed = launcher("resume", first.document["run"], "--json", cwd=home)

    assert (first.exit_code, resumed.exit_code) == (0, 0), resumed.stderr
    assert resumed.document["step"] == 24
    before, now = (
        [group["code"]["mine"][:12] for group in told["workers"]]
        for told in events(home / "work/runs/own", "environment")
    )
    assert (
        f"the run began on other workers: code of mine {before[0]} -> {now[0]}; the bits may differ" in resumed.stderr
    )
    assert first.stderr.count("bits") + resumed.stderr.count("bits") == 1
