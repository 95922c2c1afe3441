"""What the batch script of a job does, with programs in place of Slurm's commands and of Ray on the nodes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
JOINED = "echo 'ray-head 10.0.0.1:6379'; read head; echo 'ray-node n1 10.0.0.1'; echo 'ray-node n2 10.0.0.2'"
SINFO = "printf '%s idle\\n' n1 n2 n3 n4\n"
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
        programs = {"scontrol": SCONTROL, "srun": RAY, "sleep": SLEEP, "sinfo": SINFO}
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
        self,
        command: str,
        *,
        is_array: bool = False,
        least: int = 2,
        restarts: int = 0,
        environment: Mapping[str, str] | None = None,
        **spec: object,
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
            **(environment or {}),
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
            with suppress(ProcessLookupError):  # the script may leave what ends with its job
                os.killpg(started.pid, signal.SIGKILL)
            started.communicate()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    made = Script(tmp_path)
    yield made
    made.end()


def test_a_driver_that_has_saved_has_the_job_requeued(script: Script) -> None:
    assert script.run("exit 75")[0] == 75
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"]
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
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"]


def test_a_controller_that_does_not_answer_at_first_is_asked_again(script: Script) -> None:
    script.answer("job", "")
    started = script.start("exit 75")
    script.wait_for(lambda: len(script.calls("show job")) > 1)
    script.answer("job", JOB)
    assert started.wait(LIMIT_S) == 75
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"]


CANCELLED = JOB.replace("RUNNING", "COMPLETING")


@pytest.mark.parametrize(
    ("said", "code", "is_requeued"),
    [
        (CANCELLED, 130, False),
        (CANCELLED.replace("Restarts=0", "Restarts=1"), 75, False),  # preempted: Slurm has requeued it
        (CANCELLED.replace("None", "TimeLimit", 1), 75, True),
        (JOB, 75, True),  # a SIGTERM of its own
        (JOB.replace("Requeue=1", "Requeue=0"), 130, False),  # launcher stop
    ],
)
def test_the_driver_hears_whether_its_job_is_over(script: Script, said: str, code: int, is_requeued: bool) -> None:
    started = script.start(DRIVE)
    script.wait_for(script.drives)
    script.answer("job", said)
    started.send_signal(signal.SIGTERM)
    assert started.wait(LIMIT_S) == code
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"] * is_requeued


def test_a_job_that_is_cancelled_while_it_cleans_up_stays_cancelled(script: Script) -> None:
    script.answer("nodes", f"{JOINED}; cat > /dev/null; cp $FAKE/cancelled $FAKE/job")
    script.answer("cancelled", CANCELLED)
    assert script.run("exit 75")[0] == 75
    assert script.calls("scontrol requeue") == []


def test_a_requeue_is_tried_again_and_then_nodes_are_excluded(script: Script) -> None:
    (script.fake / "deaf").touch()
    script.answer("job", f"{JOB} ExcNodeList=n4")
    assert script.run('echo 10.0.0.2 > "$LAUNCHER_JOB_LOST_NODES"; exit 75', least=1)[0] == 75
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"] * 2
    assert script.calls("update") == ["scontrol update JobId=7 ExcNodeList=n4,n2"]


def test_a_driver_that_has_not_yet_begun_is_not_killed(script: Script) -> None:
    started = script.start('touch "$FAKE/forked"; sleep 0.5; exec python "$FAKE/driver.py"')
    script.wait_for((script.fake / "forked").exists)
    started.send_signal(signal.SIGUSR1)
    assert started.wait(LIMIT_S) == 75


def test_what_else_the_nodes_print_is_no_report(script: Script) -> None:
    joined = JOINED.replace("; read", "; echo joined; echo n1 ok; read")
    script.answer("nodes", f"echo Loading; echo head; sleep 0.5; {joined}")
    code, said = script.run('echo "at $RAY_ADDRESS"; exit 75')
    assert (code, "at 10.0.0.1:6379" in said) == (75, True), said


@pytest.mark.parametrize("failed", ["echo ray-node n2 failed", ":"])
def test_a_job_starts_again_without_a_node_that_does_not_join(script: Script, failed: str) -> None:
    script.answer("nodes", f"{JOINED.replace('echo' + ' ' + repr('ray-node n2 10.0.0.2'), failed)}; exit 0")
    code, said = script.run("exit 0")
    assert (code, "Ray did not start on n2; see" in said) == (75, True), said
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"]
    assert script.calls("update") == ["scontrol update JobId=7 ExcNodeList=n2"]
    assert script.run("exit 0", max_requeues=0)[0] == 5
    assert script.run("exit 3", least=1)[0] == 3
    assert len(script.calls("scontrol requeue")) == 1


def test_a_job_does_not_exclude_more_nodes_than_it_can_do_without(script: Script) -> None:
    script.answer("job", f"{JOB} ExcNodeList=n3,n4")
    lost = 'echo 10.0.0.2 > "$LAUNCHER_JOB_LOST_NODES"; exit 75'
    script.run(lost, exclude="n4")
    assert script.calls("update") == ["scontrol update JobId=7 ExcNodeList=n4,n2"]
    script.run(lost, exclude="n3,n4")
    assert len(script.calls("update")) == 1
    script.program("sinfo", "printf '%s\\n' 'n1 idle' 'n2 mixed' 'n3 idle' 'n4 drained*'\n")
    script.run(lost)
    assert script.calls("update")[1:] == ["scontrol update JobId=7 ExcNodeList=n2"]
    script.program("sinfo", "exit 1")
    script.run(lost)
    assert script.calls("update")[2:] == ["scontrol update JobId=7 ExcNodeList=n3,n4,n2"]
    others = (
        "'n1 idle 8/64000/gpu:a100:4/(null)' 'n2 down* 8/64000/gpu:a100:4/(null)' 'n5 idle 8/64000/gpu:v100:4/(null)'"
    )
    script.program("sinfo", f"printf '%s\\n' {others}\n")
    script.answer("job", JOB)
    script.run(lost)
    assert len(script.calls("update")) == 3, "n5 is no node like those of the job"
    script.run(lost, least=1)
    assert script.calls("update")[3:] == ["scontrol update JobId=7 ExcNodeList=n2"]


def test_the_third_try_in_a_row_in_which_ray_does_not_start_is_the_last(script: Script) -> None:
    no_second = f"{JOINED.replace('ray-node n2 10.0.0.2', 'ray-node n2 failed')}; exit 0"

    def codes(*nodes: str) -> list[int]:
        found = []
        for each in nodes:
            script.answer("nodes", each)
            found.append(script.run("exit 3")[0])
        return found

    assert codes(no_second, no_second, f"{JOINED}; cat > /dev/null") == [75, 75, 3]
    assert codes(no_second, no_second, no_second) == [75, 75, 5]
    assert list(script.jobs.iterdir()) == []


def test_a_first_node_whose_ray_does_not_start_is_excluded(script: Script) -> None:
    script.answer("nodes", "echo ray-head failed; exit 0")
    code, said = script.run("exit 0")
    assert (code, "Ray did not start on n1; see" in said) == (75, True), said
    assert script.calls("update") == ["scontrol update JobId=7 ExcNodeList=n1"]
    script.answer("nodes", "echo 'srun: error: n1: task 0: Exited with exit code 127' >&2; exit 127")  # no launcher
    code, said = script.run("exit 0")
    assert (code, "Exited with exit code 127" in said) == (5, True), said
    assert len(script.calls("scontrol requeue")) == 1


LAUNCH_FAILS = "srun: error: Task launch for StepId=7.0 failed on node n2: Application launch failed"


@pytest.mark.parametrize(
    ("said", "excludes"),
    [(LAUNCH_FAILS, ["scontrol update JobId=7 ExcNodeList=n2"]), ("srun: error: Unable to create step", [])],
)
def test_a_job_starts_again_if_slurm_does_not_start_its_program(script: Script, said: str, excludes) -> None:
    script.answer("nodes", f"echo '{said}' >&2; echo 'srun: error: n1: task 0: Killed' >&2; exit 1")
    assert [script.run("exit 0")[0] for _ in range(3)] == [75, 75, 5]
    assert script.calls("update") == excludes * 2


def test_a_job_that_has_been_requeued_too_often_is_not_requeued_by_slurm_either(script: Script) -> None:
    script.answer("job", JOB.replace("Restarts=0", "Restarts=100"))
    code, said = script.run('exit "${LAUNCHER_JOB_REQUEUES:-3}"', restarts=100)
    assert (code, "it has been requeued 100 times" in said) == (3, True), said
    assert script.calls("update") == ["scontrol update JobId=7 Requeue=0"]


@pytest.mark.parametrize(("said", "code"), [(JOB, 75), (CANCELLED, 130)])
def test_the_driver_hears_of_a_preemption_from_the_first_node(script: Script, said: str, code: int) -> None:
    started = script.start(DRIVE)
    script.wait_for(script.drives)
    script.answer("job", said)
    started.send_signal(signal.SIGUSR2)
    assert started.wait(LIMIT_S) == code


def test_a_job_that_is_submitted_in_another_one_has_nothing_of_that(script: Script) -> None:
    outer = {
        "SLURM_RESTART_COUNT": "3", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_TYPE": "mask_cpu:",
        "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_EXPORT_ENV": "NIL", "SLURM_TRES_PER_TASK": "cpu:1",
    }  # fmt: skip
    script.program("srun", 'env | grep "^SLURM_" > "$FAKE/environment"\n' + RAY)
    assert script.run("exit 75", environment=outer)[0] == 75
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"]
    seen = dict(line.split("=", 1) for line in (script.fake / "environment").read_text().splitlines())
    assert {name: seen.get(name) for name in outer} == {**dict.fromkeys(outer), "SLURM_RESTART_COUNT": "0"}
    assert seen["SLURM_JOB_NUM_NODES"] == "2"


def test_a_node_that_stays_silent_does_not_cost_the_job_its_time_limit(script: Script) -> None:
    script.answer("nodes", "echo 'ray-head 10.0.0.1:6379'; read head; echo 'ray-node n1 10.0.0.1'; touch $FAKE/waits")
    started = script.start("exit 0")
    script.wait_for((script.fake / "waits").exists)
    started.send_signal(signal.SIGUSR1)
    said = started.communicate(timeout=LIMIT_S)[0]
    assert (started.returncode, "The time limit is near, and Ray has not started" in said) == (75, True), said
    assert script.calls("update") == ["scontrol update JobId=7 ExcNodeList=n2"]


def test_a_driver_that_slurm_itself_signals_goes_on_unless_the_job_is_over(script: Script) -> None:
    assert script.run("exit 130")[0] == 75
    assert script.calls("scontrol requeue") == ["scontrol requeue 7"]
    assert script.run("exit 130", max_requeues=0)[0] == 130
    script.answer("job", CANCELLED)
    assert script.run("exit 130")[0] == 130
    assert len(script.calls("scontrol requeue")) == 1


def test_the_driver_of_a_container_is_told(script: Script) -> None:
    step = 'case "$*" in */driver) while [ "$1" != bash ]; do shift; done; exec "$@" ;; esac\n'
    script.program("srun", step + RAY)
    started = script.start(DRIVE, container_image="image")
    script.wait_for(lambda: any(script.jobs.iterdir()))  # it heeds the signal by then
    started.send_signal(signal.SIGUSR1)
    assert started.wait(LIMIT_S) == 75


def test_the_nodes_have_the_python_of_the_launcher(script: Script) -> None:
    script.program("launcher", "")
    (script.fake / "launcher").write_text("#!/opt/pipx/venvs/launcher/bin/python3.12\n")
    script.run("exit 0")
    assert len(script.calls(" /opt/pipx/venvs/launcher/bin/python3.12 -P -m cluster.kinds.slurm.node")) == 1
    (script.fake / "launcher").write_text("#!/usr/bin/env python\n")
    script.run("exit 0")
    assert len(script.calls(" python -P -m cluster.kinds.slurm.node")) == 1
