"""Room on a cluster that is shared, that grows, and that has more of it than is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.collectives.topology import workers_by_host
from cluster.run.run_directory import RunDirectory
from tests.e2e.command import JOBS, LIMIT_S, Ended, Running, events, launcher
from tests.faults.hosts import NETWORK_INTERFACE, Host
from tests.faults.injection import Fault, fired, release
from tests.faults.planned import bits, undisturbed
from tests.shards import write_shards

pytestmark = pytest.mark.slow

SHORT = ("train.epochs=2", "checkpoint.every_steps=10", "workers.cpus=1", "tracking.mode=disabled")
HELD_AT = 12
MOST_NODES = 2
"""That the autoscaler may start, each with room for one worker."""
FAKE_HEAD = "f" * 51 + "00000"
"""The id that Ray's fake provider of nodes takes the head to have."""
ON_CLUSTER = """
import sys, time, ray

ray.init(address=sys.argv[1], log_to_driver=False)
"""
WAIT_FOR_A_PLACE_IN_LINE = (
    ON_CLUSTER
    + """
while all(group["state"] != "PENDING" for group in ray.util.placement_group_table().values()):
    time.sleep(0.1)
"""
)
IMPATIENT = """
from torch import nn

import jobs.data
from jobs.images.indexing import listing_progress


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 16 * 20, 4))


def shards(urls):
    listing_progress._INTERVAL_S = 0.0
    return jobs.data.tar_shards(urls)
"""
SHOW_NODES = ON_CLUSTER + "\nprint(*[node['NodeID'] for node in ray.nodes() if node['Alive']])\n"


def begin(head: Host, home: Path, name: str, *words: object) -> Running:
    """A run that a driver on the head begins."""
    command = ["run", JOBS / "digits.yaml", *SHORT, f"name={name}", *words, "--cluster", head.ray_address, "--json"]
    return Running(command, home, lambda line: head.command(line, home), on_ray=True)


def ask(head: Host, script: str, cwd: Path) -> str:
    command = head.command([sys.executable, "-c", script, head.ray_address], cwd)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout


def assert_listing_is_told(head: Host, folder: Path) -> None:
    """A dry run on a node tells of its progress while it lists the data; here without waiting for the usual time."""
    write_shards(folder / "shards")
    (folder / "mine.py").write_text(IMPATIENT)
    description = {
        "name": "images", "store": str(folder / "runs"), "model": {"_target_": "mine.Net"},
        "data": {"train": {"_target_": "mine.shards", "urls": str(folder / "shards")}},
        "loss": "CrossEntropyLoss", "optimizer": {"_target_": "SGD", "lr": 0.01},
        "train": {"global_batch": 4, "shards": 2}, "workers": {"cpus": 1},
    }  # fmt: skip
    (folder / "images.yaml").write_text(json.dumps(description))
    command = ["plan", "images.yaml", "--cluster", head.ray_address]
    planned = Running(command, folder, lambda line: head.command(line, folder), on_ray=True).wait()
    assert planned.exit_code == 0, planned.stderr
    assert f": listing {folder / 'shards'}: 15 samples, " in planned.stderr


def assert_undisturbed(ended: Ended, run: Path) -> None:
    assert bits(ended, run) == undisturbed(SHORT)
    assert ended.document["failures"] == {"machine": 0, "preemption": 0, "code": 0}
    assert ended.document["waits_for"] is None


def test_a_cluster_that_is_shared(make_hosts, tmp_path: Path, make_plan) -> None:
    """Each of two hosts has two places."""
    two = make_hosts("head", "second")
    head, runs = two[0], tmp_path / "runs"
    plan = make_plan(Fault(kind="hold", doing="forward", step=HELD_AT))
    for host, of in zip(two, (None, head)):
        host.start_ray(of, num_cpus=2)
    for host in two:
        host.wait_for_ray()
    assert_listing_is_told(head, tmp_path)
    refused = begin(head, tmp_path, "refused", "workers.accelerator=H100").wait()
    assert refused.exit_code == 2, refused.stderr
    assert "so many workers of 1 CPU, H100 fit on its 2 nodes, got 2" in refused.stderr

    # Of four places one is left for the second run, to try its job out in; then it waits for two, and holds none.
    first = begin(head, tmp_path, "first", "workers.num=3")
    first.wait_until(lambda: 0 in fired(plan))
    second = begin(head, tmp_path, "second", "workers.num=2")
    second.wait_until(lambda: (RunDirectory(str(runs / "second")).read_status() or {}).get("waits_for") is not None)
    told = launcher("status", runs / "second", cwd=tmp_path).stdout
    assert "  waits for  workers: there is room for 1 of at least 2 workers of 1 CPU each, on 2 nodes\n" in told
    ask(head, WAIT_FOR_A_PLACE_IN_LINE, tmp_path)
    release(plan, 0)
    for name, run in (("first", first), ("second", second)):
        assert_undisturbed(run.wait(), runs / name)
    (attempt,) = events(runs / "first", "attempt_started")
    addresses_by_rank = [worker["address"] for worker in attempt["workers"]]
    assert sorted(workers_by_host(addresses_by_rank)) == [1, 2], "workers of a host have neighbouring ranks"

    addresses = {}
    for placement in ("spread", "pack"):
        ended = begin(head, tmp_path, placement, f"workers.placement={placement}").wait()
        assert_undisturbed(ended, runs / placement)
        (attempt,) = events(runs / placement, "attempt_started")
        addresses[placement] = {worker["address"] for worker in attempt["workers"]}
    assert addresses["spread"] == {host.address for host in two}
    assert len(addresses["pack"]) == 1


def test_an_autoscaler_starts_nodes_because_runs_ask(make_hosts, tmp_path: Path) -> None:
    """From no node but the head, which holds no worker: one to try the job out on, then as many as the run needs."""
    (head,) = make_hosts("head")
    start_autoscaler(head, tmp_path)
    assert ask(head, SHOW_NODES, tmp_path).split() == [FAKE_HEAD]
    refused = begin(head, tmp_path, "refused").wait()
    assert refused.exit_code == 2, refused.stderr
    assert "if its autoscaler may start such nodes, write them as cluster.autoscaler" in refused.stderr
    assert not (tmp_path / "runs/refused").exists()

    grows = f"cluster.autoscaler=[{{nodes: {MOST_NODES}, cpus: 1}}]"
    first, second = (tmp_path / "runs" / name for name in ("first", "second"))
    begun = {first: begin(head, tmp_path, "first", f"workers.num={MOST_NODES}", grows)}
    begun[first].wait_until(lambda: len(events(first, "waiting")) == 1)
    begun[second] = begin(head, tmp_path, "second", f"workers.num={MOST_NODES}", grows)
    for run, running in begun.items():
        ended = running.wait()
        assert_undisturbed(ended, run)
        (attempt,) = events(run, "attempt_started")
        assert FAKE_HEAD not in {worker["node"] for worker in attempt["workers"]}
        if run == first:
            assert "waiting for room for one worker of 1 CPU" in ended.stderr
            assert "an autoscaler, if there is one, is asked for them" in ended.stderr


def start_autoscaler(head: Host, folder: Path) -> None:
    """A head of no CPU with Ray's own autoscaler, and its fake provider: nodes are processes of the head's host."""
    # It asks for the way to the Internet to find its own address.
    subprocess.run(head.command(["ip", "route", "add", "default", "dev", NETWORK_INTERFACE], folder), check=True)
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config = {
        **{f"{name}_commands": [] for name in commands},
        "cluster_synced_files": [],
        "cluster_name": "fake",
        "max_workers": MOST_NODES,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": head.ray_address,
            "head_node_id": FAKE_HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 100 * 2**20},
                "node_config": {},
                "max_workers": MOST_NODES,
            },
        },
    }
    path = folder / "autoscaler.yaml"
    path.write_text(json.dumps(config))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    head.start_ray(num_cpus=0, environment=environment, options=(f"--autoscaling-config={path}",))
    head.wait_for_ray()
