"""Runs on a real Slurm, from the command line on its login host: submitted, told to stop, requeued, shrunk, cancelled.

What disturbs a run changes no bit of it. Runs are short, and most are held at a step while something happens to them.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.run.run_directory import RunDirectory
from tests.e2e.command import CHECKOUT, checkpointed, events
from tests.faults.injection import Fault, environment, fired, release, write_plan
from tests.faults.planned import undisturbed
from tests.faults.slurm import TICK_S, Slurm
from tests.faults.slurm_processes import files_with, wait_until_none_is_left

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

LIMIT_S = 900.0
"""For each wait, of which the longest takes a minute and a half on a machine with nothing else to do."""
VENV = Path(sys.executable).parents[1]
FAST = ("checkpoint.every_steps=10", "tracking.mode=disabled", "train.epochs=2")
LAST_STEP = 44
CLUSTER = """
kind: slurm
partition: main
nodes: {{cpus: 4}}
time: "1:00:00"
stop_grace_s: 60
venv: {venv}
folder: {folder}
prologue: ["export PYTHONPATH={checkout} RAY_DEDUP_LOGS=0 {plan}"]
worker: {{cpus: 4}}
"""
"""Two jobs fit on a node of eight cores; a worker takes the whole of a job's node."""


class Uni:
    """A Slurm, the store of its runs, and the command line on its login host.

    Of its runs, one process after the other waits at the steps ``held_at`` until ``release``.
    """

    def __init__(self, slurm: Slurm, folder: Path, held_at: Sequence[int]) -> None:
        self.slurm = slurm
        self.store = folder / "runs"
        self.jobs = folder / "jobs"
        self._folder = folder
        self.file = folder / "uni.yaml"
        self._plan = folder / "plan.json"
        self._held_at = held_at
        write_plan([Fault(kind="hold", doing="forward", step=step) for step in held_at], self._plan)
        plan = shlex.join(f"{name}={value}" for name, value in environment(self._plan).items())
        self.file.write_text(CLUSTER.format(venv=VENV, folder=self.jobs, checkout=CHECKOUT, plan=plan))

    def launcher(self, *arguments: object, code: int = 0) -> str:
        """Runs ``launcher`` on the login host; returns its stdout."""
        command = self.slurm.command(
            [VENV / "bin" / "launcher", *arguments], self._folder, {"PYTHONPATH": str(CHECKOUT), "TMPDIR": "/tmp"}
        )
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        assert ended.returncode == code, f"exit {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def submit(self, name: str, *overrides: object) -> Path:
        """Submits digits under a name; returns its run directory."""
        told = self.launcher("submit", "digits", *self.overrides(name, *overrides), "--cluster", self.file, "--json")
        assert json.loads(told)["status"] == "submitted"
        return self.store / name

    def overrides(self, name: str, *overrides: object) -> list[object]:
        return [f"name={name}", f"store={self.store}", *FAST, *overrides]

    def status(self, run: Path, *, asks: bool = False) -> dict[str, Any]:
        """The ``--json`` document of a run, with the state of its job if Slurm is asked."""
        asked = ("--cluster", self.file) if asks else ()
        document: dict[str, Any] = json.loads(self.launcher("status", run, *asked, "--json"))
        return document

    def number_of(self, run: Path) -> str:
        """Slurm's number of the newest job of a run."""
        newest = RunDirectory(str(run)).submissions.read_newest()
        assert newest is not None
        found = self.slurm.ask("squeue", "--noheader", "--states=all", f"--name={newest[1].job}", "--format=%i")
        return found.splitlines()[0]

    def wait_until_held(self, run: Path, number: int) -> None:
        """Waits until a run is at the step ``held_at[number]``, its last checkpoint before that committed."""
        self.wait_until(lambda: number in fired(self._plan) and checkpointed(run, self._held_at[number] // 10 * 10)())

    def release(self, number: int) -> None:
        """Lets the process go on that is held at ``held_at[number]``."""
        release(self._plan, number)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        self.slurm.wait_until(happened, LIMIT_S, self.logs)

    def wait_for_end(self, run: Path, *states: str) -> dict[str, str]:
        """Waits until the job of a run is in one of Slurm's states; returns what Slurm says."""
        return self.slurm.wait_for(self.number_of(run), *states, limit_s=LIMIT_S)

    def logs(self) -> str:
        logs = [*self.jobs.rglob("*log*")]
        return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs if log.is_file())


@pytest.fixture
def uni(make_slurm, tmp_path: Path) -> Callable[..., Uni]:
    return lambda *names, held_at=(): Uni(make_slurm(*names), tmp_path, held_at)


def assert_same_bits(run: Path, *overrides: str) -> None:
    digest, rows = undisturbed((*FAST, *overrides))
    told = RunDirectory(str(run)).read_status()
    assert told is not None
    assert (told["status"], told["state_sha256"]) == ("completed", digest)
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == rows


def test_from_submission_to_the_end(uni) -> None:
    uni = uni("node1", "node2", "node3", held_at=[12])
    script = uni.launcher("render", "digits", *uni.overrides("digits", "workers.num=2"), "--cluster", uni.file)
    assert "#SBATCH --nodes=2\n" in script
    run = uni.submit("digits", "workers.num=2")
    uni.wait_until_held(run, 0)
    number = uni.number_of(run)
    told = uni.status(run, asks=True)
    assert (told["status"], told["job_status"]) == ("running", "running")
    (token,) = [path for path in uni.jobs.rglob("*token*") if path.is_file()]
    assert token.stat().st_mode & 0o777 == 0o600
    secret = token.read_text().strip()
    assert len(secret) >= 32
    shown = uni.slurm.ask("scontrol", "show", "job", "-dd", number)
    assert secret not in shown + uni.slurm.ask("scontrol", "write", "batch_script", number, "-")
    assert files_with(secret) == []
    uni.release(0)
    uni.wait_for_end(run, "COMPLETED")
    assert_same_bits(run)
    assert len({worker["address"] for worker in events(run, "attempt_started")[-1]["workers"]}) == 2
    told = uni.status(run, asks=True)
    assert (told["status"], told["job_status"]) == ("completed", "succeeded")
    assert not token.exists()
    uni.slurm.wait_until(lambda: set(uni.slurm.node_states().values()) == {"idle"})
    wait_until_none_is_left(uni.slurm)
    assert "epoch" in uni.launcher("logs", run, "--cluster", uni.file)
    again = uni.launcher("submit", "digits", *uni.overrides("digits", "workers.num=2"), "--cluster", uni.file, "--json")
    assert json.loads(again)["job"] is None


def test_a_time_limit_that_is_too_short_twice(uni) -> None:
    uni = uni("node1", "node2", held_at=[12, 32])
    run = uni.submit("digits", "workers.num=2")
    for tries in (1, 2):
        uni.wait_until_held(run, tries - 1)
        job = uni.slurm.wait_for(uni.number_of(run), "RUNNING")
        assert job["Restarts"] == str(tries - 1)
        if tries == 1:  # the real thing, which Slurm looks for every half minute
            uni.slurm.ask("scontrol", "update", f"JobId={job['JobId']}", f"EndTime=now+{2 * TICK_S}")
        else:  # the signal alone
            uni.slurm.ask("scancel", "--batch", "--signal=USR1", job["JobId"])
        uni.wait_until(lambda tries=tries: len(events(run, "stop_requested")) == tries)
        uni.release(tries - 1)
        uni.wait_until(lambda tries=tries: len(events(run, "requeued")) == tries)
        if tries == 1:
            uni.slurm.wait_for(job["JobId"], "PENDING")
            uni.slurm.ask("scontrol", "update", f"JobId={job['JobId']}", "TimeLimit=60")  # of the other tries
        told = uni.status(run, asks=True)
        assert told["status"] in ("requeued", "running")
    ended = uni.wait_for_end(run, "COMPLETED")
    assert ended["Restarts"] == "2"
    assert_same_bits(run)
    steps = [event["step"] for event in events(run, "requeued")]
    resumed = [event["step"] for event in events(run, "training")]
    assert resumed == [0, *steps], "no step was lost"
    assert 12 < steps[0] < 32 < steps[1] < LAST_STEP, "each saves as soon as it is told"


def test_stop_and_cancel(uni) -> None:
    """Each saves; none is requeued. What waits is stopped, too, and what another wants to know is told."""
    uni = uni("node1", held_at=[12])
    long = ("workers.num=1", "train.epochs=2000", "cluster.nodes.cpus=8", "cluster.worker.cpus=8")
    stopped, waits = uni.submit("stopped", *long), uni.submit("waits", *long)
    uni.wait_until(lambda: uni.slurm.job(uni.number_of(waits))["Reason"] in ("Resources", "Priority"))
    told = uni.status(waits, asks=True)
    assert (told["status"], told["job_status"]) == ("submitted", "pending")
    assert "Resources" in told["job_message"] or "Priority" in told["job_message"]
    assert uni.launcher("list", uni.store, "--cluster", uni.file).count("waits") >= 1
    uni.launcher("stop", waits, "--cluster", uni.file)
    assert uni.status(waits)["status"] == "stopped"
    uni.wait_for_end(waits, "CANCELLED")

    uni.wait_until_held(stopped, 0)
    uni.release(0)
    uni.launcher("stop", stopped)
    told = uni.status(stopped)
    assert (told["status"], told["saved_step"]) == ("stopped", told["step"])
    assert uni.wait_for_end(stopped, "FAILED", "CANCELLED", "COMPLETED")["Restarts"] == "0"

    cancelled = uni.submit("cancelled", *long)
    uni.wait_until(checkpointed(cancelled, 10))
    uni.slurm.ask("scancel", uni.number_of(cancelled))
    ended = uni.wait_for_end(cancelled, "CANCELLED")
    assert ended["Restarts"] == "0"
    told = uni.status(cancelled)
    assert (told["status"], told["saved_step"]) == ("stopped", told["step"])
    (stop,) = events(cancelled, "stop_requested")
    assert told["step"] >= stop["step"] > 0, RunDirectory(str(cancelled)).events().read()
    assert not events(cancelled, "worker_lost") + events(cancelled, "agents_lost"), (
        "Slurm tells the steps first, and Ray has to live until all is saved"
    )


def test_two_jobs_at_once_on_one_node(uni) -> None:
    uni = uni("node1", held_at=[12, 12])
    runs = [uni.submit(f"digits-{number}", "workers.num=1", f"seed={number}") for number in range(2)]
    for number, run in enumerate(runs):
        uni.wait_until_held(run, number)  # or the other way round: it waits for both
    assert {uni.slurm.job(uni.number_of(run))["JobState"] for run in runs} == {"RUNNING"}
    for number in range(2):
        uni.release(number)
    for number, run in enumerate(runs):
        uni.wait_for_end(run, "COMPLETED")
        assert_same_bits(run, f"seed={number}")


def test_a_range_of_nodes_goes_on_without_one_that_dies(uni) -> None:
    uni = uni("node1", "node2", held_at=[12])
    run = uni.submit("digits", "workers.num=[1, 2]")

    def sizes() -> list[int]:
        return [len(event["workers"]) for event in events(run, "attempt_started")]

    uni.wait_until_held(run, 0)
    assert sizes()[-1] == 2
    job = uni.slurm.job(uni.number_of(run))
    batch_host = job["BatchHost"]
    (other,) = {"node1", "node2"} - {batch_host}
    uni.slurm.power_off(other)
    ended = uni.wait_for_end(run, "COMPLETED")
    assert (ended["Restarts"], ended["NodeList"]) == ("0", batch_host)
    assert_same_bits(run)
    assert sizes()[-1] == 1


def test_a_slurmd_that_is_killed_and_comes_back_disturbs_nothing(uni) -> None:
    uni = uni("node1", "node2", held_at=[12])
    run = uni.submit("digits", "workers.num=2")
    uni.wait_until_held(run, 0)

    def began() -> str:
        """When the slurmd that the controller knows has started, in a resolution of seconds."""
        shown = uni.slurm.ask("scontrol", "show", "node", "node2", "--oneliner")
        return next(field for field in shown.split() if field.startswith("SlurmdStartTime="))

    before = began()
    uni.slurm.kill_slurmd("node2")
    uni.slurm.start_slurmd("node2")
    uni.wait_until(lambda: began() != before)
    assert uni.slurm.job(uni.number_of(run))["JobState"] == "RUNNING"
    uni.release(0)
    assert uni.wait_for_end(run, "COMPLETED")["Restarts"] == "0"
    assert_same_bits(run)


def test_a_fixed_number_of_nodes_starts_again_without_one_that_dies(uni) -> None:
    uni = uni("node1", "node2", "node3", held_at=[12])
    run = uni.submit("digits", "workers.num=2", "cluster.exclude=node3")
    uni.wait_until_held(run, 0)
    number = uni.number_of(run)
    uni.slurm.power_off("node2")
    uni.slurm.wait_until(lambda: uni.slurm.job(number).get("Restarts") == "1", LIMIT_S)
    uni.slurm.power_on("node2")
    assert uni.wait_for_end(run, "COMPLETED")["Restarts"] == "1"
    assert_same_bits(run)


def test_an_array_of_three_seeds(uni) -> None:
    uni = uni("node1", "node2")
    words = [*uni.overrides("digits", "workers.num=1"), "cluster.array=0-2"]
    told = json.loads(uni.launcher("submit", "digits", *words, "--cluster", uni.file, "--json"))
    runs = [Path(document["run"]) for document in told]
    assert [run.name for run in runs] == ["digits-0", "digits-1", "digits-2"]
    numbers = [uni.number_of(run) for run in runs]
    assert len({number.partition("_")[0] for number in numbers}) == 1, "one array"
    for seed, run in enumerate(runs):
        ended = uni.slurm.wait_for(numbers[seed], "COMPLETED", limit_s=LIMIT_S)
        assert ended["ArrayTaskId"] == str(seed)
        assert_same_bits(run, f"seed={seed}")
        assert uni.status(run, asks=True)["job_status"] == "succeeded"
        assert "epoch" in uni.launcher("logs", run, "--cluster", uni.file)
