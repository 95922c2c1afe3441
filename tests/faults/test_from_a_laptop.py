"""A laptop, a store and two clusters: a run is submitted to one, loses a host, is stopped, and ends on the other."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.faults import Fault, fired, release
from tests.e2e.command import JOBS, Ended, Running, launcher, rows
from tests.faults.hosts import HEAD_SETTINGS, JOBS_API, Host, hosts, wait_for_jobs_api, why_there_can_be_none

pytestmark = pytest.mark.slow

HELD_AT = (12, 22)
"""The steps at which one attempt after the other waits for what is done to its hosts."""
MINE = """
import pathlib
import time

import torch


class Loss(torch.nn.CrossEntropyLoss):
    def __init__(self, while_there, **keys):
        super().__init__(**keys)
        self._while_there = pathlib.Path(while_there)

    def forward(self, *arguments):
        if self._while_there.exists():
            time.sleep(0.5)
        return super().forward(*arguments)
"""
READ_RUN = """
import json, sys
from cluster.run_directory import RunDirectory

run = RunDirectory(sys.argv[1])
print(json.dumps({"rows": run.metrics().read(), "events": run.events().read()}))
"""


@contextmanager
def store_on(host: Host, folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server with a bucket, runs, on a host; the variables with which others reach it."""
    command = host.command([sys.executable, "-m", "tests.stores", folder, host.address], folder.parent)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())  # it ends by itself if it does not start
        finally:
            server.communicate()  # it ends when its stdin does


@pytest.fixture
def seven() -> Iterator[list[Host]]:
    if reason := why_there_can_be_none():
        pytest.skip(reason)
    with hosts("head", "second", "third", "fourth", "fifth", "laptop", "store") as made:
        yield made


def test_from_a_laptop(seven: list[Host], tmp_path: Path, make_plan) -> None:
    head, second, third, fourth, fifth, laptop, store = seven
    folder, slow, away = tmp_path / "job", tmp_path / "slow", tmp_path / "away"
    folder.mkdir()
    away.mkdir()
    (folder / "digits.yaml").write_text((JOBS / "digits.yaml").read_text())
    (folder / "mine.py").write_text(MINE)
    changes = (
        "train.epochs=3", "checkpoint.every_steps=10", "workers.cpus=1", "workers.num=[1,3]", "tracking.mode=disabled",
        f"loss={{_target_: mine.Loss, label_smoothing: 0.1, while_there: {slow}}}",
    )  # fmt: skip
    home = launcher("run", "digits.yaml", *changes, "workers.num=1", f"store={tmp_path / 'home'}", "--json", cwd=folder)
    assert home.exit_code == 0, home.stderr
    plan = make_plan(*(Fault(kind="hold", doing="forward", step=step) for step in HELD_AT))

    with store_on(store, tmp_path / "s3") as environment:

        def of(host: Host, settings: Mapping[str, str] = {}) -> dict[str, str]:
            """What a host has in its environment; a cache of its own, though the files are the machine's."""
            return {**settings, **environment, "XDG_CACHE_HOME": str(tmp_path / f"cache-{host.name}")}

        def begin(*words: object, on: Host = laptop, cwd: Path = tmp_path) -> Running:
            return Running(words, tmp_path, lambda command: on.command(command, cwd, of(on)), on_ray=True)

        def ask(*words: object) -> Ended:
            return begin(*words, "--json").wait()

        # What lies on the laptop lies nowhere else.
        only_here = f"mount -t tmpfs laptop {away} && cp -r {folder} {away}"
        subprocess.run(laptop.command(["sh", "-c", only_here], tmp_path), check=True)

        head.start_ray(environment=of(head, HEAD_SETTINGS), options=JOBS_API)
        for host in (second, third):
            host.start_ray(head, environment=of(host))
        for host in (head, second, third):
            host.wait_for_ray()
        wait_for_jobs_api(head, laptop, tmp_path)
        ours = tmp_path / "ours.yaml"
        ours.write_text(f"kind: ray\naddress: {head.jobs_url}\nvenv: {sys.prefix}\nenv: [{', '.join(environment)}]\n")
        slow.touch()
        job = ("submit", "digits.yaml", *changes, "store=s3://runs", "--cluster", ours, "--wait")
        submitted = begin(*job, cwd=away / "job")
        submitted.wait_until(lambda: 0 in fired(plan))
        submitted.signal_group(signal.SIGKILL)
        submitted.wait()
        run = "s3://runs/digits"
        told = ask("status", run, "--cluster", ours).document
        assert (told["status"], told["job_status"], told["workers"]) == ("running", "running", 3)

        third.power_off()
        following = begin("logs", run, "--follow")
        following.wait_until(lambda: 1 in fired(plan))
        asked = ask("stop", run, "--timeout", 1)  # what is held does not stop yet
        assert "still running 1 s after it was asked to stop" in asked.stderr
        release(plan, 1)
        stopped = ask("stop", run)
        assert (stopped.exit_code, stopped.document["status"]) == (0, "stopped"), stopped.stderr
        assert following.wait().exit_code == 0
        for host in (head, second):
            host.power_off()
        slow.unlink()
        assert ask("status", run).document["status"] == "stopped"

        fourth.start_ray(environment=of(fourth, HEAD_SETTINGS))
        fifth.start_ray(fourth, environment=of(fifth))
        for host in (fourth, fifth):
            host.wait_for_ray()
        ended = begin("resume", run, "--cluster", fourth.ray_address, "--json", on=fourth).wait()
        assert ended.exit_code == 0, ended.stderr
        read = subprocess.run(
            laptop.command([sys.executable, "-c", READ_RUN, run], tmp_path, environment),
            capture_output=True, text=True, check=True,
        )  # fmt: skip

    assert (ended.document["status"], ended.document["state_sha256"]) == ("completed", home.document["state_sha256"])
    found: dict[str, Any] = json.loads(read.stdout)
    assert found["rows"] == [json.loads(line) for line in rows(tmp_path / "home/digits").splitlines()]
    attempts = [each["workers"] for each in found["events"] if each["kind"] == "attempt_started"]
    assert [{worker["address"] for worker in workers} for workers in attempts] == [
        {head.address, second.address, third.address},
        {head.address, second.address},
        {fourth.address, fifth.address},
    ]
    (loss,) = [each for each in found["events"] if each["kind"] == "worker_lost"]
    assert (loss["cause"], loss["address"]) == ("node_lost", third.address)
