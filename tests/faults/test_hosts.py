"""Hosts lose power, are cut off, come back, are unlike, are drained: the run goes on, to the same bits."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, checkpointed, events
from tests.faults.hosts import HEAD_SETTINGS, RAY, Host, start_ray
from tests.faults.injection import Fault, fired, release
from tests.faults.planned import bits, undisturbed

pytestmark = pytest.mark.slow

EVERY_STEPS = 10
SHORT = ("train.epochs=3", f"checkpoint.every_steps={EVERY_STEPS}", "workers.cpus=1", "tracking.mode=disabled")
HELD_AT = (12, 22, 32, 42)
"""The steps at which one attempt after the other waits for what is done to its hosts."""


def test_what_a_host_is(make_hosts, tmp_path: Path) -> None:
    """The tests and benchmarks of lost hosts rest on this."""
    server, client = make_hosts("server", "client")

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


def test_a_cable_has_a_rate_and_a_counter(make_hosts, tmp_path: Path) -> None:
    """The benchmark of the exchange rests on this."""
    sender, receiver = make_hosts("sender", "receiver")
    num_bytes, mbit_per_s, burst = 4_000_000, 50, 2**17
    receive = f"""
import socket, time
server = socket.create_server(("{receiver.address}", 80))
print("listening", flush=True)
connection, _ = server.accept()
begin, left = time.monotonic(), {num_bytes}
while left:
    left -= len(connection.recv(left))
print(time.monotonic() - begin)
"""
    send = f"import socket; socket.create_connection(('{receiver.address}', 80)).sendall(bytes({num_bytes}))"

    def transfer() -> tuple[float, int]:
        """Sends the bytes; the seconds of that, and what has left the sender."""
        command = receiver.command([sys.executable, "-c", receive], tmp_path)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            before = sender.bytes_sent
            subprocess.run(sender.command([sys.executable, "-c", send], tmp_path), check=True)
            seconds = float(server.stdout.read())
        return seconds, sender.bytes_sent - before

    least_s = 8 * (num_bytes - burst) / (mbit_per_s * 1e6)
    for host in (sender, receiver):
        host.limit(mbit_per_s)
        seconds, sent = transfer()
        assert seconds > least_s, f"with a limit on {host.name}"
        assert num_bytes < sent < 1.2 * num_bytes
        host.limit(None)


def test_power_and_cables(make_hosts, tmp_path: Path, make_plan) -> None:
    """The third of three hosts loses its power, the second is cut off. Both come back, the second set up in another
    way; the third is drained.
    """
    head, second, third = make_hosts("head", "second", "third")
    plan = make_plan(*(Fault(kind="hold", doing="forward", step=step) for step in HELD_AT))
    start_ray(head, second, third, head_settings=HEAD_SETTINGS)
    home, run = tmp_path / "disturbed", tmp_path / "disturbed/runs/digits"
    home.mkdir()

    def is_held(number: int) -> bool:
        """Whether an attempt waits at the step of this number, its last checkpoint committed."""
        return number in fired(plan) and checkpointed(run, HELD_AT[number] // EVERY_STEPS * EVERY_STEPS)()

    on_cluster = ["run", JOBS / "digits.yaml", *SHORT, "--json", "workers.num=[1,3]", "--cluster", head.ray_address]
    disturbed = Running(on_cluster, home, lambda words: head.command(words, home), on_ray=True)
    disturbed.wait_until(lambda: is_held(0))
    third.power_off()
    expected = undisturbed(SHORT)  # in the time in which the other one only waits
    disturbed.wait_until(lambda: is_held(1))
    second.cut()
    disturbed.wait_until(lambda: is_held(2))
    second.mend()  # too late for Ray, which has given it up
    disturbed.wait_until(lambda: not second.runs_ray)  # what was cut off ends itself, its training process included
    second.end()
    for host, environment in ((second, {"NVIDIA_TF32_OVERRIDE": "0"}), (third, None)):
        host.power_on()
        host.start_ray(head, environment=environment)
    second.wait_for_ray()
    third.wait_for_ray()
    disturbed.wait_until(lambda: len(events(run, "leaving")) == 1)
    release(plan, 2)
    disturbed.wait_until(lambda: is_held(3))
    (drained,) = [w["node"] for w in events(run, "attempt_started")[-1]["workers"] if w["address"] == third.address]
    notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=600"]
    drain = [RAY, "drain-node", f"--address={head.ray_address}", f"--node-id={drained}", *notice]
    subprocess.run(head.command(drain, home), check=True, capture_output=True)
    disturbed.wait_until(lambda: len(events(run, "leaving")) == 2)
    release(plan, 3)
    ended = disturbed.wait()

    assert bits(ended, run) == expected
    assert ended.stdout.count("\n") == 1, ended.stdout
    assert ended.document["attempts"] == 6
    started = [{worker["address"] for worker in event["workers"]} for event in events(run, "attempt_started")]
    assert started == [
        {head.address, second.address, third.address},
        {head.address, second.address},
        {head.address},
        {head.address, second.address, third.address},
        {head.address, third.address},
        {head.address},
    ]
    resizes = [(event["before"], event["workers"]) for event in events(run, "resized")]
    assert resizes == [(3, 2), (2, 1), (1, 3), (3, 2), (2, 1)]
    losses = events(run, "worker_lost")
    assert [(loss["cause"], loss["address"]) for loss in losses] == [
        ("node_lost", third.address),
        ("node_lost", second.address),
    ]
    for loss in losses:
        assert f"on node {loss['address']}: {loss['reason']}" in ended.stderr
    room, drain = events(run, "leaving")
    assert room["reason"].startswith("there is room for ")
    assert drain["reason"] == f"node {third.address} is being drained"
    (left_out,) = events(run, "nodes_left_out")
    assert len(left_out["nodes"]) == 1
    assert left_out["reason"].startswith("workers differ: variables ")
    told = f"going on without node {second.address}, which cannot be used until Ray is started there anew: "
    assert told + left_out["reason"] in ended.stderr
    steps = [event["step"] for event in events(run, "checkpoint")]
    for begun in events(run, "training")[3:]:
        assert begun["step"] in steps, "what was planned loses no step"
