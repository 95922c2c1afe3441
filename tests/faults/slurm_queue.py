"""A user of a real Slurm who is on another machine, and jobs of a few lines in place of those that drive a run.

``ssh`` on the PATH of the test is a program that runs commands on Slurm's login host.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest

from cluster.kinds.slurm import jobs
from cluster.kinds.slurm.jobs import SlurmJobs
from cluster.kinds.slurm.script import log_path
from cluster.scheduler import Job, JobRequest, JobStatus
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec
from tests.faults.slurm import Slurm

METADATA = {"run": "s3://b/r?x=1", "submission": "000000-1", "user": "me & you | é"}
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --comment={comment}
#SBATCH --partition={partition}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time=10:00
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={log}
{command}
"""
WAITS = "while [ ! -e GO ]; do sleep 0.1 & wait $!; done; "
"""``GO`` becomes the path of a file."""


class Queue:
    """A Slurm and a scheduler that reaches its login host.

    Attributes:
        slurm: The Slurm.
        home: The user's home there.
        go: A file for which jobs can wait.
    """

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm = slurm
        self.home = folder / "home"
        self.go = folder / "go"
        self.home.mkdir()
        zone = {"HOME": str(self.home), "TZ": "Asia/Tokyo"}
        enter = shlex.join(map(str, slurm.command(["bash", "-c"], folder, zone)))
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        skip = 'while [ "$1" != -- ]; do shift; done; shift 2'
        (bin_folder / "ssh").write_text(f'#!/bin/sh\n{skip}\nexec {enter} "$*"\n')
        (bin_folder / "ssh").chmod(0o755)
        self.bin = bin_folder
        self._folder = folder

    def jobs(self, cpus: int = 1, partition: str = "main", **nodes: object) -> SlurmJobs:
        spec = SlurmNodesSpec(**{"cpus": cpus, **nodes})  # type: ignore[arg-type]
        return SlurmJobs(SlurmClusterSpec(login="me@login", partition=partition, nodes=spec))

    def request(self, command: str, name: str = "a") -> JobRequest:
        command = f"cd {self._folder}; {command.replace('GO', str(self.go))}"
        return JobRequest(id=name, command=command, environment={}, stop_grace_s=60, metadata=METADATA)

    def wait_for(self, status: JobStatus, name: str = "a", message: str = "") -> Job:
        """Returns a job that is in a state, with a message that begins so."""
        found: list[Job | None] = []

        def is_there() -> bool:
            found[:] = [self.jobs().read(name)]
            return found[0] is not None and found[0].status == status and found[0].message.startswith(message)

        self.slurm.wait_until(is_there, about=lambda: f"{found}")
        assert found[0] is not None
        return found[0]

    def state(self, name: str = "a") -> dict[str, str]:
        """What Slurm says about the only job of a name."""
        (number,) = self.slurm.ask("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%A").split()
        return self.slurm.job(number)


def queue_maker(
    make_slurm: Callable[..., Slurm], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Queue]:
    """What makes a ``Queue`` with nodes of these names, and settings of its Slurm."""

    def render(spec: SlurmClusterSpec, logs: str, request: JobRequest) -> str:
        return SCRIPT.format(
            name=request.id, comment=urlencode(request.metadata), partition=spec.partition, cpus=spec.nodes.cpus,
            log=log_path(logs, request.id), command=request.command,
        )  # fmt: skip

    def make(*names: str, **settings: str) -> Queue:
        queue = Queue(make_slurm(*names, **settings), folder)
        monkeypatch.setenv("PATH", str(queue.bin), prepend=":")
        return queue

    monkeypatch.setattr(jobs, "render", render)
    return make
