"""Hosts of one's own on one machine: each has an address, a cable that can be cut, and power that can go and come.

A host is a set of Linux namespaces: network, processes, mounts, host name. The hosts are wired to a switch, a bridge
in namespaces of its own. So no device, address or name of the machine is touched, and two sets of hosts that have the
same addresses do not see each other. A set of namespaces lives as long as its first process; with that the kernel kills
all others in it and drops their devices, and it dies with the process that made it: nothing is left, however that ends.

Hosts share the machine's file system, and with it the unix sockets that have a path there: a store that all of them
reach, and a trap for code that takes a path that exists for a thing on its own host.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
NETWORK_INTERFACE = "eth0"
RAY = str(Path(sys.executable).with_name("ray"))
"""Ray's own command line."""
HEAD_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
"""Of a head as the README starts it: a host is dead after 9 s without an answer, and with Ray's own after 65 s. A call
to a host that is cut off ends after 10 s, and not after 2 min; that long, what it was to reserve elsewhere is lost."""
JOBS_API = ("--include-dashboard=true", "--dashboard-host=0.0.0.0")
"""What a head is started with to serve its Jobs API, which needs ray[default]."""
JOBS_API_PORT = 8265
_NETWORK = "10.77.0"
_RAY_PORT = 6379
_OBJECT_STORE_BYTES = 100 * 2**20
_RAY_START_TIMEOUT_S = 120.0
_POLL_INTERVAL_S = 0.02
_LIMITED_QUEUE = "burst 128kb latency 50ms"
"""Of a limited cable: with it a single TCP connection gets 95% of the rate; the rest is headers."""
_COUNTER_OF_BYTES_SENT = 8
"""Its place among the counters of an interface in /proc/net/dev."""


def why_there_can_be_none() -> str | None:
    """What this machine lacks for hosts of one's own; None: nothing."""
    try:
        with _Namespaces() as switch:
            switch.run("ip link add switch type bridge")
    except FileNotFoundError as error:
        return f"hosts of their own need {error.filename}"
    except subprocess.CalledProcessError as error:
        return f"hosts of their own need root and namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}"
    return None


@contextmanager
def hosts(*names: str) -> Iterator[list["Host"]]:
    """Hosts on one switch, powered on, for as long as the context lasts.

    Raises:
        FileNotFoundError, CalledProcessError: ``why_there_can_be_none`` tells why.
    """
    with ExitStack() as stack:
        # A short path, for that of a unix socket has at most 107 characters, and Ray's have 60 without it.
        folder = tempfile.TemporaryDirectory(prefix="h-", ignore_cleanup_errors=True)
        home = Path(stack.enter_context(folder))
        (home / "token").write_text(secrets.token_hex(32))
        switch = stack.enter_context(_Namespaces())
        switch.run("ip link add switch type bridge")
        switch.run("ip link set switch up")
        made = [Host(name, number, switch, home) for number, name in enumerate(names, start=1)]
        for host in made:
            stack.callback(host.end)
            host.power_on()
        yield made


def start_ray(head: "Host", *others: "Host", head_settings: Mapping[str, str] | None = None) -> None:
    """A Ray cluster of hosts; returns when it runs. ``head_settings``: for the head's environment."""
    head.start_ray(environment=head_settings)
    for host in others:
        host.start_ray(head)
    for host in (head, *others):
        host.wait_for_ray()


def wait_for_jobs_api(head: "Host", client: "Host", cwd: Path) -> None:
    """Returns when a client reaches the Jobs API of a head that was started with ``JOBS_API``."""
    command = client.command([RAY, "job", "list", "--address", head.jobs_url], cwd)
    deadline = time.monotonic() + _RAY_START_TIMEOUT_S
    while (asked := subprocess.run(command, capture_output=True, text=True)).returncode != 0:
        assert time.monotonic() < deadline, f"{head.jobs_url} does not serve the Jobs API: {asked.stderr}"
        time.sleep(_POLL_INTERVAL_S)


class Host:
    """One host. Made by ``hosts``."""

    def __init__(self, name: str, number: int, switch: "_Namespaces", home: Path) -> None:
        self.name = name
        self.address = f"{_NETWORK}.{number}"
        self._mac_address = f"02:00:00:00:00:{number:02x}"  # the same after each start: its peers remember it
        self._switch = switch
        self._home = home
        self._starts = 0
        self._inside: _Namespaces | None = None
        self._ray: subprocess.Popen[bytes] | None = None

    def power_on(self) -> None:
        """Starts the host, with its address and nothing else."""
        self._starts += 1
        self._inside = _Namespaces()
        wire = f"name {NETWORK_INTERFACE} address {self._mac_address} netns {self._inside.pid}"
        self._switch.run(f"ip link add {self._port} type veth peer {wire}")
        self._inside.run(f"hostname {self.name}")
        self._inside.run("ip link set lo up")
        self._inside.run(f"ip address add {self.address}/24 dev {NETWORK_INTERFACE}")
        self._inside.run(f"ip link set {NETWORK_INTERFACE} up")
        self._switch.run(f"ip link set {self._port} master switch up")

    def power_off(self) -> None:
        """Takes its power: no process of it ends in order, and no peer hears of it."""
        self.cut()  # first, for the kernel closes the connections of the dead
        self.end()

    def end(self) -> None:
        """Ends it and all that runs on it, if its power is on."""
        if self._inside is not None:
            self._inside.end()
            self._inside = None
        if self._ray is not None:
            self._ray.wait()
            self._ray = None

    def cut(self) -> None:
        """Cuts its cable: what it sends is lost, and what is sent to it. It still reaches itself."""
        self._switch.run(f"ip link set {self._port} down")

    def mend(self) -> None:
        """Makes its cable whole again."""
        self._switch.run(f"ip link set {self._port} up")

    def limit(self, mbit_per_s: float | None) -> None:
        """Limits its cable in both directions, to so many bits of packets; None: no limit, as after ``power_on``."""
        assert self._inside is not None, f"{self.name} is off"
        discipline = "noqueue" if mbit_per_s is None else f"tbf rate {mbit_per_s}mbit {_LIMITED_QUEUE}"
        self._inside.run(f"tc qdisc replace dev {NETWORK_INTERFACE} root {discipline}")
        self._switch.run(f"tc qdisc replace dev {self._port} root {discipline}")

    def command(
        self, arguments: Sequence[object], cwd: Path, environment: Mapping[str, str] | None = None
    ) -> list[str]:
        """A command line for this machine that runs another one on the host, with what Ray needs there."""
        assert self._inside is not None, f"{self.name} is off"
        settings = {
            "PYTHONPATH": str(CHECKOUT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._home / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            **(environment or {}),
        }
        assignments = [f"{name}={value}" for name, value in settings.items()]
        return self._inside.command("env", f"--chdir={cwd}", *assignments, *map(str, arguments))

    def start_ray(
        self,
        head: "Host | None" = None,
        *,
        num_cpus: int = 1,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Begins to start Ray: a head, or a node that joins one.

        A driver needs nothing but the head's address: Ray looks for its node among the processes it sees, which are
        those of the driver's host. ``ray stop`` is not for hosts; ``stop_ray`` and ``power_off`` are. ``options``: more
        of ``ray start``.
        """
        # Nobody looks at a dashboard.
        of_head = ["--head", f"--port={_RAY_PORT}", "--include-dashboard=false"]
        whose = of_head if head is None else [f"--address={head.ray_address}"]
        arguments = [
            *(RAY, "start", "--block", *whose),
            f"--node-ip-address={self.address}",
            f"--num-cpus={num_cpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--temp-dir={self._home / self.name}",
            *options,
        ]
        with open(self._ray_log, "wb") as log:
            self._ray = subprocess.Popen(
                self.command(arguments, self._home, environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for_ray(self) -> None:
        """Returns when Ray runs on the host."""
        assert self._ray is not None, f"Ray was not started on {self.name}"
        deadline = time.monotonic() + _RAY_START_TIMEOUT_S
        while "Ray runtime started" not in (said := self._ray_log.read_text()):
            assert self._ray.poll() is None, f"Ray did not start on {self.name}: {said}"
            assert time.monotonic() < deadline, f"Ray has not started on {self.name}: {said}"
            time.sleep(_POLL_INTERVAL_S)

    @property
    def bytes_sent(self) -> int:
        """Bytes of packets that have left it through its cable since it was powered on."""
        assert self._inside is not None, f"{self.name} is off"
        counters = Path(f"/proc/{self._inside.pid}/net/dev").read_text().partition(f"{NETWORK_INTERFACE}:")[2]
        return int(counters.split()[_COUNTER_OF_BYTES_SENT])

    @property
    def runs_ray(self) -> bool:
        """Whether Ray, which was started here, has not ended."""
        return self._ray is not None and self._ray.poll() is None

    @property
    def ray_address(self) -> str:
        """Where a driver, and other nodes, find this host if it is a head."""
        return f"{self.address}:{_RAY_PORT}"

    @property
    def jobs_url(self) -> str:
        """Where its Jobs API is, if it is a head that serves it."""
        return f"http://{self.address}:{JOBS_API_PORT}"

    @property
    def _port(self) -> str:
        return f"{self.name}-{self._starts}"  # the kernel takes its time to drop that of a host without power

    @property
    def _ray_log(self) -> Path:
        return self._home / f"{self.name}.log"


class _Namespaces:
    """Namespaces of their own, and the process that holds them."""

    def __init__(self) -> None:
        hold = [
            "sh",
            "-c",
            "echo ready; exec env --ignore-signal=CHLD sleep infinity",
        ]  # orphans are reaped, as by init
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", *unshare, *hold]
        self._holder = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            _, stderr = self._holder.communicate()
            raise subprocess.CalledProcessError(self._holder.returncode, command, stderr=stderr)
        holder = self._holder.pid
        self.pid = int(Path(f"/proc/{holder}/task/{holder}/children").read_text())

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs another one in the namespaces."""
        return self._enter("--net", "--uts", "--mount", "--pid", *arguments)

    def run(self, command: str) -> None:
        """Runs a command on devices and names; it sees the processes of the machine."""
        subprocess.run(self._enter("--net", "--uts", *command.split()), check=True, capture_output=True, text=True)

    def end(self) -> None:
        """Kills every process in the namespaces, and returns when they are gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._holder.communicate()  # the first process ends after all others, and the holder after that

    def _enter(self, *arguments: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *arguments]

    def __enter__(self) -> "_Namespaces":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
