"""A laptop, a store and two clusters.

A run is submitted to one, loses a host, is stopped there, is submitted again, loses its driver, and ends on the other.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.process.training_process import ACTIVITY_VARIABLE
from tests.e2e.command import JOBS, Ended, Running, launcher, rows
from tests.faults.hosts import HEAD_SETTINGS, JOBS_API, RAY, Host, wait_for_jobs_api
from tests.faults.injection import Fault, fired, release

pytestmark = pytest.mark.slow

HELD_AT = (12, 22, 32)
"""The steps at which one attempt after the other waits for what is done to its hosts."""
SAVED_AT = 30
"""The step of the last checkpoint that the driver commits before its host loses its power."""
GONE_WITHIN_S = 60.0
"""How soon after the death of its driver the bucket alone tells that a run has none."""
MINE = """
import torch


class Loss(torch.nn.CrossEntropyLoss):
    def forward(self, *arguments):
        return super().forward(*arguments) / 2
"""
READ_RUN = """
import json, sys
from cluster.run.run_directory import RunDirectory

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


def test_from_a_laptop(make_hosts, tmp_path: Path, make_plan, monkeypatch: pytest.MonkeyPatch) -> None:
    head, second, third, fourth, fifth, laptop, store = make_hosts(
        "head", "second", "third", "fourth", "fifth", "laptop", "store"
    )
    folder, away = tmp_path / "job", tmp_path / "away"
    folder.mkdir()
    away.mkdir()
    (folder / "digits.yaml").write_text((JOBS / "digits.yaml").read_text())
    (folder / "mine.py").write_text(MINE)
    changes = (
        "train.epochs=3", "checkpoint.every_steps=10", "workers.cpus=1", "workers.num=[1,3]", "tracking.mode=disabled",
        "loss={_target_: mine.Loss, label_smoothing: 0.1}",
    )  # fmt: skip
    plan = make_plan(*(Fault(kind="hold", doing="forward", step=step) for step in HELD_AT))

    with store_on(store, tmp_path / "s3") as environment:

        def of(host: Host, settings: Mapping[str, str] = {}) -> dict[str, str]:
            """What a host has in its environment; a cache of its own, though the files are the machine's."""
            return {**settings, **environment, "XDG_CACHE_HOME": str(tmp_path / f"cache-{host.name}")}

        def begin(*words: object, on: Host = laptop, cwd: Path = tmp_path) -> Running:
            return Running(words, tmp_path, lambda command: on.command(command, cwd, of(on)), on_ray=True)

        def ask(*words: object, cwd: Path = tmp_path) -> Ended:
            return begin(*words, "--json", cwd=cwd).wait()

        def read_run() -> dict[str, Any]:
            command = laptop.command([sys.executable, "-c", READ_RUN, run], tmp_path, environment)
            read: dict[str, Any] = json.loads(subprocess.check_output(command))
            return read

        def told(kind: str) -> list[dict[str, Any]]:
            """The events of one kind that the bucket tells of."""
            return [event for event in read_run()["events"] if event["kind"] == kind]

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
        submit, run = ("submit", "digits.yaml", *changes, "store=s3://runs", "--cluster", ours), "s3://runs/digits"
        submitted = begin(*submit, "--wait", cwd=away / "job")
        submitted.wait_until(lambda: 0 in fired(plan))
        submitted.signal_group(signal.SIGKILL)
        submitted.wait()
        status = ask("status", run, "--cluster", ours).document
        assert (status["status"], status["job_status"], status["workers"]) == ("running", "running", 3)
        job = status["job"]

        third.power_off()
        following = begin("logs", run, "--follow", "--cluster", ours)
        following.wait_until(lambda: 1 in fired(plan))
        stop = [RAY, "job", "stop", "--no-wait", job, "--address", head.jobs_url]
        subprocess.run(laptop.command(stop, tmp_path), check=True, capture_output=True)
        following.wait_until(lambda: bool(told("stop_requested")))
        release(plan, 1)
        followed = following.wait()
        assert followed.exit_code == 0, followed.stderr
        assert f"--- job {job}" in followed.stderr
        stopped = ask("status", run, "--cluster", ours).document
        assert (stopped["status"], stopped["job_status"]) == ("stopped", "stopped")
        assert HELD_AT[1] < stopped["step"] < SAVED_AT, followed.stdout

        again = ask(*submit, cwd=away / "job")
        assert again.exit_code == 0, again.stderr
        assert (job[-2:], again.document["job"]) == ("-0", f"{job[:-2]}-1")
        following = begin("logs", run, "--follow")
        following.wait_until(lambda: 2 in fired(plan) and told("checkpoint")[-1]["step"] == SAVED_AT)
        asked = ask("stop", run, "--timeout", 1)  # what is held does not stop yet
        assert "still running 1 s after it was asked to stop" in asked.stderr

        head.power_off()  # and with it the driver; the next one is not asked to stop
        off_at = time.monotonic()
        assert ask("status", run).document["status"] == "running"
        monkeypatch.delenv(ACTIVITY_VARIABLE)  # nothing else is held
        fourth.start_ray(environment=of(fourth, HEAD_SETTINGS))
        home = launcher(
            "run", "digits.yaml", *changes, "workers.num=1", f"store={tmp_path / 'home'}", "--json", cwd=folder
        )
        assert home.exit_code == 0, home.stderr
        fifth.start_ray(fourth, environment=of(fifth))
        for host in (fourth, fifth):
            host.wait_for_ray()
        asked_at = time.monotonic()
        while (status := ask("status", run).document)["status"] == "running":
            assert asked_at - off_at < GONE_WITHIN_S, status
            asked_at = time.monotonic()
        assert status["status"] == "failed"
        assert f"the driver on {head.name} has said nothing for " in status["error"]
        second.power_off()

        ended = begin("resume", run, "--cluster", fourth.ray_address, "--json", on=fourth).wait()
        assert ended.exit_code == 0, ended.stderr
        assert following.wait().exit_code == 0
        found = read_run()

    assert (ended.document["status"], ended.document["state_sha256"]) == ("completed", home.document["state_sha256"])
    assert found["rows"] == [json.loads(line) for line in rows(tmp_path / "home/digits").splitlines()]
    attempts = [each["workers"] for each in found["events"] if each["kind"] == "attempt_started"]
    assert [{worker["address"] for worker in workers} for workers in attempts] == [
        {head.address, second.address, third.address},
        {head.address, second.address},
        {head.address, second.address},
        {fourth.address, fifth.address},
    ]
    (loss,) = [each for each in found["events"] if each["kind"] == "worker_lost"]
    assert (loss["cause"], loss["address"]) == ("node_lost", third.address)
    began_at = [each["step"] for each in found["events"] if each["kind"] == "training"]
    assert began_at[2:] == [stopped["step"], SAVED_AT]
