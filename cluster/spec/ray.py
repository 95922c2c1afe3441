"""The description of a running Ray cluster."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Literal

from cluster.capacity import NodeGroup, node_resources
from cluster.errors import FieldError
from cluster.spec.checks import check_variables, is_folder
from cluster.spec.worker import WorkerSpec

_HOST_AND_PORT = re.compile(r"(?:[^\s:/?#\[\]@]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_URL_START = re.compile("^https?://")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGroupSpec:
    """Equal nodes that the cluster's autoscaler starts and ends: a worker group of a RayCluster."""

    nodes: int
    """The largest number of nodes, including those that are there now."""
    cpus: float
    """CPU cores of each node."""
    gpus: int = 0
    """GPUs of each node."""
    accelerator: str | None = None
    """The accelerator type of each node, by Ray's name for it, such as ``H100``."""

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise FieldError("nodes", f"must be at least 1, got {self.nodes}")
        if not 0 < self.cpus < math.inf:
            raise FieldError("cpus", f"must be finite and above 0, got {self.cpus}")
        if self.gpus < 0:
            raise FieldError("gpus", f"must be at least 0, got {self.gpus}")

    def node_group(self) -> NodeGroup:
        """Return the group with its resources by Ray's names."""
        return NodeGroup(most=self.nodes, resources=node_resources(self.cpus, self.gpus, self.accelerator))


@dataclass(frozen=True, kw_only=True, slots=True)
class RayClusterSpec:
    """A running Ray cluster. Its token comes from RAY_AUTH_TOKEN, from the file that RAY_AUTH_TOKEN_PATH names, or
    from ~/.ray/auth_token; do not write it here."""

    kind: Literal["ray"] = "ray"
    address: str
    """For ``launcher submit``, from anywhere: its Jobs API, http://HOST:PORT or https://HOST:PORT, which is the address
    of Ray's dashboard, port 8265 unless told otherwise. For ``launcher run`` and ``launcher resume`` on a host of the
    cluster: where its head listens to nodes and drivers, HOST:PORT as ``ray start --head`` prints it."""
    env: tuple[str, ...] = ()
    """Names of environment variables that each node must have, such as AWS_SECRET_ACCESS_KEY, never their values;
    ``launcher submit`` checks that they are set there, and sends none."""
    venv: str | None = None
    """The environment on the cluster's head whose bin/ holds ``launcher``, such as /opt/venv, and which Ray was started
    from; ``launcher submit`` runs that launcher. Null: ``launcher`` is on the PATH that Ray was started with."""
    autoscaler: tuple[NodeGroupSpec, ...] = ()
    """The groups of nodes that the cluster's autoscaler may start; none: it has no autoscaler. Ray does not report
    them, so a run that needs more than there is now is refused unless they are written here; then it waits for them,
    for up to ``workers.wait_s``. If nodes that are always there hold workers too, write them as one more group."""
    stop_grace_s: int = 300
    """Seconds that a job of ``launcher submit`` has between SIGINT and SIGKILL when it is stopped on the cluster, to
    finish its step and to save. Ray's default of 3 s is too short for a checkpoint; 300 s are enough to write
    30 GB at 100 MB/s. Raise it for larger checkpoints or slower stores; a save that is cut off costs the steps
    since the newest checkpoint."""
    worker: WorkerSpec = field(default_factory=WorkerSpec)

    def __post_init__(self) -> None:
        if "@" in self.address:
            raise FieldError("address", "must not hold a user, a password or a token; set RAY_AUTH_TOKEN")
        is_url = "://" in self.address
        where = _URL_START.sub("", self.address).removesuffix("/") if is_url else self.address
        if not _is_host_and_port(where):
            advice = "the Jobs API listens at port 8265 of the head" if is_url else "`ray start --head` printed it"
            raise FieldError("address", f"must be HOST:PORT or http(s)://HOST:PORT, got {self.address!r}; {advice}")
        check_variables(self.env)
        if self.venv is not None and not is_folder(self.venv):
            raise FieldError("venv", f"must be the absolute path of a folder on the head, got {self.venv!r}")
        if self.stop_grace_s < 1:
            raise FieldError("stop_grace_s", f"must be at least 1 second, got {self.stop_grace_s}")

    @property
    def node_groups(self) -> list[NodeGroup]:
        """The nodes that its autoscaler may start, with resources by Ray's names."""
        return [group.node_group() for group in self.autoscaler]

    def driver_overrides(self) -> list[str]:
        """Return what a driver on the cluster needs beside the address, as changes of a description of the cluster."""
        groups = [asdict(group) for group in self.autoscaler]
        return [*self.worker.overrides("worker"), *([f"autoscaler={json.dumps(groups)}"] if groups else [])]

    @property
    def array_numbers(self) -> tuple[int, ...]:
        """The numbers of the array that a submission becomes: none."""
        return ()

    @property
    def takes_jobs(self) -> bool:
        """Whether ``launcher submit`` can submit jobs to it: its address is a URL, of the Jobs API."""
        return "://" in self.address


def _is_host_and_port(text: str) -> bool:
    found = _HOST_AND_PORT.fullmatch(text)
    return found is not None and 0 < int(found["port"]) < 1 << 16
