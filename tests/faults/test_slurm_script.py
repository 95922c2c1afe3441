"""The batch script of a job on a real Slurm, with Ray on its nodes and a driver."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.capacity import Places, WorkerResources
from cluster.kinds.slurm.script import render
from cluster.scheduler import JobRequest
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec
from tests.faults.slurm import Slurm

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
LIMIT_S = 300.0
"""For what takes 40 s on an idle machine with two cores."""


class Job:
    """A job that trains ``digits``, and its run."""

    def __init__(self, slurm: Slurm, name: str, *options: str, workers: int = 2, least: int | None = None) -> None:
        self._slurm = slurm
        self.name = name
        self.folder = slurm.folder / "jobs"
        self.folder.mkdir(exist_ok=True)
        self.temporary = Path("/tmp") / slurm.folder.name / name  # short, for Ray's sockets
        self.run = slurm.folder / "runs" / name
        num = f"[{least},{workers}]" if least else str(workers)
        words = ["digits", f"name={name}", f"store={slurm.folder}/runs", f"workers.num={num}", "workers.cpus=1"]
        words += ["workers.gpus=0", "tracking.mode=disabled", *options, "--json"]
        request = JobRequest(
            id=name,
            command=f'exec launcher run {shlex.join(words)} --cluster "$RAY_ADDRESS"',
            environment={"TMPDIR": str(self.temporary), "PYTHONPATH": str(CHECKOUT)},
            stop_grace_s=300,
            metadata={"run": str(self.run)},
            places=Places(
                resources=WorkerResources(cpus=1, gpus=0, accelerator=None),
                least=least or workers,
                most=workers,
                placement="pack",
            ),
        )
        spec = SlurmClusterSpec(partition="main", nodes=SlurmNodesSpec(cpus=1), venv=sys.prefix)
        self.temporary.mkdir(parents=True)
        self.script = self.folder / f"{name}.sh"
        self.script.write_text(render(spec, str(self.folder), request))

    def submit(self, *options: str) -> str:
        self.id = self._slurm.ask("sbatch", "--parsable", *options, self.script)
        return self.id

    def wait_for(self, *states: str) -> dict[str, str]:
        try:
            return self._slurm.wait_for(self.id, *states, limit_s=LIMIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def said(self) -> str:
        """All that its processes have printed."""
        return "\n".join(
            f"{log.name}: {log.read_text()[-3000:]}" for log in sorted(self.folder.glob(f"{self.name}.*log"))
        )

    def status(self) -> dict[str, object]:
        """What ``launcher status`` says about the run."""
        command = self._slurm.command(["launcher", "status", self.run, "--json"], self.folder)
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return dict(json.loads(asked.stdout)) if asked.returncode == 0 else {}

    def check_nothing_is_left(self) -> None:
        """No process of the job on any node, no token, no folder of Ray; the launcher keeps a cache of code."""
        self._slurm.wait_until(lambda: not any(processes(self._slurm, node) for node in self._slurm.nodes))
        assert [path.name for path in self.folder.iterdir() if path.is_dir()] == []
        assert [path.name for path in self.temporary.iterdir() if path.name.startswith(("ray", "tmp"))] == []


def processes(slurm: Slurm, node: str) -> list[str]:
    """The command lines of the processes of a node that are neither Slurm's nor of what holds the node."""
    listed = subprocess.run(
        slurm.nodes[node].command(["ps", "-eo", "args"], slurm.folder), capture_output=True, text=True, check=True
    )
    own = ("COMMAND", "sleep infinity", "ps -eo", "munged", "slurmd", "/usr/sbin/slurmd", "sh -c echo ready")
    return [line for line in listed.stdout.splitlines() if not line.startswith(own) and "munged" not in line]


def test_a_job_trains_on_two_nodes_and_leaves_nothing(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    job = Job(slurm, "digits", "train.epochs=2")
    job.submit()
    ended = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
    assert ended["JobState"] == "COMPLETED", job.said()
    assert job.status()["status"] == "completed"
    assert ended["NumNodes"] == "2"
    job.check_nothing_is_left()
