"""Hosts lose power, are cut off, come back, are drained: the run goes on with those there are, to the same bits."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, events, rows
from tests.faults.hosts import HEAD_SETTINGS, Host, hosts, start_ray, why_there_can_be_none

pytestmark = pytest.mark.slow

BRAKE = """\
import time
from pathlib import Path


class Brake:
    \"\"\"Changes no image; takes its time as long as there is a file.\"\"\"

    def __init__(self, path):
        self.path = Path(path)

    def __call__(self, image):
        if self.path.exists():
            time.sleep(0.01)
        return image
"""


@pytest.fixture
def three() -> Iterator[list[Host]]:
    if reason := why_there_can_be_none():
        pytest.skip(reason)
    with hosts("head", "second", "third") as made:
        yield made


def test_what_a_host_is(three: list[Host], tmp_path: Path) -> None:
    """The tests and benchmarks of lost hosts rest on this."""
    server, client, _ = three

    def serve() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(server.command([sys.executable, "-m", "http.server", "80"], tmp_path))
        while not reaches(server):
            assert process.poll() is None
        return process

    def reaches(host: Host) -> bool:
        """Whether the host reaches the server."""
        connect = f"import socket; socket.create_connection(('{server.address}', 80), timeout=0.5)"
        asked = subprocess.run(host.command([sys.executable, "-c", connect], tmp_path), stderr=subprocess.DEVNULL)
        return asked.returncode == 0

    first = serve()
    assert reaches(client)
    client.cut()
    assert (reaches(client), reaches(server)) == (False, True)
    client.mend()
    assert reaches(client)
    server.power_off()
    assert first.wait(timeout=60) == -signal.SIGKILL
    assert not reaches(client)
    server.power_on()
    second = serve()
    assert reaches(client)
    server.end()
    second.wait(timeout=60)


def test_power_and_cables(three: list[Host], tmp_path: Path) -> None:
    """The third of three hosts loses its power, the second is cut off; the third comes back, and is then drained."""
    head, second, third = three
    start_ray(*three, head_settings=HEAD_SETTINGS)
    home, undisturbed_home = tmp_path / "disturbed", tmp_path / "undisturbed"
    for folder in (home, undisturbed_home):
        folder.mkdir()
        (folder / "brake.py").write_text(BRAKE)
    brake, run = tmp_path / "brake", home / "runs/digits"
    command = [
        *("run", JOBS / "digits.yaml", "--json", "tracking.mode=disabled"),
        *("train.epochs=6", "checkpoint.every_steps=10", "workers.cpus=1"),
        f"data.train.transform={{_target_: brake.Brake, path: {brake}}}",
    ]

    def has_saved(attempt: int) -> bool:
        began = [event["time"] for event in events(run, "training")]
        return len(began) > attempt and any(event["time"] > began[attempt] for event in events(run, "checkpoint"))

    brake.touch()
    on_cluster = [*command, "workers.num=[1,3]", "--cluster", head.ray_address]
    disturbed = Running(on_cluster, home, lambda words: head.command(words, home), on_ray=True)
    disturbed.wait_until(lambda: has_saved(0))
    third.power_off()
    undisturbed = Running(command, undisturbed_home)  # in the time in which the other one only waits
    disturbed.wait_until(lambda: has_saved(1))
    second.cut()
    disturbed.wait_until(lambda: has_saved(2))
    second.mend()  # too late for Ray, which has given it up
    third.power_on()
    third.start_ray(head)
    disturbed.wait_until(lambda: has_saved(3))
    (drained,) = [w["node"] for w in events(run, "attempt_started")[-1]["workers"] if w["address"] == third.address]
    notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60"]
    drain = ["ray", "drain-node", f"--address={head.ray_address}", f"--node-id={drained}", *notice]
    subprocess.run(head.command(drain, home), check=True, capture_output=True)
    disturbed.wait_until(lambda: has_saved(4))
    brake.unlink()
    ended, expected = disturbed.wait(), undisturbed.wait()

    assert (ended.exit_code, expected.exit_code) == (0, 0), ended.stderr + expected.stderr
    assert ended.stdout.count("\n") == 1, ended.stdout
    assert ended.document["state_sha256"] == expected.document["state_sha256"]
    assert rows(run) == rows(undisturbed_home / "runs/digits")
    assert ended.document["attempts"] == 5
    started = [{worker["address"] for worker in event["workers"]} for event in events(run, "attempt_started")]
    assert started == [
        {head.address, second.address, third.address},
        {head.address, second.address},
        {head.address},
        {head.address, third.address},
        {head.address},
    ]
    resizes = [(event["before"], event["workers"]) for event in events(run, "resized")]
    assert resizes == [(3, 2), (2, 1), (1, 2), (2, 1)]
    losses = events(run, "worker_lost")
    assert [(loss["cause"], loss["address"]) for loss in losses] == [
        ("node_lost", third.address),
        ("node_lost", second.address),
    ]
    for loss in losses:
        assert f"on node {loss['address']}: {loss['reason']}" in ended.stderr
    room, drain = events(run, "leaving")
    assert room["reason"] == "there is room for 2 workers"
    assert drain["reason"] == f"node {third.address} is being drained"
    steps = [event["step"] for event in events(run, "checkpoint")]
    for begun in events(run, "training")[3:]:
        assert begun["step"] in steps, "what was planned loses no step"
    assert not second.runs_ray, "what was cut off ends itself, its training process included"
