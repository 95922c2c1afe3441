"""A worker that is slower than the others is named, with what it is slow at; one among equals is not."""

from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, events, rows

pytestmark = pytest.mark.slow

SLOW = """\
import time

import torch.distributed as dist

import jobs.data


class Slow:
    \"\"\"The digits, of which some workers read each batch of a shard 120 ms late.\"\"\"

    def __init__(self, split, mean, std, late_ranks):
        self.digits = jobs.data.digits(split, mean=mean, std=std)
        self.late_ranks = late_ranks

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, number):
        if dist.is_initialized() and dist.get_rank() in self.late_ranks:
            time.sleep(0.120 / 16)
        return self.digits[number]
"""


def test_a_worker_that_reads_slowly(tmp_path: Path) -> None:
    """Beside it, on the same two cores and at the same time, a run whose workers are all as slow as that one."""
    (tmp_path / "slow.py").write_text(SLOW)
    text = (JOBS / "digits.yaml").read_text()
    running = {}
    for name, late_ranks in (("one", "[1]"), ("all", "[0, 1]")):
        (tmp_path / f"{name}.yaml").write_text(text)
        overrides = (
            f"name={name}", "data.val=null", "checkpoint.best=null", "train.epochs=9", "train.max_steps=90",
            "tracking.mode=disabled", "data.train.transform=null",
            f"data.train={{_target_: slow.Slow, split: train, mean: [0.3], std: [0.38], late_ranks: {late_ranks}}}",
        )  # fmt: skip
        running[name] = Running(["run", f"{name}.yaml", *overrides, "--json"], tmp_path)
    ended = {name: run.wait() for name, run in running.items()}

    for name, end in ended.items():
        assert end.exit_code == 0, f"{name}: {end.stderr}"
        time = end.document["time"]
        assert time["data"] + time["compute"] + time["exchange"] > 17, "time enough to be named"
    (slow,) = events(tmp_path / "runs/one", "worker_slow")
    assert (slow["rank"], slow["what"]) == (1, "data")
    assert slow["factor"] >= 1.5
    (warning,) = [line for line in ended["one"].stderr.splitlines() if line.startswith("warning")]
    assert warning == (
        f"warning: worker 1 on node {slow['node']} takes {slow['factor']:g} times as long as the others for its part "
        "of a step, mostly over data"
    )
    assert ended["one"].document["time"]["exchange"] > 0.5 * 90 * 0.240, "rank 0 waited"
    assert events(tmp_path / "runs/all", "worker_slow") == []
    assert "warning" not in ended["all"].stderr
    assert ended["one"].document["state_sha256"] == ended["all"].document["state_sha256"]
    assert rows(tmp_path / "runs/one") == rows(tmp_path / "runs/all")
