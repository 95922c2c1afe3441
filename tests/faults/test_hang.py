"""A worker that stops making progress is noticed, named, and replaced; the bits are those of an undisturbed run."""

from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Ended, events, launcher
from tests.faults import planned
from tests.faults.injection import Fault, fired
from tests.faults.planned import Bits, bits

pytestmark = pytest.mark.slow

SHORT = ("train.epochs=2", "checkpoint.every_steps=10", "workers.hang_timeout_s=6", "tracking.mode=disabled")
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
def undisturbed() -> Bits:
    return planned.undisturbed((*SHORT, "data.train.transform=null"))


def assert_same(ended: Ended, run: Path, undisturbed: Bits) -> None:
    assert bits(ended, run) == undisturbed
    assert ended.document["attempts"] == 2


def test_a_stopped_process(tmp_path: Path, make_plan, undisturbed: Bits) -> None:
    plan, run = make_plan(Fault(kind="stop", doing="forward", step=12, rank=1)), tmp_path / "runs/digits"
    ended = launcher("run", JOBS / "digits.yaml", *SHORT, "data.train.transform=null", "--json", cwd=tmp_path)

    assert fired(plan).keys() == {0}
    assert_same(ended, run, undisturbed)
    (hung,) = events(run, "worker_hung")
    assert (hung["rank"], hung["stack"]) == (1, "State:\tT (stopped)")
    assert hung["for_s"] >= 6
    assert "State: T (stopped)" in ended.stderr


def test_all_hang_before_their_first_step(tmp_path: Path, make_plan, undisturbed: Bits) -> None:
    plan = make_plan(*(Fault(kind="hang", doing="data", step=0, rank=rank) for rank in range(2)))
    overrides = ("data.train.transform=null", "workers.first_step_timeout_s=10")
    ended = launcher("run", JOBS / "digits.yaml", *SHORT, *overrides, "--json", cwd=tmp_path)

    assert fired(plan).keys() == {0, 1}
    assert_same(ended, tmp_path / "runs/digits", undisturbed)
    (hung,) = events(tmp_path / "runs/digits", "worker_hung")
    assert (hung["doing"], hung["step"], hung["is_first_step"]) == ("data", 0, True)
    assert "injection.py" in hung["stack"]
    assert "has not done its first step after" in ended.stderr


def test_an_endless_loop_in_the_data(tmp_path: Path, undisturbed: Bits) -> None:
    """Sample 700 is wanted by one worker; the other waits for it in the exchange, and is not blamed."""
    (tmp_path / "looping.py").write_text(LOOPING)
    text = (JOBS / "digits.yaml").read_text()
    (tmp_path / "digits.yaml").write_text(text)
    overrides = (
        f"data.train={{_target_: looping.Looping, split: train, mean: [0.3], std: [0.38], flag: {tmp_path / 'flag'}}}",
        "data.val.mean=[0.3]",
        "data.val.std=[0.38]",
    )
    ended = launcher("run", "digits.yaml", *SHORT, *overrides, "--json", cwd=tmp_path)

    assert (tmp_path / "flag").exists(), "the fault fired"
    assert_same(ended, tmp_path / "runs/digits", undisturbed)
    (hung,) = events(tmp_path / "runs/digits", "worker_hung")
    assert hung["doing"] == "data"
    assert "looping.py" in hung["stack"]
    assert f"worker {hung['rank']} on node" in ended.stderr
    assert "looping.py" in ended.stderr
