"""A small Slurm on one machine: a login host that also has the controller, and hosts that each have a slurmd.

The hosts are those of ``tests.faults.hosts``: each has an address, a name, processes and a network of its own, so that
two nodes do not share ports, and nothing of the machine's own Slurm or munge, if it has one, is touched. They share the
machine's file system, as the nodes of a real cluster share theirs.

It is Slurm as Debian builds it, without cgroups and without accounting. Its limits are short, so that tests need not
wait; ``SETTINGS`` names those that differ from Slurm's own.
"""

import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.faults.hosts import Host, hosts
from tests.faults.hosts import why_there_can_be_none as why_no_hosts

LOGIN = "login"
CPUS, GPUS, MEMORY_MB = 8, 4, 16_000
"""Of each node, whatever the machine has; no GPU is real."""
TICK_S = 30
"""How often the controller looks whether jobs are near their limit; no setting changes it."""
GRACE_S = 5
"""What a job that is preempted has from the SIGTERM to its steps to that to its batch script."""
PARTITIONS = {
    "main": "Default=YES PriorityTier=1 MaxTime=UNLIMITED",
    "short": "PriorityTier=1 MaxTime=1",
    "scavenge": f"PriorityTier=0 PreemptMode=REQUEUE GraceTime={GRACE_S} MaxTime=UNLIMITED",
}
"""All have all nodes. Jobs of ``main`` and ``short`` preempt those of ``scavenge``, which are requeued."""
SETTINGS = {
    "KillWait": "10",  # 30 s: from SIGTERM to SIGKILL of a job that is cancelled or has reached its limit
    "SlurmdTimeout": "10",  # 300 s: how long a node may not answer before it is down, and up to 20 s more
    "BatchStartTimeout": "100",  # 10 s: how long a batch script may take to start
    "ReturnToService": "2",  # 0: a node that was down is used again
    "SchedulerParameters": "bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0",
}
"""Settings that differ from Slurm's own values, which the comments give."""
_CREDENTIALS_EXPIRE_S = 20
"""Slurm's own is 120: about that long, a job that is requeued waits before it can start again. It is also the time that
a slurmd has to start a batch script: with ``--export=NIL`` it first runs a login shell, which takes seconds on a busy
machine."""
_PROGRAMS = ("munge", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
_PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
_START_LIMIT_S = 120.0
_COMMAND_LIMIT_S = 60.0
_POLL_INTERVAL_S = 0.05
_LOG_TAIL = 1500
_FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "RAY_")
"""How the variables begin that would change what Slurm's commands do, or what a job's Ray does."""


def why_there_can_be_none() -> str | None:
    """What this machine lacks for a Slurm of its own; None: nothing."""
    for program in _PROGRAMS:
        if shutil.which(program, path=_PLACES) is None:
            return f"{program} is not installed: apt-get install slurm-wlm munge"
    return why_no_hosts()


@contextmanager
def slurm(*names: str, settings: Mapping[str, str] | None = None) -> Iterator["Slurm"]:
    """A Slurm whose nodes have these names, all of them idle, for as long as the context lasts.

    Args:
        names: Of the nodes.
        settings: More of its slurm.conf.

    Raises:
        FileNotFoundError, CalledProcessError: ``why_there_can_be_none`` tells why.
        AssertionError: It did not start; the message has the ends of its logs.
    """
    with ExitStack() as stack:
        # A short path, for that of a unix socket has at most 107 characters.
        folder = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        home = Path(stack.enter_context(folder))
        login, *nodes = stack.enter_context(hosts(LOGIN, *names))
        made = Slurm(home, login, {node.name: node for node in nodes})
        stack.callback(made.end)
        made.start(settings or {})
        yield made


class Slurm:
    """A Slurm. Made by ``slurm``.

    Attributes:
        folder: Has its files; every host sees it.
        conf: Its slurm.conf.
        login: The host from which users submit; it has the controller and no slurmd.
        nodes: The hosts that have a slurmd, by name. ``power_off`` and ``cut`` are of theirs; to bring one back that
            was off, ``power_on`` here.
    """

    def __init__(self, folder: Path, login: Host, nodes: Mapping[str, Host]) -> None:
        self.folder = folder
        self.login = login
        self.nodes = nodes
        self.conf = folder / "slurm.conf"
        self._own = folder / "own"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        """By name; each enters the namespaces of a host, and waits there for the daemon, its only child."""

    def start(self, settings: Mapping[str, str]) -> None:
        """Starts all daemons; returns when all nodes are idle."""
        self._write_files(settings)
        self._set_up(self.login)
        self.start_controller()
        for node in self.nodes.values():
            self._set_up(node)
            self.start_slurmd(node.name)
        self.wait_until(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), _START_LIMIT_S)

    def end(self) -> None:
        """Ends every process on all hosts."""
        for host in (self.login, *self.nodes.values()):
            host.end()
        for daemon in self._daemons.values():
            daemon.wait()

    def start_slurmd(self, node: str) -> None:
        """Starts the slurmd of a node that has none."""
        assert node not in self._daemons, f"{node} has a slurmd"
        self._start_daemon(node, self.nodes[node], "slurmd", "-D", "-f", str(self.conf), "-d", _which("slurmstepd"))

    def kill_slurmd(self, node: str) -> None:
        """Kills the slurmd of a node with SIGKILL. Its jobs go on: they belong to slurmstepd."""
        self._kill_daemon(node)

    def start_controller(self) -> None:
        """Starts slurmctld, which has been killed."""
        self._start_daemon("slurmctld", self.login, "slurmctld", "-D", "-f", str(self.conf))

    def kill_controller(self) -> None:
        """Kills slurmctld with SIGKILL. It forgets jobs that are younger than a few seconds."""
        self._kill_daemon("slurmctld")

    def power_off(self, node: str) -> None:
        """Takes a node's power: nothing on it ends in order, and no peer hears of it."""
        self.nodes[node].power_off()
        for daemon in (node, _munged(node)):
            self._daemons.pop(daemon).wait()

    def power_on(self, node: str) -> None:
        """Starts a node that was off, with its slurmd."""
        self.nodes[node].power_on()
        self._set_up(self.nodes[node])
        self.start_slurmd(node)

    def command(
        self, arguments: Sequence[object], cwd: Path, environment: Mapping[str, str] | None = None, host: str = LOGIN
    ) -> list[str]:
        """A command line for this machine that runs another one on the login host or a node, as a user there would."""
        where = self.login if host == LOGIN else self.nodes[host]
        foreign = [f"--unset={name}" for name in os.environ if name.startswith(_FOREIGN)]
        of_hosts = [f"--unset={name}" for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED")]
        settings = [f"{name}={value}" for name, value in {"SLURM_CONF": self.conf, **(environment or {})}.items()]
        return where.command(["env", *foreign, *of_hosts, *settings, *arguments], cwd)

    def ask(self, *arguments: object, code: int = 0, environment: Mapping[str, str] | None = None) -> str:
        """Runs a command on the login host, in Slurm's folder.

        Args:
            arguments: The command line.
            code: Its exit code.
            environment: More of its environment.

        Returns:
            What it printed: stdout, and stderr if it had to fail.
        """
        asked = subprocess.run(
            self.command(arguments, self.folder, environment), capture_output=True, text=True, timeout=_COMMAND_LIMIT_S
        )
        assert asked.returncode == code, f"{arguments}: exit {asked.returncode}\n{asked.stdout}{asked.stderr}"
        return (asked.stdout if code == 0 else asked.stdout + asked.stderr).strip()

    def submit(self, script: str, *options: object, environment: Mapping[str, str] | None = None) -> str:
        """Submits a batch script, without its first line; returns the number of the job."""
        path = self.folder / f"{secrets.token_hex(4)}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return self.ask("sbatch", "--parsable", *options, path, environment=environment)

    def output(self, job: str) -> str:
        """What a job has printed that was submitted without ``--output``."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """What the controller says about a job, by Slurm's names of the fields; nothing if it has forgotten the job."""
        asked = subprocess.run(
            self.command(["scontrol", "show", "job", "--oneliner", job], self.folder),
            capture_output=True,
            text=True,
            timeout=_COMMAND_LIMIT_S,
        )
        if "Invalid job id" in asked.stderr:
            return {}
        assert asked.returncode == 0, asked.stderr
        return dict(field.partition("=")[::2] for field in asked.stdout.split() if "=" in field)

    def wait_for(self, job: str, *states: str, limit_s: float = 120.0) -> dict[str, str]:
        """Returns what the controller says about a job once it is in one of the states, such as ``RUNNING``."""
        found: dict[str, str] = {}

        def is_there() -> bool:
            found.clear()
            found.update(self.job(job))
            return found.get("JobState") in states

        self.wait_until(is_there, limit_s, lambda: f"job {job}: {found}\n{self.output(job)[-_LOG_TAIL:]}")
        return found

    def node_states(self) -> dict[str, str]:
        """The state of each node in ``sinfo``'s words: ``idle``, ``mixed``, ``down*``, where ``*`` is: no answer."""
        lines = self.ask("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_until(
        self, happened: Callable[[], bool], limit_s: float = 120.0, about: Callable[[], str] = lambda: ""
    ) -> None:
        """Returns when something has happened.

        Args:
            happened: Whether it has.
            limit_s: How long it may take.
            about: What to add to the error.

        Raises:
            AssertionError: It has not in time, or a daemon has ended; with the ends of all logs.
        """
        deadline = time.monotonic() + limit_s
        while True:
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not ended, f"ended: {ended}\n{self._logs()}"
            if happened():
                return
            assert time.monotonic() < deadline, f"has not happened within {limit_s:.0f} s: {about()}\n{self._logs()}"
            time.sleep(_POLL_INTERVAL_S)

    def _set_up(self, host: Host) -> None:
        """Gives a host that has just been powered on the names of all hosts, and a munged."""
        self._run_on(host, "mount", "--bind", self.folder / "hosts", "/etc/hosts")
        if host is not self.login:
            # Login shells, of jobs and of Slurm itself, that read no file of this machine's user: they may end at any
            # moment, with the host, and what such files start, as pyenv does, may leave a lock.
            for name in (".bash_profile", ".bash_login", ".profile", ".bashrc"):
                if (file := Path.home() / name).exists():
                    self._run_on(host, "mount", "--bind", self.folder / "empty", file)
        self._run_on(host, "mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", self._own)
        # It wants a socket and a log that all users can reach, which --force makes a warning.
        options = {
            "key-file": self.folder / "munge.key",
            "socket": self._own / "munge.socket",
            "pid-file": self._own / "munge.pid",
            "seed-file": self._own / "munge.seed",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._start_daemon(_munged(host.name), host, "munged", "--foreground", "--force", *arguments)

        def answers() -> bool:
            command = host.command(["munge", "--no-input", f"--socket={self._own / 'munge.socket'}"], self.folder)
            return subprocess.run(command, capture_output=True, timeout=_COMMAND_LIMIT_S).returncode == 0

        self.wait_until(answers, _START_LIMIT_S)

    def _kill_daemon(self, name: str) -> None:
        entered = self._daemons.pop(name)
        children = Path(f"/proc/{entered.pid}/task/{entered.pid}/children")
        os.kill(int(children.read_text()), signal.SIGKILL)
        entered.wait()

    def _run_on(self, host: Host, *arguments: object) -> None:
        subprocess.run(host.command(arguments, self.folder), check=True, capture_output=True, timeout=_COMMAND_LIMIT_S)

    def _start_daemon(self, name: str, host: Host, program: str, *arguments: str) -> None:
        command = host.command([_which(program), *arguments], self.folder, {"SLURM_CONF": str(self.conf)})
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-_LOG_TAIL:]}" for log in logs)

    def _write_files(self, more: Mapping[str, str]) -> None:
        self._own.mkdir()
        (self.folder / "state").mkdir()
        (self.folder / "empty").touch()
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        everyone = [self.login, *self.nodes.values()]
        names = "".join(f"{host.address} {host.name}\n" for host in everyone)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        for number in range(GPUS):  # Slurm insists on devices; these are like /dev/null
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        devices = f"{self.folder}/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu Type=fake File={devices}\n")
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{self.login.name}({self.login.address})",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._own / 'munge.socket'},cred_expire={_CREDENTIALS_EXPIRE_S}",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self._own / "slurmctld.pid",
            "SlurmdPidFile": self._own / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",  # a node has the cores that are written here
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "MpiDefault": "none",
            **SETTINGS,
            **more,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        has = f"CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:fake:{GPUS}"
        lines += [f"NodeName={node.name} NodeAddr={node.address} {has}" for node in self.nodes.values()]
        lines += [f"PartitionName={name} Nodes=ALL {options}" for name, options in PARTITIONS.items()]
        self.conf.write_text("\n".join(lines) + "\n")


def _munged(host: str) -> str:
    return f"munged-{host}"


def _which(program: str) -> str:
    path = shutil.which(program, path=_PLACES)
    assert path is not None
    return path
