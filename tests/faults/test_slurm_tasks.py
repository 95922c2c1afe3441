"""Arrays on a real Slurm: each task is a job of its own, from the moment at which the array is submitted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.kinds.slurm import jobs
from cluster.kinds.slurm.script import log_path
from cluster.scheduler import JobRequest, JobStatus
from cluster.spec.slurm import SlurmClusterSpec
from tests.faults.slurm import CPUS
from tests.faults.slurm_queue import METADATA, SCRIPT, WAITS, queue_maker

pytestmark = pytest.mark.slow


def test_each_task_of_an_array_is_a_job_of_its_own(make_slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task to get its name has the number of the array, by which Slurm changes and stops all of them."""
    monkeypatch.setattr(jobs, "_YOUNG_S", 0.0)
    queue = queue_maker(make_slurm, tmp_path, monkeypatch)("node1")

    def render_array(spec: SlurmClusterSpec, folder: str, due: Mapping[int, JobRequest]) -> str:
        head = SCRIPT.replace("--dependency=singleton", f"--array={','.join(map(str, due))}%3")
        command = queue.request(f"trap 'exit 130' TERM; {WAITS}").command
        return head.format(
            name="x", comment="x", partition=spec.partition, cpus=spec.nodes.cpus, log=log_path(folder, "%x"),
            command=command,
        )  # fmt: skip

    def statuses() -> list[JobStatus]:
        found = [there.read(request.id) for request in requests.values()]
        return [job.status for job in found if job is not None]

    def wait_for(*wanted: JobStatus) -> None:
        queue.slurm.wait_until(lambda: statuses() == [*wanted], about=lambda: f"{statuses()}")

    monkeypatch.setattr(jobs, "render_array", render_array)
    there = queue.jobs()
    requests = {
        number: replace(queue.request("", f"t{number}"), metadata=METADATA | {"submission": f"00000{number}-1"})
        for number in range(4)
    }
    queue.jobs(CPUS).begin(queue.request(WAITS, "first"))
    queue.wait_for("running", "first")
    with monkeypatch.context() as broken:
        broken.setattr(jobs, "_rename", lambda *_: ("true",))  # the connection is lost before the tasks get their names
        with pytest.raises(ClusterError, match="took t0, t1, t2, t3, and does not list it"):
            there.begin_array(requests)
    assert (statuses(), there.has_any(requests)) == ([], True)
    begun = there.begin_array(requests)
    assert {number: (job.id, job.metadata) for number, job in begun.items()} == {
        number: (request.id, request.metadata) for number, request in requests.items()
    }
    numbers = queue.slurm.ask("squeue", "--noheader", "--name=t0,t1,t2,t3", "--format=%A %i").split()
    array = numbers[1].partition("_")[0]
    last = numbers[numbers.index(array) + 1].partition("_")[2]
    assert (last, len(numbers)) == ("3", 8), "no second array, and task 3 has the number of this one"

    there.stop("first")
    wait_for("running", "running", "running", "pending")
    there.stop("t3")
    wait_for("running", "running", "running", "stopped")
    there.stop("t0")
    wait_for("stopped", "running", "running", "stopped")
    queue.slurm.ask("scontrol", "requeue", f"{array}_1")
    queue.wait_for("pending", "t1", message="requeued, try 2")
    queue.go.touch()
    wait_for("stopped", "succeeded", "succeeded", "stopped")
    assert [queue.slurm.job(f"{array}_{task}")["Restarts"] for task in range(4)] == ["0", "1", "0", "0"]
