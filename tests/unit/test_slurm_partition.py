"""The nodes of a partition of Slurm, in the forms that sinfo and scontrol print, and what is refused before sbatch."""

from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from cluster.errors import ClusterError
from cluster.kinds.slurm.jobs import SlurmJobs
from cluster.kinds.slurm.partition import gpus_from, nodes_from
from cluster.scheduler import Needs
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec

RECORDED = (
    "n1|idle|8|16000|gpu:fake:4|(null)\nn2|mixed|8|16000|gpu:fake:4|(null)\nn3|allocated|8|16000|gpu:fake:4|(null)\n"
)
"""By Slurm 22.05, as the next one."""
PARTITIONS = """\
PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE \
Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-3] State=UP
PartitionName=short Hidden=NO MaxNodes=2 MaxTime=1-00:00:00 MinNodes=0 MaxCPUsPerNode=6 Nodes=n[1-3] State=UP
PartitionName=off Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MaxCPUsPerNode=UNLIMITED Nodes=n[1-3] State=INACTIVE
"""
REAL = """\
gpu01|mixed|64|515000|gpu:a100:4(S:0-1)|a100,nvlink
gpu02|idle~|64|515000|gpu:a100:4(S:0-1),nvme:1|a100,nvlink
gpu03|mixed-|48|257000|gpu:v100:2(S:0),gpu:a100:2(S:1)|v100
gpu04|drained*|64|515000|gpu:a100:4(S:0-1)|a100
gpu05|allocated|64|515000|gpu:a100:4(S:0-1)|a100
cpu01|idle|128|1031000|(null)|(null)
gpu01|mixed|64|515000|gpu:a100:4(S:0-1)|a100,nvlink
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    fake.plan("scontrol", PARTITIONS)
    fake.plan("sinfo", RECORDED)
    return fake


def names_of(
    *, partition: str = "main", qos: str | None = None, time: str | None = None, constraint: str | None = None,
    exclude: str | None = None, **nodes: object,
) -> list[str]:  # fmt: skip
    spec = SlurmClusterSpec(
        partition=partition, qos=qos, time=time, constraint=constraint, exclude=exclude,
        nodes=SlurmNodesSpec(**{"cpus": 4, **nodes}),  # type: ignore[arg-type]
    )  # fmt: skip
    report = SlurmJobs(spec).inspect(Needs(store="s3://b", variables=(), check=""))
    assert (report.nodes, report.silent) == ((), ())
    for node in report.capacity.nodes:
        assert node.resources == node.free == spec.nodes.resources
        assert (node.address, node.drains_at, node.is_here) == (node.id, None, False)
    return [node.id for node in report.capacity.nodes]


def the_error(**asked: object) -> str:
    with pytest.raises(ClusterError) as raised:
        names_of(**asked)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_nodes_that_hold_the_job(slurm: FakeSlurm) -> None:
    assert names_of(cpus=8, gpus=4, gpu_type="fake", accelerator="A100", memory_gb=15) == ["n1", "n2", "n3"]
    assert slurm.calls == [
        "sinfo --noheader --Node --partition=main --format=%N|%T|%c|%m|%G|%f",
        "scontrol show partition --all --oneliner",
    ]


def test_the_forms_of_real_clusters(slurm: FakeSlurm) -> None:
    slurm.plan("sinfo", REAL)
    assert names_of() == ["gpu01", "gpu02", "gpu03", "gpu05", "cpu01"]
    assert names_of(gpus=4) == ["gpu01", "gpu02", "gpu03", "gpu05"]
    assert names_of(gpus=4, gpu_type="a100") == ["gpu01", "gpu02", "gpu05"]
    assert names_of(gpus=2, gpu_type="a100", memory_gb=300) == ["gpu01", "gpu02", "gpu05"]
    assert names_of(constraint="nvlink") == ["gpu01", "gpu02"]
    assert names_of(constraint="nvlink|v100") == ["gpu01", "gpu02", "gpu03", "gpu05", "cpu01"]


@pytest.mark.parametrize("state", ["idle", "mixed", "allocated", "completing", "planned", "reserved", "maint", "IDLE"])
@pytest.mark.parametrize("mark", ["", "~", "#", "!", "%", "$", "@", "^", "-", "+", "~-"])
def test_states_of_nodes_that_get_jobs(state: str, mark: str) -> None:
    (node,) = nodes_from(f"n1|{state}{mark}|8|16000|(null)|(null)\n")
    assert node.is_usable


@pytest.mark.parametrize(
    "state", ["down", "down*", "drained", "draining@", "fail", "failing*", "idle*", "inval", "down~"]
)
def test_states_of_nodes_that_get_no_jobs(state: str) -> None:
    (node,) = nodes_from(f"n1|{state}|8|16000|(null)|(null)\n")
    assert not node.is_usable


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}), ("", {}), ("gpu:4", {"": 4}), ("gpu", {"": 1}), ("gpu:fake:4", {"fake": 4}),
        ("gpu:a100:4(S:0-1),gpu:v100:2", {"a100": 4, "v100": 2}), ("gpu:a100:4,nvme:1", {"a100": 4}),
        ("gpu:a100:2(S:0,2),gpu:a100:2(S:1,3)", {"a100": 4}), ("gpu:a100:no_consume:4", {"a100": 4}),
        ("gpu:no_consume:4", {"": 4}), ("gpu:a100_3g.39gb:2", {"a100_3g.39gb": 2}), ("gres/gpu:h100:8", {"h100": 8}),
        ("craynetwork:4,gpu:1", {"": 1}),
    ],
)  # fmt: skip
def test_forms_of_gpus(gres: str, gpus: dict[str, int]) -> None:
    assert gpus_from(gres) == gpus


def test_excluded_nodes(slurm: FakeSlurm) -> None:
    slurm.plan("scontrol", PARTITIONS, "n1\nn3\n")
    assert names_of(exclude="n[1,3]") == ["n2"]
    assert slurm.calls[-1] == "scontrol show hostnames n[1,3]"


@pytest.mark.usefixtures("slurm")
def test_a_limit_of_nodes() -> None:
    assert names_of(partition="short") == ["n1", "n2"]
    assert names_of(partition="short", qos="long") == ["n1", "n2", "n3"]


@pytest.mark.usefixtures("slurm")
def test_a_limit_of_time() -> None:
    assert names_of(partition="short", time="24:00:00")
    assert names_of(partition="short", time="1-12", qos="long")
    assert names_of(time="365-0")
    assert the_error(partition="short", time="1-12") == (
        "slurm:local: partition short: gives a job at most 1-00:00:00, and cluster.time is 1-12; write at most "
        '"1-00:00:00": the job saves, requeues itself and goes on'
    )


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"partition": "shot"}, "slurm:local: has no partition 'shot' (did you mean 'short'?); cluster.partition must "
         "be one of main, off, short"),
        ({"partition": "off"}, "slurm:local: partition off is inactive and starts no jobs; ask its administrators, or "
         "use another"),
        ({"partition": "short", "cpus": 8}, "slurm:local: partition short: gives a job at most 6 CPU of a node, and "
         "cluster.nodes.cpus is 8; write at most 6"),
        ({"cpus": 9}, "slurm:local: partition main: no node has 9 CPU (cluster.nodes.cpus); it has 3 nodes with 8 CPU, "
         "4 GPU (fake), 15.62 GB"),
        ({"gpus": 8}, "slurm:local: partition main: no node has 8 GPU (cluster.nodes.gpus); it has 3 nodes with 8 CPU, "
         "4 GPU (fake), 15.62 GB"),
        ({"gpus": 1, "gpu_type": "h100", "memory_gb": 99}, "slurm:local: partition main: no node has 1 GPU of type "
         "h100 (cluster.nodes.gpus), 99 GB (cluster.nodes.memory_gb); it has 3 nodes with 8 CPU, 4 GPU (fake), "
         "15.62 GB"),
        ({"constraint": "h100"}, "slurm:local: partition main: no node has the feature h100 (cluster.constraint); it "
         "has 3 nodes with 8 CPU, 4 GPU (fake), 15.62 GB"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("slurm")
def test_what_is_refused(asked: dict[str, object], error: str) -> None:
    assert the_error(**asked) == error


@pytest.mark.parametrize(
    ("mode", "max_requeues", "warns"), [("CANCEL", 9, True), ("CANCEL", 0, False), ("REQUEUE", 9, False)]
)
def test_a_partition_that_cancels_what_it_preempts(slurm: FakeSlurm, mode: str, max_requeues: int, warns: bool) -> None:
    slurm.plan("scontrol", PARTITIONS.replace("State=UP", f"PreemptMode={mode} State=UP"))
    spec = SlurmClusterSpec(partition="main", nodes=SlurmNodesSpec(cpus=4), max_requeues=max_requeues)
    warnings = SlurmJobs(spec).inspect(Needs(store="s3://b", variables=(), check="")).warnings
    assert list(warnings) == warns * [
        "slurm:local: partition main cancels the jobs that it preempts (PreemptMode=CANCEL): such a job saves, and "
        "does not start again by itself; submit the run again then"
    ]


@pytest.mark.parametrize(
    ("default", "time", "says"),
    [
        ("NONE", None, ()),
        ("1-00:00:00", None, ()),
        ("00:30:00", "1:00:00", ()),
        ("00:30:00", None, (
            "slurm:local: partition short gives a job without cluster.time only 00:30:00, after which it requeues "
            'itself; write cluster.time for up to "1-00:00:00"',
        )),
    ],
)  # fmt: skip
def test_a_default_time_that_is_shorter_than_the_limit(slurm: FakeSlurm, default: str, time, says) -> None:
    slurm.plan("scontrol", PARTITIONS.replace("MaxTime=1-00", f"DefaultTime={default} MaxTime=1-00"))
    spec = SlurmClusterSpec(partition="short", nodes=SlurmNodesSpec(cpus=4), time=time)
    assert SlurmJobs(spec).inspect(Needs(store="s3://b", variables=(), check="")).warnings == says


@pytest.mark.parametrize("limits", ["DefaultTime=00:06:00 MaxTime=1-00:00:00", "DefaultTime=NONE MaxTime=00:06:00"])
def test_a_time_without_request_that_leaves_none_to_train_is_refused(slurm: FakeSlurm, limits: str) -> None:
    slurm.plan("scontrol", PARTITIONS.replace("MaxTime=1-00:00:00", limits))
    assert the_error(partition="short") == (
        "slurm:local: partition short: gives a job without cluster.time 00:06:00, and this one needs at least 420 s, "
        "of which stop_grace_s=300 to save; write cluster.time, or lower stop_grace_s"
    )


def test_what_only_several_nodes_have_is_refused(slurm: FakeSlurm) -> None:
    slurm.plan("sinfo", REAL)
    assert the_error(cpus=128, gpus=4) == (
        "slurm:local: partition main: no node has 128 CPU (cluster.nodes.cpus) and 4 GPU (cluster.nodes.gpus); it has "
        "4 nodes with 64 CPU, 4 GPU (a100), 502.9 GB, 1 node with 48 CPU, 2 GPU (v100), 2 GPU (a100), 251 GB, "
        "1 node with 128 CPU, 1007 GB"
    )


def test_nodes_that_are_all_down_are_named(slurm: FakeSlurm) -> None:
    slurm.plan(
        "sinfo", "n1|drained|8|16000|(null)|(null)\nn2|down*|8|16000|(null)|(null)\nn3|idle|1|16000|(null)|(null)\n"
    )
    assert the_error(cpus=8) == (
        "slurm:local: partition main: the nodes that have what a job takes of each get no jobs now: n1 (drained), "
        "n2 (down*); see `sinfo -R` there for the reasons"
    )


def test_a_partition_without_nodes(slurm: FakeSlurm) -> None:
    slurm.plan("sinfo", "")
    assert "it has no nodes" in the_error()


@pytest.mark.parametrize("text", ["n1|idle\n", "n1|idle|many|1|(null)|(null)\n"])
def test_an_answer_of_another_form(slurm: FakeSlurm, text: str) -> None:
    slurm.plan("sinfo", text)
    assert "use a version of launcher for its Slurm" in the_error()


def test_an_answer_that_is_refused(slurm: FakeSlurm) -> None:
    slurm.plan("sinfo", "", error="sinfo: error: Invalid user id\n", code=1)
    assert the_error() == "slurm:local: does not say which nodes there are: Invalid user id"
