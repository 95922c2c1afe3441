"""The program that a batch script runs on each node of its job: Ray, for as long as the script lives.

The script reads the stdout of all nodes, and holds a pipe to their stdin. The first node starts a head and prints
``ray-head HOST:PORT``, which the script writes to all, so that the others join it. Each node then prints
``ray-node NAME ADDRESS``; one that cannot go on prints ``failed`` in place of its address. When the script ends, the
pipe is closed, and each node kills all that Ray has started there. What Ray prints goes to stderr.
"""

import argparse
import ctypes
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.errors import ClusterError
from cluster.host.temporary_folder import TemporaryFolderError, check_socket_path
from cluster.ray.private_core import without_client_server
from cluster.ray.session_folder import LONGEST_SOCKET

_KEPT_FROM_RAY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends SIGTERM to all processes of a step when it preempts or cancels a job, and Ray ends on it. The driver
needs Ray to save. The batch script hears of it later, by the partition's GraceTime, so the first node tells it."""
_SETTINGS = {
    "RAY_START_HOOK": f"{without_client_server.__module__}.{without_client_server.__name__}",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
"""Of Ray. Without the checks of health, the head notices the loss of a node after a minute, and not after seconds."""
_OBJECT_STORE_BYTES = 100 * 2**20
_START_LIMIT_S = 600.0
"""How long Ray may take to start; shorter than the script waits for its head, so that this program says what failed."""
_POLL_INTERVAL_S = 0.1
_ASK_INTERVAL_S = 5.0
"""Between two questions to the controller, from the nodes that have lost their Ray."""
_ALIVE = ("RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "CONFIGURING")
"""The states of a job that has not ended."""
_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_FROM_RAY)  # all that is started from here inherits it
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--script", type=int, help="the batch script, which is to hear of a SIGTERM to its steps")
    parser.add_argument("--job", help="the job as Slurm's commands take it, if it outlives the loss of nodes")
    parser.add_argument("--first", help="then the node of the script")
    options = parser.parse_args()
    name, is_first = os.environ["SLURMD_NODENAME"], os.environ["SLURM_NODEID"] == "0"
    _adopt_orphans()
    try:
        with tempfile.TemporaryDirectory(prefix="ray-", dir=_parent(), ignore_cleanup_errors=True) as folder:
            try:
                resources = [f"--num-cpus={options.cpus}", f"--num-gpus={options.gpus}"]
                _run(name, is_first, Path(folder), resources, options.script if is_first else None)
            finally:
                _kill_descendants()
                if is_first:  # a script that was killed leaves it
                    Path(os.environ["RAY_AUTH_TOKEN_PATH"]).unlink(missing_ok=True)
    except ClusterError as error:
        print("ray-head" if is_first else f"ray-node {name}", "failed", flush=True)
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        if options.job is not None and not is_first:
            _end_without_script(options.job, options.first)
        return error.exit_code
    return 0


def _run(name: str, is_first: bool, folder: Path, resources: list[str], script: int | None) -> None:
    """Run Ray until the script ends.

    Args:
        name: This node.
        is_first: Whether it runs the script, and the head.
        folder: For Ray's files.
        resources: The options of ``ray start`` that say what it has.
        script: The process to tell of a SIGTERM; None: none.

    Raises:
        ClusterError: Ray did not start, or has ended.
    """
    head = None if is_first else _read_line()
    if head == "":
        return
    address = _address_of(name, head)
    ray = _start_ray(head, address, folder, resources)
    # `ray start` writes this file into the folder of --temp-dir when all of the node's processes are up.
    reported = folder / "ray_current_cluster"
    deadline = time.monotonic() + _START_LIMIT_S
    while not (head := reported.read_text() if reported.exists() else ""):
        if _has_ended(_POLL_INTERVAL_S):
            return
        if ray.poll() is not None or time.monotonic() > deadline:
            late = "has ended" if ray.returncode is not None else f"is not done after {_START_LIMIT_S:.0f} s"
            raise ClusterError(f"`ray start` {late}; above is what it printed")
    if is_first:
        print(f"ray-head {head}", flush=True)
    print(f"ray-node {name} {address}", flush=True)
    while not _has_ended(_POLL_INTERVAL_S):
        if ray.poll() is not None:
            raise ClusterError("Ray has ended; above is what it printed")
        if script is not None and signal.SIGTERM in signal.sigpending():
            with suppress(ProcessLookupError):
                os.kill(script, signal.SIGUSR2)
            script = None


def _start_ray(head: str | None, address: str, folder: Path, resources: list[str]) -> "subprocess.Popen[bytes]":
    """Start Ray: a head if there is none. All ports are free ones: other jobs may run on this node."""
    if head is None:
        of_head = ["--include-dashboard=false", "--dashboard-port=0"]
        role = ["--head", "--port=0", *of_head]
    else:
        role = [f"--address={head}"]
    command = [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", *role, *resources),
        f"--node-ip-address={address}",
        f"--temp-dir={folder}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]
    environment = {**os.environ, **_SETTINGS}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)


def _parent() -> str:
    """Return the folder for that of Ray; not the temporary one of this job if its path is too long for sockets."""
    with suppress(TemporaryFolderError):
        check_socket_path(tempfile.gettempdir(), f"ray-12345678/{LONGEST_SOCKET}")
        return tempfile.gettempdir()
    return "/tmp"  # noqa: S108


def _address_of(name: str, head: str | None) -> str:
    """Return the address of this node for others: of its name, of what Slurm calls it, or on the way to the head.

    Raises:
        ClusterError: It has none that others can reach.
    """
    if found := _resolved(name):
        return found
    if os.environ["SLURM_JOB_NUM_NODES"] == "1":
        return "127.0.0.1"
    shown = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "show", "node", "--oneliner", name))
    if shown and (found := _resolved(shown[1])):
        return found
    if head is not None:
        host, port = head.rsplit(":", 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way, suppress(OSError):
            way.connect((host, int(port)))  # sends nothing
            return str(way.getsockname()[0])
    raise ClusterError(
        f"the names of this node, {name} and Slurm's NodeAddr, have no address here that other nodes can reach; Ray "
        "needs one: see /etc/hosts and DNS"
    )


def _resolved(name: str) -> str | None:
    """Return the address of a name that other nodes can reach; None: it has none."""
    with suppress(OSError):
        found = socket.gethostbyname(name)
        return None if found.startswith("127.") else found
    return None


def _read_line() -> str:
    """Return the next line of stdin; empty: the script has ended."""
    line = b""
    while not line.endswith(b"\n"):
        if not (more := os.read(sys.stdin.fileno(), 4096)):
            return ""
        line += more
    return line.decode().strip()


def _has_ended(timeout_s: float) -> bool:
    """Return whether the script has ended, after at most this time."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], timeout_s)
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def _end_without_script(job: str, first: str) -> None:
    """Wait for the end of the script; if its node is lost, end this try of the job.

    Slurm lets a job with --no-kill run on without the node of its script, for ever. Ray ends here when it has lost its
    head, which is on that node.
    """
    tries = os.environ.get("SLURM_RESTART_COUNT", "0")
    while not _has_ended(_ASK_INTERVAL_S):
        shown = _ask("scontrol", "show", "job", "--oneliner", job)
        fields = dict(re.findall(r"\b(JobState|Restarts|NodeList)=(\S*)", shown))
        if not fields:  # the controller does not answer
            continue
        if fields["JobState"] not in _ALIVE or fields["Restarts"] != tries:
            return
        if fields["JobState"] != "RUNNING":
            continue
        left = _ask("scontrol", "show", "hostnames", fields["NodeList"]).split()
        if left and first not in left:
            end = ["scontrol", "requeue"] if os.environ.get("LAUNCHER_JOB_REQUEUES") else ["scancel"]
            print(f"{first}, which ran the batch script, is lost: {' '.join(end)} {job}", file=sys.stderr, flush=True)
            _ask(*end, job)


def _ask(*command: str) -> str:
    """Return what a command of Slurm's prints; empty if it fails or takes too long."""
    with suppress(subprocess.TimeoutExpired, FileNotFoundError):  # a container has no Slurm
        asked = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60, text=True)
        return asked.stdout if asked.returncode == 0 else ""
    return ""


def _adopt_orphans() -> None:
    """Make this process the parent of descendants that lose theirs, so that it finds them at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _kill_descendants() -> None:
    """Kill all processes that Ray has started, and return when they are gone."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
