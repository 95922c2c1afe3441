"""The description of a Slurm cluster: what it takes, and what is wrong with one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import DescriptionError
from cluster.spec.slurm import SlurmClusterSpec
from launcher.config.clusters import load_cluster, open_cluster

LEAST = "kind: slurm\npartition: gpu\nnodes: {cpus: 8}\n"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., SlurmClusterSpec]:
    def read(text: str, *overrides: str) -> SlurmClusterSpec:
        path = tmp_path / "uni.yaml"
        path.write_text(text)
        spec, _ = load_cluster(str(path), list(overrides))
        assert isinstance(spec, SlurmClusterSpec)
        return spec

    return read


def test_the_least_that_it_needs(read) -> None:
    spec = read(LEAST)
    assert (spec.partition, spec.nodes.cpus, spec.nodes.gpus, spec.login, spec.time) == ("gpu", 8, 0, None, None)
    assert spec.nodes.resources == {"CPU": 8, "GPU": 0.0}


def test_its_name_is_the_same_on_all_its_login_nodes(read, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for host in ("login1", "login2"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        names.add(read(LEAST).address)
    assert names == {"slurm:local"}


def test_a_cluster_file_of_ten_lines(read) -> None:
    spec = read(
        "kind: slurm\nlogin: me@login.uni.edu\npartition: gpu\naccount: vision\n"
        "nodes: {cpus: 32, gpus: 4, gpu_type: a100, accelerator: A100}\n"
        'time: "4:00:00"\nvenv: /shared/venv\nprologue: [module load cuda/12.4]\n'
        "env: [AWS_ACCESS_KEY_ID]\nworker: {cpus: 8, gpus: 1}\n"
    )
    assert spec.address == "slurm:me@login.uni.edu"
    assert spec.nodes.resources == {"CPU": 32, "GPU": 4.0, "accelerator_type:A100": 1.0}
    assert spec.driver_overrides() == ["worker.cpus=8.0", "worker.gpus=1"]


@pytest.mark.parametrize(
    ("array", "numbers", "limit"),
    [("0-2", (0, 1, 2), None), ("1,5,9", (1, 5, 9), None), ("7,0-2,1%2", (0, 1, 2, 7), 2), ("3", (3,), None)],
)
def test_an_array(read, array: str, numbers: tuple[int, ...], limit: int | None) -> None:
    spec = read(LEAST, f"cluster.array='{array}'")
    assert (spec.array_numbers, spec.array_limit) == (numbers, limit)
    assert read(LEAST).array_numbers == ()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("time=30", "time must be text"),
        ("time='4h'", 'time must be such as "4:00:00" or "1-12", in quotes, got \'4h\''),
        ("time='5:00'", "time must be at least 420 s, got '5:00': .*; raise it, or lower stop_grace_s"),
        ("stop_grace_s=70000", "stop_grace_s must be from 1 to 65475 seconds, got 70000"),
        ("login='-oProxyCommand=x'", "login must be a host as ssh names it"),
        ("partition='a b'", "partition must be a name, got 'a b'"),
        ("constraint='a;b'", "constraint must be as sbatch --constraint takes it, without spaces and quotes"),
        ("exclude='$(x)'", "exclude must be as sbatch --exclude takes it"),
        ("nodes.cpus=0", "nodes.cpus must be at least 1, got 0"),
        ("nodes.gpu_type=a100", "nodes.gpu_type needs gpus, which are 0"),
        ("nodes.memory_gb=0", "nodes.memory_gb must be at least 1, got 0"),
        ("array='0-'", "array must be such as 0-2, 1,5,9 or 0-9%3, got '0-'"),
        ("array='1%0'", "array must be such as 0-2"),
        ("array='5-1'", "array must have from 1 to 100 numbers, got '5-1'"),
        ("array='0-100'", "array must have from 1 to 100 numbers"),
        ("max_requeues=-1", "max_requeues must be at least 0, got -1"),
        ("venv=venv", "venv must be the absolute path of a folder that all nodes see, got 'venv'"),
        ("folder=~/x", "folder must be the absolute path of a folder that all nodes see, got '~/x'"),
        ('prologue=["a\\nb"]', r"prologue\[0\] must be one line of bash; write several as several items"),
        ("env=[A=secret]", r"env\[0\] must be the name of an environment variable; values have no place here"),
        ("container_image='a b'", "container_image must be without spaces and quotes, got 'a b'"),
        ("options=[--mail-user me]", r"options\[0\] must be --NAME or --NAME=VALUE, without spaces and quotes"),
        ("options=[-N2]", r"options\[0\] must be --NAME or --NAME=VALUE"),
        ("options=[--partition=x]", r"options\[0\] --partition has a field of its own; write partition"),
        ("options=[--gres=gpu:4]", r"options\[0\] --gres has a field of its own; write nodes.gpus"),
        ("options=[--output=x]", r"options\[0\] must not be --output, which the launcher decides"),
        ("options=[--wait]", r"options\[0\] must not be --wait, which the launcher decides"),
        ("options=[--clusters=x]", r"options\[0\] must not be --clusters, which the launcher decides"),
        ("options=[--cluster=x]", r"options\[0\] must be the full name of an option; --cluster may stand for --clust"),
    ],
)
def test_what_is_wrong_with_one(read, change: str, error: str) -> None:
    with pytest.raises(DescriptionError, match=error) as raised:
        read(LEAST, f"cluster.{change}")
    assert "secret" not in str(raised.value)


def test_it_takes_no_drivers(read) -> None:
    with pytest.raises(DescriptionError, match="slurm takes jobs, and no drivers; use launcher submit"):
        open_cluster(read(LEAST))
