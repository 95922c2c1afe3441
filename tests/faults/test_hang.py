"""A worker that stops making progress is noticed, named, and replaced; the bits are those of an undisturbed run."""

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Ended, Running, checkpointed, events, launcher, rows, training_processes

SHORT = ("train.epochs=2", "checkpoint.every_steps=10", "workers.hang_timeout_s=4", "tracking.mode=disabled", "--json")
LOOPING = """\
import time
from pathlib import Path

import jobs.data


class Looping:
    \"\"\"The digits; once, in the whole life of the run, a sample takes for ever.\"\"\"

    def __init__(self, split, mean, std, flag):
        self.digits = jobs.data.digits(split, mean=mean, std=std)
        self.flag = Path(flag)

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, number):
        if number == 700 and not self.flag.exists():
            self.flag.touch()
            while True:
                time.sleep(0.1)
        return self.digits[number]
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    home = tmp_path_factory.mktemp("undisturbed")
    ended = launcher("run", JOBS / "digits.yaml", *SHORT, "data.train.transform=null", cwd=home)
    assert ended.exit_code == 0, ended.stderr
    return ended.document["state_sha256"], rows(home / "runs/digits")


def assert_same(ended: Ended, home: Path, undisturbed: tuple[str, bytes]) -> None:
    assert ended.exit_code == 0, ended.stderr
    assert (ended.document["state_sha256"], rows(home / "runs/digits")) == undisturbed
    assert ended.document["attempts"] == 2


def test_a_stopped_process(tmp_path: Path, undisturbed: tuple[str, bytes]) -> None:
    running = Running(["run", JOBS / "digits.yaml", *SHORT, "data.train.transform=null"], tmp_path)
    run = tmp_path / "runs/digits"
    running.wait_until(checkpointed(run, 10))
    stopped = training_processes(running.pid)[0]
    os.kill(stopped, signal.SIGSTOP)
    ended = running.wait()

    assert_same(ended, tmp_path, undisturbed)
    (hung,) = events(run, "worker_hung")
    assert hung["stack"] == "State:\tT (stopped)"
    assert hung["for_s"] < 8
    assert "State: T (stopped)" in ended.stderr.replace("\t", " ")


def test_an_endless_loop_in_the_data(tmp_path: Path, undisturbed: tuple[str, bytes]) -> None:
    """Sample 700 is wanted by one worker; the other waits for it in the exchange, and is not blamed."""
    (tmp_path / "looping.py").write_text(LOOPING)
    text = (JOBS / "digits.yaml").read_text()
    (tmp_path / "digits.yaml").write_text(text)
    overrides = (
        f"data.train={{_target_: looping.Looping, split: train, mean: [0.3], std: [0.38], flag: {tmp_path / 'flag'}}}",
        "data.val.mean=[0.3]",
        "data.val.std=[0.38]",
    )
    ended = launcher("run", "digits.yaml", *SHORT, *overrides, cwd=tmp_path)

    assert (tmp_path / "flag").exists(), "the fault fired"
    assert_same(ended, tmp_path, undisturbed)
    (hung,) = events(tmp_path / "runs/digits", "worker_hung")
    assert hung["doing"] == "data"
    assert "looping.py" in hung["stack"]
    assert f"worker {hung['rank']} on node" in ended.stderr
    assert "looping.py" in ended.stderr
