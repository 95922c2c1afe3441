"""What the batch script of a job does, with programs in place of Slurm's commands and of Ray on the nodes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.capacity import Places, WorkerResources
from cluster.kinds.slurm.script import render, render_array
from cluster.scheduler import JobRequest
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec

LIMIT_S = 60.0
JOB = "JobId=7 JobName=digits JobState=RUNNING Reason=None Requeue=1 Restarts=0 EndTime=Unknown PreemptTime=None"
SCONTROL = """\
echo "scontrol $*" >> "$FAKE/calls"
case "$1 $2" in
    "show job") [ -s "$FAKE/job" ] || exit 1; cat "$FAKE/job" ;;
    "show hostnames") echo "${3:-$SLURM_JOB_NODELIST}" | tr , '\\n' ;;
    "requeue "*) [ ! -e "$FAKE/deaf" ] || { rm "$FAKE/deaf"; exit 1; } ;;
esac
"""
RAY = """\
echo "srun $*" >> "$FAKE/calls"
. "$FAKE/nodes"
exec cat > /dev/null
"""
JOINED = "echo 'head 10.0.0.1:6379'; read head; echo 'n1 10.0.0.1'; echo 'n2 10.0.0.2'"
SLEEP = 'case $1 in 5) exec /bin/sleep 0.1 ;; *) exec /bin/sleep "$1" ;; esac\n'
HANDLES = """\
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: sys.exit(75 if number == signal.SIGUSR1 else 130))
open(os.environ["FAKE"] + "/drives", "w").close()
while True:
    signal.pause()
"""
"""A driver that handles what it is told: asked to end early, it saves and ends with 75."""
DRIVE = 'exec python "$FAKE/driver.py"'


class Script:
    """A script on two nodes, and the programs that it meets.

    Attributes:
        fake: Has what the programs answer, and the calls.
    """

    def __init__(self, folder: Path) -> None:
        self.fake = folder / "fake"
        self.fake.mkdir()
        self.jobs = folder / "jobs"
        self.jobs.mkdir()
        programs = {"scontrol": SCONTROL, "srun": RAY, "sleep": SLEEP, "sinfo": "printf '%s\\n' n1 n2 n3 n4\n"}
        for name, text in programs.items():
            self.program(name, text)
        self.answer("job", JOB)
        self.answer("nodes", JOINED)
        self.answer("driver.py", HANDLES)
        self._started: list[subprocess.Popen[str]] = []

    def program(self, name: str, text: str) -> None:
        path = self.fake / name
        path.write_text("#!/bin/bash\n" + text)
        path.chmod(0o755)

    def answer(self, name: str, text: str) -> None:
        """What Slurm says of the job from now on, or what the nodes do."""
        (self.fake / name).write_text(text)

    def start(
        self, command: str, *, is_array: bool = False, least: int = 2, restarts: int = 0, **spec: object
    ) -> "subprocess.Popen[str]":
        settings = {"partition": "main", "nodes": SlurmNodesSpec(cpus=1), **spec}
        request = JobRequest(
            id="digits",
            command=command,
            environment={},
            stop_grace_s=300,
            metadata={},
            places=Places(
                resources=WorkerResources(cpus=1, gpus=0, accelerator=None), least=least, most=2, placement="pack"
            ),
        )
        described = SlurmClusterSpec(**settings)  # type: ignore[arg-type]
        folder = str(self.jobs)
        text = render_array(described, folder, {3: request}) if is_array else render(described, folder, request)
        own = {
            "FAKE": str(self.fake),
            "PATH": os.pathsep.join([str(self.fake), os.path.dirname(sys.executable), os.environ["PATH"]]),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n1,n2",
            "SLURMD_NODENAME": "n1",
        }
        if restarts:
            own["SLURM_RESTART_COUNT"] = str(restarts)
        if is_array:
            own |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
        started = subprocess.Popen(
            ["bash", "-c", text], env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._started.append(started)
        return started

    def run(self, command: str, **options: object) -> tuple[int, str]:
        """The exit code of a script, and what it has said."""
        started = self.start(command, **options)  # type: ignore[arg-type]
        said = started.communicate(timeout=LIMIT_S)[0]
        return started.returncode, said

    def calls(self, word: str) -> list[str]:
        path = self.fake / "calls"
        return [line for line in path.read_text().splitlines() if word in line] if path.exists() else []

    def wait_for(self, happened: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT_S
        while not happened():
            assert time.monotonic() < limit, self.calls("")
            time.sleep(0.02)

    def drives(self) -> bool:
        return (self.fake / "drives").exists()

    def end(self) -> None:
        for started in self._started:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
            started.communicate()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    made = Script(tmp_path)
    yield made
    made.end()


def test_a_driver_that_has_saved_has_the_job_requeued(script: Script) -> None:
    assert script.run("exit 75")[0] == 75
    assert script.calls("requeue") == ["scontrol requeue 7"]
    assert list(script.jobs.iterdir()) == []


def test_a_task_of_an_array_acts_on_itself_alone(script: Script) -> None:
    script.answer("job", f"{JOB} ExcNodeList=n9")
    script.run("exit 75", is_array=True)
    asked = [line for line in script.calls("scontrol") if "hostnames" not in line]
    assert len(asked) >= 4
    assert [line for line in asked if "7_3" not in line.replace("=", " ").split()] == []


def test_a_time_limit_that_is_near_before_the_driver_starts_is_kept_for_it(script: Script) -> None:
    started = script.start(DRIVE, prologue=('touch "$FAKE/prologue"; while [ ! -e "$FAKE/go" ]; do sleep 0.1; done',))
    script.wait_for((script.fake / "prologue").exists)
    started.send_signal(signal.SIGUSR1)
    (script.fake / "go").touch()
    said = started.communicate(timeout=LIMIT_S)[0]
    assert started.returncode == 75, said


@pytest.mark.parametrize("option", ["set -e", "set -u", "set -o pipefail", "set -euo pipefail"])
def test_options_that_a_prologue_sets_do_not_end_the_script(script: Script, option: str) -> None:
    assert script.run("exit 75", prologue=(option,))[0] == 75
    assert script.calls("requeue") == ["scontrol requeue 7"]


def test_a_controller_that_does_not_answer_at_first_is_asked_again(script: Script) -> None:
    script.answer("job", "")
    started = script.start("exit 75")
    script.wait_for(lambda: len(script.calls("show job")) > 1)
    script.answer("job", JOB)
    assert started.wait(LIMIT_S) == 75
    assert script.calls("requeue") == ["scontrol requeue 7"]
