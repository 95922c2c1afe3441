"""The batch script of a job on a real Slurm, with Ray on its nodes and a driver."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity import Places, WorkerResources
from cluster.kinds.slurm.script import render
from cluster.run.run_directory import RunDirectory
from cluster.scheduler import JobRequest
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec
from tests.faults.injection import Fault, environment, fired, release, write_plan
from tests.faults.slurm import Slurm
from tests.faults.slurm_processes import files_with, processes, wait_until_none_is_left

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
LIMIT_S = 300.0
"""For what takes 40 s on an idle machine with two cores."""


class Job:
    """A job that trains ``digits``, and its run."""

    def __init__(
        self,
        slurm: Slurm,
        name: str,
        *options: str,
        workers: int = 2,
        least: int | None = None,
        env: tuple[str, ...] = (),
        exclude: str | None = None,
        command: str | None = None,
        gpus: int = 0,
        held_at: int | None = None,
    ) -> None:
        """``held_at``: the step at which a training process of its first try waits until ``release``."""
        self._slurm = slurm
        self._plan = slurm.folder / f"{name}.json"
        write_plan([] if held_at is None else [Fault(kind="hold", doing="forward", step=held_at)], self._plan)
        self.name = name
        self.folder = slurm.folder / "it's #1 $jobs"
        self.folder.mkdir(exist_ok=True)
        self.temporary = Path("/tmp") / slurm.folder.name / name  # short, for Ray's sockets
        self.run = slurm.folder / "runs" / name
        num = f"[{least},{workers}]" if least else str(workers)
        words = ["digits", f"name={name}", f"store={slurm.folder}/runs", f"workers.num={num}", "workers.cpus=1"]
        words += ["workers.gpus=0", "tracking.mode=disabled", *options, "--json"]
        request = JobRequest(
            id=name,
            command=command or f'exec launcher run {shlex.join(words)} --cluster "$RAY_ADDRESS"',
            environment={"TMPDIR": str(self.temporary), "PYTHONPATH": str(CHECKOUT), **environment(self._plan)},
            stop_grace_s=300,
            metadata={"run": str(self.run)},
            places=Places(
                resources=WorkerResources(cpus=1, gpus=0, accelerator=None),
                least=least or workers,
                most=workers,
                placement="pack",
            ),
        )
        spec = SlurmClusterSpec(
            partition="main", nodes=SlurmNodesSpec(cpus=1, gpus=gpus), venv=sys.prefix, env=env, exclude=exclude
        )
        self.temporary.mkdir(parents=True)
        self.script = self.folder / f"{name}.sh"
        self.script.write_text(render(spec, str(self.folder), request))

    def submit(self, *options: str, variables: dict[str, str] | None = None) -> None:
        """``variables``: of the shell that calls sbatch."""
        self.id = self._slurm.ask("sbatch", "--parsable", *options, self.script, environment=variables)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        self._slurm.wait_until(happened, LIMIT_S, self.said)

    def wait_for(self, *states: str) -> dict[str, str]:
        """What Slurm says about it once it is in one of the states."""
        self.wait_until(lambda: self._slurm.job(self.id).get("JobState") in states)
        return self._slurm.job(self.id)

    def said(self) -> str:
        """All that its processes have printed."""
        return "\n".join(
            f"{log.name}: {log.read_text()[-3000:]}" for log in sorted(self.folder.glob(f"{self.name}*.log"))
        )

    def status(self) -> dict[str, Any]:
        """What its driver has said last about the run; nothing before it has said anything."""
        return dict(RunDirectory(str(self.run)).read_status() or {})

    def is_held(self) -> bool:
        """Whether one of its training processes waits at ``held_at``."""
        return 0 in fired(self._plan)

    def release(self) -> None:
        """Lets that process go on."""
        release(self._plan, 0)

    def check_nothing_is_left(self) -> None:
        """No process of the job on any node, no token, no folder of Ray; the launcher keeps a cache of code."""
        wait_until_none_is_left(self._slurm)
        assert [path.name for path in self.folder.iterdir() if path.is_dir()] == []
        assert [path.name for path in self.temporary.iterdir() if path.name.startswith(("ray", "tmp"))] == []


def test_a_job_trains_on_two_nodes_and_leaves_nothing(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    job = Job(slurm, "digits", "train.epochs=2", env=("OF_USER",), held_at=12)
    job.submit(variables={"OF_USER": "1", "NOT_NAMED": "2"})
    job.wait_until(job.is_held)
    (token,) = job.folder.glob("digits.*/token")
    assert token.stat().st_mode & 0o777 == 0o600
    assert files_with(token.read_text()) == []
    assert files_with("OF_USER=1") != []
    assert files_with("NOT_NAMED=2") == []
    job.release()
    ended = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
    assert (ended["JobState"], ended["NumNodes"]) == ("COMPLETED", "2"), job.said()
    assert job.status()["status"] == "completed"
    job.check_nothing_is_left()


def test_two_jobs_at_once_on_one_node_complete(make_slurm) -> None:
    slurm = make_slurm("node1")
    jobs = [Job(slurm, name, "train.epochs=2", workers=1) for name in ("first", "second")]
    for job in jobs:
        job.submit()
    began = [slurm.wait_for(job.id, "RUNNING") for job in jobs]
    assert {job["NodeList"] for job in began} == {"node1"}
    for job in jobs:
        assert job.wait_for("COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED", job.said()
        assert job.status()["status"] == "completed"
    for job in jobs:
        job.check_nothing_is_left()


def test_a_job_that_is_cancelled_saves_first_and_stays_cancelled(make_slurm) -> None:
    slurm = make_slurm("node1", "node2", KillWait="60")
    job = Job(slurm, "digits", "train.epochs=1000", held_at=12)
    job.submit()
    job.wait_until(job.is_held)
    job.release()
    slurm.ask("scancel", job.id)
    ended = job.wait_for("CANCELLED")
    slurm.wait_until(lambda: set(slurm.node_states().values()) == {"idle"})
    job.check_nothing_is_left()
    status = job.status()
    assert status["status"] in ("stopped", "requeued"), status
    saved = [int(path.parent.name.removeprefix("step-")) for path in job.run.glob("checkpoints/step-*/manifest-*.json")]
    assert max(saved) == status["step"], status
    assert ended["Restarts"] == "0"


SAVES = """case ${SLURM_RESTART_COUNT:-0} in 0) echo 10.77.0.2 >> "$LAUNCHER_JOB_LOST_NODES";; 1) ;; *) exit 0;; esac
    [ "$LAUNCHER_JOB_REQUEUES" = 1 ] || exit 9
    exit 75"""
"""A driver that asks twice for another try, and holds node1 responsible for the first."""


def test_a_job_starts_again_without_the_node_that_failed(make_slurm) -> None:
    slurm = make_slurm("node1", "node2", "node3", "node4")
    job = Job(slurm, "digits", command=SAVES, exclude="node4")
    job.submit()
    assert job.wait_for("RUNNING")["NodeList"] == "node[1-2]"
    ended = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), job.said()
    assert ended["NodeList"] == "node[2-3]"
    assert ended["ExcNodeList"] == "node4,node1"
    job.check_nothing_is_left()


def test_a_job_that_may_not_requeue_says_so(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    job = Job(slurm, "digits", command="exit ${LAUNCHER_JOB_REQUEUES:-75}")
    job.submit("--no-requeue")
    ended = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    assert "This job does not requeue itself: Slurm does not let it." in job.said()
    job.check_nothing_is_left()


IN_ANOTHER_JOB = {
    "SLURM_RESTART_COUNT": "3", "SLURM_CPU_BIND": "quiet,mask_cpu:0xf0000", "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_CPU_BIND_LIST": "0xf0000", "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "200", "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4", "SLURM_GPUS": "3", "SLURM_NTASKS_PER_NODE": "4",
}  # fmt: skip
"""What a shell has in which sbatch is called, if an allocation of Slurm runs it."""


def test_a_job_with_gpus_that_is_submitted_in_another_one(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    job = Job(slurm, "digits", command='exit "$((${SLURM_RESTART_COUNT:-0} ? 0 : 75))"', gpus=2)
    job.submit(variables=IN_ANOTHER_JOB)
    assert "gres:gpu:2" in job.wait_for("RUNNING")["TresPerNode"]
    ended = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.said()
    job.check_nothing_is_left()


TOLD = """
import pathlib, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(130))
pathlib.Path(__file__).with_name("drives").touch()
while True:
    signal.pause()
"""
"""A driver that says that it drives, and ends when it is told."""


def test_a_job_that_is_preempted_saves_at_the_beginning_of_its_grace_time(make_slurm) -> None:
    slurm = make_slurm("node1")
    slurm.ask("scontrol", "update", "PartitionName=scavenge", f"GraceTime={10 * LIMIT_S:.0f}")
    driver = slurm.folder / "driver.py"
    driver.write_text(TOLD)
    job = Job(slurm, "digits", command=f"exec python {driver}", workers=1)
    job.submit("--partition=scavenge")
    job.wait_until(driver.with_name("drives").exists)
    other = slurm.submit("sleep 1000", "--exclusive")
    job.wait_until(lambda: slurm.job(job.id)["Restarts"] == "1")
    slurm.wait_for(other, "RUNNING")
    assert slurm.job(job.id)["JobState"] == "PENDING"
    slurm.ask("scancel", other, job.id)
    job.wait_for("CANCELLED")


def test_a_script_that_is_killed_leaves_no_process_and_no_token(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    job = Job(slurm, "digits", "train.epochs=1000", held_at=12)
    job.submit()
    job.wait_until(job.is_held)
    slurm.ask("scancel", "--batch", "--signal=KILL", job.id)
    job.wait_for("FAILED", "CANCELLED")
    job.wait_until(lambda: not any(processes(slurm, node) for node in slurm.nodes))
    assert list(job.folder.glob("digits.*/token")) == []
    assert list(job.temporary.glob("ray*")) == []


def test_a_job_with_a_range_of_nodes_that_loses_that_of_its_script_starts_again(make_slurm) -> None:
    slurm = make_slurm("node1", "node2")
    job = Job(slurm, "digits", "train.epochs=1000", held_at=12, least=1)
    job.submit()
    job.wait_until(job.is_held)
    began = job.wait_for("RUNNING")
    assert (began["BatchHost"], began["NodeList"]) == ("node1", "node[1-2]")
    slurm.power_off("node1")
    job.wait_until(lambda: slurm.job(job.id)["Restarts"] == "1")
    again = job.wait_for("RUNNING")
    assert (again["BatchHost"], again["NodeList"]) == ("node2", "node2")
    said = (job.folder / "digits.node2.log").read_text()
    assert f"node1, which ran the batch script, is lost: scontrol requeue {job.id}\n" in said
    slurm.ask("scancel", job.id)
    job.wait_for("CANCELLED")
