"""A cluster whose head has no CPUs to give: a job is tried out where it will train, in the place of one worker."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.command import Running, events
from tests.processes import descendants, wait_until

pytestmark = pytest.mark.slow

MINE = """
import os
import pathlib
import threading

import torch
from torch import nn
from torch.utils.data import TensorDataset


def points(length):
    assert os.environ["HAS_THE_DATA"]
    x = torch.rand(length, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 1).long())


class Net(nn.Linear):
    def __init__(self, fails=False, waits=None):
        super().__init__(2, 2)
        self.fails, self.waits = fails, waits

    def forward(self, x):
        if self.fails:
            raise ValueError("there is no such layer")
        if self.waits:
            pathlib.Path(self.waits).write_text(str(os.getpid()))
            threading.Event().wait()
        return super().forward(x)
"""
JOB = """
model: {_target_: mine.Net}
data: {train: {_target_: mine.points, length: 64}}
loss: CrossEntropyLoss
optimizer: {_target_: SGD, lr: 0.1}
train: {epochs: 1, global_batch: 16, shards: 2}
workers: {num: 1, cpus: 1}
tracking: {mode: disabled}
"""
FREE_CPUS = """
import json, sys
from cluster.ray.cluster import joined_cluster, nodes

with joined_cluster(sys.argv[1]):
    print(json.dumps([node.free.get("CPU", 0.0) for node in nodes()]))
"""


def test_a_head_that_only_drives(make_hosts, tmp_path: Path) -> None:
    head, second = make_hosts("head", "second")
    head.start_ray(num_cpus=0)
    second.start_ray(head, environment={"HAS_THE_DATA": "1"})
    for host in (head, second):
        host.wait_for_ray()
    (tmp_path / "own.yaml").write_text(JOB)
    (tmp_path / "mine.py").write_text(MINE)
    there = f"trying the job out: on node {second.address}"

    def begin(verb: str, *words: object) -> Running:
        command = [verb, "own.yaml", *words, "--cluster", head.ray_address, "--json"]
        return Running(command, tmp_path, lambda words: head.command(words, tmp_path), on_ray=True)

    def is_alive(pid: str) -> bool:
        asked = subprocess.run(second.command(["kill", "-0", pid], tmp_path), stderr=subprocess.DEVNULL)
        return asked.returncode == 0

    # One holds the only place until Ctrl-C; another one waits for it, a third one not for long.
    held = tmp_path / "held"
    holds = begin("run", "name=holds", f"model={{_target_: mine.Net, waits: {held}}}")
    holds.wait_until(lambda: held.exists() and held.read_text() != "")
    pid = held.read_text()
    assert is_alive(pid)
    refused = begin("run", "name=refused", "workers.wait_s=1").wait()
    assert refused.exit_code == 5
    assert refused.stderr.splitlines()[-1].startswith("error: there is no room for one worker of 1 CPU, after 1 s")
    waits = begin("run")
    waits.wait_until(lambda: "trying the job out: waiting for room for one worker of 1 CPU" in waits.stderr)
    (driver,) = [process.pid for process in descendants(holds.pid) if process.parent == holds.pid]
    os.kill(driver, signal.SIGINT)
    assert holds.wait().exit_code == 130
    wait_until(lambda: not is_alive(pid))
    ended = waits.wait()
    assert ended.exit_code == 0, ended.stderr
    assert (ended.document["status"], ended.document["step"]) == ("completed", 4)
    assert there in ended.stderr
    (started,) = events(tmp_path / "runs/own", "attempt_started")
    assert [worker["address"] for worker in started["workers"]] == [second.address]

    raised = begin("plan", "model.fails=true").wait()
    assert raised.exit_code == 2
    assert raised.stderr.splitlines() == [
        there,
        f"error: own.yaml: node {second.address}: model: forward on inputs of shape [8, 2] raised ValueError: there is "
        "no such layer; make model and data.train fit",
    ]

    def free_cpus() -> list[float]:
        command = head.command([sys.executable, "-c", FREE_CPUS, head.ray_address], tmp_path)
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    wait_until(lambda: sorted(free_cpus()) == [0.0, 1.0])
