"""The batch scripts of eleven cluster files, each as a person has read it in ``slurm_scripts``."""

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.capacity import Places, WorkerResources
from cluster.errors import ClusterError
from cluster.kinds.slurm.script import log_path, node_range, render, render_array
from cluster.scheduler import JobRequest
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec

SCRIPTS = Path(__file__).parent / "slurm_scripts"


@dataclass(frozen=True)
class Case:
    """A cluster file, and what a job of it needs."""

    spec: SlurmClusterSpec
    least: int = 1
    most: int = 1
    gpus: int = 0
    run: str = "s3://bucket/runs/digits"
    folder: str = "/home/me/.launcher/slurm"
    variables: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def script(self) -> str:
        if self.spec.array_numbers:
            return render_array(
                self.spec, self.folder, {number: self.request(f"-{number}") for number in self.spec.array_numbers}
            )
        return render(self.spec, self.folder, self.request())

    def request(self, task: str = "") -> JobRequest:
        run = self.run + task
        return JobRequest(
            id=f"digits{task}-0a1b2c3d4e5f-0",
            command=f'exec launcher resume {shlex.quote(run)} --submission 1-2-3 --json --cluster "$RAY_ADDRESS"',
            environment=dict(self.environment),
            stop_grace_s=self.spec.stop_grace_s,
            metadata={"run": run, "submission": "1-2-3"},
            places=places(self.least, self.most, self.gpus),
            variables=self.variables,
        )


def places(least: int, most: int, gpus: int = 0, cpus: float = 2) -> Places:
    resources = WorkerResources(cpus=cpus, gpus=gpus, accelerator=None)
    return Places(resources=resources, least=least, most=most, placement="pack")


EIGHT_CORES = SlurmNodesSpec(cpus=8)
FOUR_GPUS = SlurmNodesSpec(cpus=32, gpus=4)
CASES = {
    "minimal": Case(SlurmClusterSpec(partition="main", nodes=EIGHT_CORES)),
    "gpus": Case(
        SlurmClusterSpec(partition="gpu", nodes=FOUR_GPUS, account="vision", time="4:00:00", venv="/shared/venv"),
        least=8, most=8, gpus=1,
    ),
    "range": Case(SlurmClusterSpec(partition="gpu", nodes=FOUR_GPUS, time="1-12"), least=4, most=14, gpus=1),
    "login": Case(
        SlurmClusterSpec(
            partition="main", login="me@login.uni.edu", nodes=SlurmNodesSpec(cpus=8, memory_gb=64), stop_grace_s=900
        )
    ),
    "container": Case(
        SlurmClusterSpec(
            partition="gpu",
            nodes=FOUR_GPUS,
            container_image="nvcr.io#nvidia/pytorch:26.01-py3",
            venv="/opt/venv",
            options=("--container-mounts=/data:/data,/scratch", "--container-workdir=/data", "--exclusive"),
        ),
        least=8, most=8, gpus=1,
    ),
    "environment": Case(
        SlurmClusterSpec(
            partition="main",
            nodes=EIGHT_CORES,
            env=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
            prologue=("module load cuda/12.4", "conda activate launcher"),
        ),
        variables=("AWS_ACCESS_KEY_ID", "WANDB_API_KEY"),
        environment=(("LAUNCHER_NOTE", "two words"),),
    ),
    "exclude": Case(
        SlurmClusterSpec(
            partition="main", nodes=EIGHT_CORES, exclude="node[7,12-14]", dependency="afterok:1234,afterany:99"
        )
    ),
    "no_requeues": Case(SlurmClusterSpec(partition="gpu", nodes=FOUR_GPUS, max_requeues=0), least=1, most=8, gpus=1),
    "options": Case(
        SlurmClusterSpec(
            partition="gpu",
            nodes=SlurmNodesSpec(cpus=16, gpus=2, gpu_type="a100", accelerator="A100"),
            qos="high",
            constraint="nvlink&(rack1|rack2)",
            reservation="maintenance.2",
            options=("--mail-type=END,FAIL", "--exclusive"),
        ),
        least=2, most=2, gpus=1,
    ),
    "array": Case(
        SlurmClusterSpec(partition="main", nodes=EIGHT_CORES, array="0-2%2", dependency="afterok:1234"),
        folder="/home/it's me",
    ),
    "quoting": Case(
        SlurmClusterSpec(partition="main", nodes=EIGHT_CORES, venv="/shared/my venv", max_requeues=3),
        run="/data/it's $HOME & more/digits",
        folder="/home/it's me/$slurm #1",
    ),
}  # fmt: skip


def test_each_script_has_been_read() -> None:
    assert {path.stem for path in SCRIPTS.iterdir()} == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_as_it_was_read(name: str) -> None:
    assert CASES[name].script() == (SCRIPTS / f"{name}.sh").read_text()


@pytest.mark.parametrize("name", CASES)
def test_bash_takes_a_script(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=CASES[name].script(), capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_log_has_the_name_of_its_job() -> None:
    assert log_path("/shared", "digits-0") == "/shared/digits-0.log"


def test_a_folder_that_slurm_would_change_is_refused() -> None:
    with pytest.raises(ClusterError, match="folder: must not have %, which Slurm replaces in the path of a log, got"):
        Case(CASES["minimal"].spec, folder="/home/50%").script()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (places(1, 1, gpus=1), (1, 1)),
        (places(4, 4, gpus=1), (1, 1)),
        (places(5, 5, gpus=1), (2, 2)),
        (places(1, 9, gpus=1), (1, 3)),
        (places(2, 4, gpus=1), (1, 1)),  # all fit on one node
        (places(8, 8, gpus=1, cpus=16), (4, 4)),  # cores decide: two of 16 on a node
        (places(3, 3, gpus=1, cpus=32), (3, 3)),
        (places(20, 20, cpus=0.5), (1, 1)),
    ],
)
def test_the_nodes_of_workers(wanted: Places, expected: tuple[int, int]) -> None:
    assert node_range(SlurmClusterSpec(partition="gpu", nodes=FOUR_GPUS), wanted) == expected


def test_a_worker_that_fits_on_no_node_is_refused() -> None:
    spec = SlurmClusterSpec(partition="gpu", nodes=FOUR_GPUS)
    with pytest.raises(ClusterError, match=r"^a worker needs 33 CPU, 1 GPU, and the job takes 32 CPU, 4 GPU of each"):
        node_range(spec, places(1, 1, gpus=1, cpus=33))


def test_an_accelerator_counts_by_its_name() -> None:
    spec = SlurmClusterSpec(partition="gpu", nodes=SlurmNodesSpec(cpus=8, gpus=2, accelerator="A100"))
    for accelerator, fits in (("A100", True), ("H100", False)):
        resources = WorkerResources(cpus=1, gpus=1, accelerator=accelerator)
        wanted = Places(resources=resources, least=2, most=2, placement="pack")
        if fits:
            assert node_range(spec, wanted) == (1, 1)
        else:
            with pytest.raises(ClusterError, match="a worker needs 1 CPU, 1 GPU, H100, and the job takes 8 CPU, 2 GPU"):
                node_range(spec, wanted)
