"""Jobs on a real Slurm through ``SlurmJobs``, from another machine: begun, requeued, stopped in any state, forgotten.

``ssh`` on the PATH of the test is a program that runs commands on Slurm's login host; in the last test it is OpenSSH's
own, with a server on that host. Jobs have scripts of a few lines in place of the one that drives a run.
"""

import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.kinds.slurm import jobs
from cluster.kinds.slurm.jobs import SlurmJobs
from cluster.scheduler import Needs
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec
from tests.faults.slurm import CPUS, GPUS
from tests.faults.slurm_queue import METADATA, WAITS, Queue, queue_maker
from tests.stores import require

pytestmark = pytest.mark.slow

NEEDS = Needs(store="s3://b", variables=(), check="")


@pytest.fixture
def make_queue(make_slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Queue]:
    return queue_maker(make_slurm, tmp_path, monkeypatch)


def test_the_life_of_a_job(make_queue) -> None:
    queue = make_queue("node1", "node2")
    there = queue.jobs()
    assert there.read("a") is None
    assert there.jobs() == []
    asked_at = time.time()
    begun = there.begin(queue.request(f"{WAITS} echo done"))
    assert (begun.id, begun.metadata, begun.exit_code) == ("a", METADATA, None)
    running = queue.wait_for("running")
    assert running.began_at is not None
    assert abs(running.began_at - asked_at) < 100  # and not the nine hours of its zone
    assert there.begin(queue.request("echo twice")).metadata == METADATA
    queue.go.touch()
    ended = queue.wait_for("succeeded")
    assert (ended.exit_code, ended.message, ended.metadata) == (0, "", METADATA)
    queue.slurm.ask("sbatch", "--wrap=true", "--job-name=other", "--comment=submission=x|y")
    assert there.jobs() == [ended]
    assert there.log("a") == "done\n"
    assert (queue.home / ".launcher" / "slurm").stat().st_mode & 0o777 == 0o700

    there.begin(queue.request("exit 3"))  # the name is free again
    failed = queue.wait_for("failed")
    assert (failed.exit_code, failed.message) == (3, "failed: NonZeroExitCode")
    there.begin(queue.request("exit 75"))
    assert queue.wait_for("stopped").exit_code == 75
    there.begin(queue.request("kill -9 $$"))
    assert queue.wait_for("failed", message="failed: ").exit_code in (9, 137)


def test_a_job_that_waits_says_why_and_is_stopped(make_queue) -> None:
    queue = make_queue("node1")
    queue.jobs(CPUS).begin(queue.request(WAITS, "first"))
    queue.wait_for("running", "first")
    queue.jobs().begin(queue.request("echo ran"))
    waiting = queue.wait_for("pending", message="waits for Resources; may start at 20")
    assert (waiting.began_at, waiting.exit_code) == (None, None)
    assert queue.jobs().log("a") == ""
    queue.jobs().stop("a")
    stopped = queue.wait_for("stopped")
    assert (stopped.began_at, stopped.exit_code) == (None, None)
    with pytest.raises(ClusterError, match=r"^slurm:me@login: does not give the log of job a: .*No such file"):
        queue.jobs().log("a")
    queue.jobs().stop("a")  # again, and no error
    queue.jobs().stop("unknown")


def test_of_jobs_that_are_begun_at_once_one_runs(make_queue) -> None:
    queue = make_queue("node1")
    requests = [queue.request(f"{WAITS} echo {number} >> ran") for number in range(4)]
    threads = [threading.Thread(target=queue.jobs().begin, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.wait_for("running")
    alive = queue.slurm.ask("squeue", "--noheader", "--name=a", "--format=%T").split()
    assert alive == ["RUNNING"]
    queue.go.touch()
    queue.wait_for("succeeded")
    assert len((queue.go.parent / "ran").read_text().splitlines()) == 1


def test_a_job_that_runs_is_told_and_its_steps_are_not(make_queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_YOUNG_S", 0.0)
    queue = make_queue("node1")
    step = "srun bash -c \"trap 'echo step' TERM; while [ ! -e GO ]; do sleep 0.1 & wait; done; echo step ends\" & "
    command = f"trap 'echo saved; touch GO; wait $step; exit 130' TERM; {step} step=$!; wait $step; wait"
    queue.jobs().begin(queue.request(command))
    queue.wait_for("running")
    queue.slurm.wait_until(lambda: "StepId=" in queue.slurm.ask("scontrol", "show", "steps"))
    queue.jobs().stop("a")
    assert queue.wait_for("stopped").exit_code == 130
    said = queue.jobs().log("a")
    assert "saved" in said
    assert "step ends" in said
    assert "step\n" not in said
    assert queue.state()["JobState"] == "FAILED"


def test_a_job_that_has_just_started_is_stopped(make_queue) -> None:
    queue = make_queue("node1")
    for number in range(3):
        queue.jobs().begin(queue.request("sleep 600", f"a{number}"))
        queue.jobs().stop(f"a{number}")  # at another moment of its start each time
        time.sleep(0.2 * number)
    for number in range(3):
        queue.wait_for("stopped", f"a{number}")


def test_a_job_that_is_about_to_requeue_itself_does_not(make_queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_YOUNG_S", 0.0)
    queue = make_queue("node1")
    requeues = "scontrol requeue $SLURM_JOB_ID; echo asked $?"
    queue.jobs().begin(queue.request(f"trap '' TERM; {WAITS} {requeues}; exit 75"))
    queue.wait_for("running")
    queue.jobs().stop("a")
    queue.go.touch()
    assert queue.wait_for("stopped").exit_code == 75
    assert "asked 1" in queue.jobs().log("a")
    assert queue.state()["Restarts"] == "0"


def test_a_requeued_job_says_so_and_is_stopped(make_queue) -> None:
    queue = make_queue("node1")
    first = "trap '' TERM; scontrol requeue $SLURM_JOB_ID; sleep 3; exit 75"
    command = f'echo "try ${{SLURM_RESTART_COUNT:-0}}"; [ -n "$SLURM_RESTART_COUNT" ] || {{ {first}; }}; sleep 600'
    queue.jobs().begin(queue.request(command))
    requeued = queue.wait_for("pending", message="requeued, try 2: BeginTime; may start at 20")
    assert requeued.began_at is None
    assert queue.wait_for("running", message="try 2").metadata == METADATA
    queue.jobs().stop("a")
    queue.wait_for("stopped")

    queue.jobs().begin(queue.request(command, "b"))  # stopped while it waits for its second try
    queue.wait_for("pending", "b", message="requeued")
    queue.jobs().stop("b")
    queue.wait_for("stopped", "b")
    queue.jobs().begin(queue.request(command, "c"))  # stopped while its first try ends
    queue.slurm.wait_until(lambda: queue.state("c").get("JobState") == "COMPLETING")
    queue.jobs().stop("c")
    queue.wait_for("stopped", "c")
    assert [queue.jobs().log(name).count("try ") for name in "abc"] == [2, 1, 1]


def test_a_job_that_slurm_forgets_and_a_controller_that_is_away(make_queue) -> None:
    queue = make_queue("node1", MinJobAge="2")
    there = queue.jobs()
    there.begin(queue.request("echo once"))
    queue.wait_for("succeeded")
    queue.slurm.wait_until(lambda: there.read("a") is None, 300.0)
    assert there.log("a") == "once\n"
    there.stop("a")
    there.begin(queue.request("echo twice"))
    queue.wait_for("succeeded")

    queue.slurm.kill_controller()
    assert there.log("a") == "once\ntwice\n"  # needs no controller
    away = r"^slurm:me@login: its controller does not answer \w+: Unable to contact slurm controller"
    for call in (lambda: there.read("a"), lambda: there.stop("a"), lambda: there.begin(queue.request("true"))):
        with pytest.raises(ClusterError, match=away):
            call()
    with pytest.raises(ClusterError, match=away):
        there.inspect(NEEDS)


def test_the_nodes_of_a_partition_and_what_is_refused(make_queue) -> None:
    queue = make_queue("node1", "node2", "node3")

    def names(there: SlurmJobs) -> list[str]:
        return [node.id for node in there.inspect(NEEDS).capacity.nodes]

    assert names(queue.jobs(CPUS, gpus=GPUS, gpu_type="fake", memory_gb=15)) == ["node1", "node2", "node3"]
    queue.slurm.ask("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=a test")
    assert names(queue.jobs()) == ["node1", "node3"]
    queue.slurm.ask("scontrol", "update", "PartitionName=main", "MaxNodes=1")
    assert names(queue.jobs()) == ["node1"]
    for there, says in (
        (
            queue.jobs(partition="man"),
            r"no partition 'man' \(did you mean 'main'\?\); .* main, scavenge, short",
        ),
        (queue.jobs(CPUS + 1), "no node has 9 CPU .*; it has 3 nodes with 8 CPU, 4 GPU \\(fake\\), 15.62 GB"),
        (queue.jobs(gpus=1, gpu_type="h100"), "no node has 1 GPU of type h100 "),
        (queue.jobs(memory_gb=99), "no node has 99 GB "),
    ):
        with pytest.raises(ClusterError, match=f"^slurm:me@login: .*{says}"):
            there.inspect(NEEDS)
    with pytest.raises(ClusterError, match=r"^slurm:me@login: does not take job a: .*Invalid partition name"):
        queue.jobs(partition="man").begin(queue.request("true"))


@pytest.fixture
def openssh(make_queue, tmp_path: Path) -> Iterator[Queue]:
    """A queue whose login host has a server of OpenSSH, and which is reached by OpenSSH's own client from there."""
    sshd, ssh = require("sshd", "apt-get install openssh-server"), require("ssh", "apt-get install openssh-client")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    queue = make_queue("node1")
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for key in ("host_key", "own_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "known_hosts").write_text(f"login {(folder / 'host_key.pub').read_text()}")
    server = {
        "ListenAddress": "127.0.0.1:22", "HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "own_key.pub",
        "AuthenticationMethods": "publickey", "PermitRootLogin": "prohibit-password", "UsePAM": "no",
        "StrictModes": "no", "PidFile": "none", "SetEnv": f"SLURM_CONF={queue.slurm.conf}",
    }  # fmt: skip
    client = {
        "Host": "login", "HostName": "127.0.0.1", "HostKeyAlias": "login", "IdentityFile": folder / "own_key",
        "IdentitiesOnly": "yes", "UserKnownHostsFile": folder / "known_hosts", "GlobalKnownHostsFile": "none",
    }  # fmt: skip
    for name, settings in (("sshd_config", server), ("ssh_config", client)):
        (folder / name).write_text("".join(f"{setting} {value}\n" for setting, value in settings.items()))
    enter = shlex.join(map(str, queue.slurm.command([ssh, "-F", folder / "ssh_config"], folder)))
    (queue.bin / "ssh").write_text(f'#!/bin/sh\nexec {enter} "$@"\n')
    command = queue.slurm.command([sshd, "-D", "-e", "-f", folder / "sshd_config"], folder)
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        banner = queue.slurm.command(["bash", "-c", "read -t 1 line < /dev/tcp/127.0.0.1/22"], folder)
        queue.slurm.wait_until(
            lambda: subprocess.run(banner, capture_output=True).returncode == 0,
            about=lambda: (folder / "log").read_text(),
        )
        yield queue
        process.terminate()


def test_a_login_node_behind_openssh(openssh: Queue, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    spec = SlurmClusterSpec(login="login", partition="main", nodes=SlurmNodesSpec(cpus=1), folder=str(folder))
    there = SlurmJobs(spec)
    assert [node.id for node in there.inspect(NEEDS).capacity.nodes] == ["node1"]
    there.begin(openssh.request("echo over ssh"))
    openssh.slurm.wait_until(lambda: (job := there.read("a")) is not None and job.status == "succeeded")
    assert there.log("a") == "over ssh\n"
    shutil.move(tmp_path / "ssh" / "known_hosts", tmp_path / "known_hosts")
    with pytest.raises(ClusterError, match="^slurm:login: its host key is not known; connect once by hand: ssh login$"):
        there.read("a")
    shutil.move(tmp_path / "known_hosts", tmp_path / "ssh" / "known_hosts")
    (tmp_path / "ssh" / "own_key.pub").write_text("")
    with pytest.raises(ClusterError, match="^slurm:login: ssh is not let in without a password; "):
        there.read("a")
