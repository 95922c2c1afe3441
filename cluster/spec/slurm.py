"""The description of a Slurm cluster."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.capacity import NodeGroup, node_resources
from cluster.errors import FieldError
from cluster.spec.checks import check_variables, is_folder
from cluster.spec.durations import seconds_from
from cluster.spec.worker import WorkerSpec

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")
_LIST = re.compile(r"[A-Za-z0-9_.@+:,&|*()\[\]/-]+")
"""What may stand in a feature expression, a list of nodes or a dependency: nothing that a shell would split."""
_ARRAY_PART = re.compile(r"(?P<first>[0-9]{1,7})(?:-(?P<last>[0-9]{1,7}))?")
_LONGEST_ARRAY = 100
"""Each task is a run, which is tried out before it is submitted."""
_OPTION = re.compile(r"--[a-z][a-z-]*(?:=[^\s'\"\\#]+)?")
_OWN_OPTIONS: Mapping[str, str] = {
    "--account": "account", "--partition": "partition", "--qos": "qos", "--constraint": "constraint",
    "--reservation": "reservation", "--exclude": "exclude", "--dependency": "dependency", "--time": "time",
    "--nodes": "nodes", "--cpus-per-task": "nodes.cpus", "--gpus-per-node": "nodes.gpus", "--gres": "nodes.gpus",
    "--mem": "nodes.memory_gb", "--requeue": "max_requeues", "--no-requeue": "max_requeues",
    "--signal": "stop_grace_s", "--container-image": "container_image", "--export": "env", "--array": "array",
}  # fmt: skip
"""Options of ``sbatch`` that a field stands for, with that field."""
_WRITTEN_OPTIONS = (
    "--job-name", "--comment", "--output", "--error", "--open-mode", "--ntasks", "--ntasks-per-node", "--gpus",
    "--no-kill", "--wrap", "--parsable", "--test-only", "--chdir", "--wait", "--clusters",
)  # fmt: skip
"""Options of ``sbatch`` that the script needs for itself, or that change what the script is or who looks after it."""
_LONGEST_SIGNAL_S = 65535
"""The longest time that ``sbatch --signal`` takes."""
SIGNAL_MARGIN_S = 60
"""How much earlier than ``stop_grace_s`` before its limit a job is told: Slurm looks at limits every 30 s."""
_SHORTEST_START_S = 60
"""The least time from the start of a job to its first step that a time limit must leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmNodesSpec:
    """What a job takes of each of its nodes. The number of nodes follows from ``workers.num``."""

    cpus: int
    """CPU cores."""
    gpus: int = 0
    """GPUs."""
    gpu_type: str | None = None
    """The type of the GPUs by Slurm's name, as ``sinfo -o %G`` shows it, such as ``a100``; null: any."""
    accelerator: str | None = None
    """The type of the GPUs by Ray's name, such as ``A100``, for jobs that ask for it with ``workers.accelerator``."""
    memory_gb: int | None = None
    """Memory in GiB; null: what the partition gives for the cores."""

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise FieldError("cpus", f"must be at least 1, got {self.cpus}")
        if self.gpus < 0:
            raise FieldError("gpus", f"must be at least 0, got {self.gpus}")
        if self.gpu_type is not None and not _WORD.fullmatch(self.gpu_type):
            raise FieldError("gpu_type", f"must be a name such as a100, got {self.gpu_type!r}")
        if self.gpu_type is not None and not self.gpus:
            raise FieldError("gpu_type", "needs gpus, which are 0")
        if self.memory_gb is not None and self.memory_gb < 1:
            raise FieldError("memory_gb", f"must be at least 1, got {self.memory_gb}")

    @property
    def resources(self) -> dict[str, float]:
        """The resources of a node, by Ray's names."""
        return node_resources(self.cpus, self.gpus, self.accelerator)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmClusterSpec:
    """A Slurm cluster. ``launcher submit`` hands over a batch script, which ``launcher render`` prints; the script
    starts Ray on the nodes of the job and drives the run. Before its time limit, and when it is preempted, the job
    saves, requeues itself, and goes on."""

    kind: Literal["slurm"] = "slurm"
    login: str | None = None
    """The host on which ``sbatch`` is called, as ``ssh`` names it, such as me@login.uni.edu; ``ssh`` must reach it
    without a password. Null: this machine."""
    partition: str
    """The partition."""
    nodes: SlurmNodesSpec
    """What a job takes of each node."""
    time: str | None = None
    """The time limit of a job between two requeues, in quotes, as ``sbatch --time`` takes it: "4:00:00" or "1-12".
    Null: the partition's default, which may be much shorter than its limit."""
    account: str | None = None
    """The account that is charged. Null: yours by default; SBATCH_ACCOUNT does not count."""
    qos: str | None = None
    """The quality of service. Null: that of the account; SBATCH_QOS does not count."""
    constraint: str | None = None
    """Features that the nodes must have, such as ``h100&nvlink``."""
    reservation: str | None = None
    """The reservation."""
    exclude: str | None = None
    """Nodes that are not used, such as ``node[7,12-14]``."""
    dependency: str | None = None
    """When the job may start, such as ``afterok:1234``."""
    array: str | None = None
    """Numbers such as ``0-2``, ``1,5,9`` or ``0-9%3`` (three at a time): ``launcher submit`` then submits a run NAME-N
    with the seed N for each number N, as the tasks of one Slurm array."""
    max_requeues: int = 100
    """A job that has started again this often, for whatever reason, requeues itself no more; 0: it never does."""
    stop_grace_s: int = 300
    """Seconds before the time limit at which the job is told to save at the latest. The driver decides earlier, by
    what the last save took. 300 s are enough to write 30 GB at 100 MB/s."""
    venv: str | None = None
    """The environment, on all nodes, whose bin/ holds ``launcher``, such as /shared/venv. Null: ``launcher`` is on the
    PATH of a login shell, after ``prologue``."""
    prologue: tuple[str, ...] = ()
    """Lines of bash that the script runs first, on the first node: ``module load cuda/12.4``, ``conda activate x``."""
    env: tuple[str, ...] = ()
    """Names of environment variables that the job must have, such as AWS_SECRET_ACCESS_KEY, never their values. They
    are taken from where ``sbatch`` is called, or the login shell or ``prologue`` sets them."""
    container_image: str | None = None
    """The image in which Ray and the driver run, for Slurm with the Pyxis plugin; it holds the launcher."""
    options: tuple[str, ...] = ()
    """More options of ``sbatch``, each ``--NAME=VALUE``, such as ``--mail-type=END``."""
    folder: str | None = None
    """An absolute path that all nodes see, for the job's log and the token of its Ray. Null: .launcher/slurm in the
    home folder."""
    worker: WorkerSpec = field(default_factory=WorkerSpec)

    def __post_init__(self) -> None:
        if self.login is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*", self.login):
            raise FieldError("login", f"must be a host as ssh names it, such as me@login.uni.edu, got {self.login!r}")
        for name in ("partition", "account", "qos", "reservation"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise FieldError(name, f"must be a name, got {value!r}")
        for name in ("constraint", "exclude", "dependency"):
            value = getattr(self, name)
            if value is not None and not _LIST.fullmatch(value):
                raise FieldError(name, f"must be as sbatch --{name} takes it, without spaces and quotes, got {value!r}")
        self._check_time()
        self._check_array()
        if self.max_requeues < 0:
            raise FieldError("max_requeues", f"must be at least 0, got {self.max_requeues}")
        if not 1 <= self.stop_grace_s <= _LONGEST_SIGNAL_S - SIGNAL_MARGIN_S:
            most = _LONGEST_SIGNAL_S - SIGNAL_MARGIN_S
            raise FieldError("stop_grace_s", f"must be from 1 to {most} seconds, got {self.stop_grace_s}")
        for name in ("venv", "folder"):
            value = getattr(self, name)
            if value is not None and not is_folder(value):
                raise FieldError(name, f"must be the absolute path of a folder that all nodes see, got {value!r}")
        for number, line in enumerate(self.prologue):
            if not line.strip() or not line.isprintable():
                raise FieldError(f"prologue[{number}]", "must be one line of bash; write several as several items")
        check_variables(self.env)
        if self.container_image is not None and re.search(r"[\s'\"\\]|^-|^$", self.container_image):
            raise FieldError("container_image", f"must be without spaces and quotes, got {self.container_image!r}")
        for number, option in enumerate(self.options):
            self._check_option(f"options[{number}]", option)

    @property
    def takes_jobs(self) -> bool:
        """Whether ``launcher submit`` can submit jobs to it: always."""
        return True

    @property
    def address(self) -> str:
        """The name of the cluster in messages, and in submissions, which say by it which cluster to ask for their job.

        It must not depend on the machine that asks, for a cluster has several login nodes. Clusters that are each used
        from a login node of their own have the same name; as they know no jobs of each other, a run that moves between
        them without ``login`` reads as one whose job is forgotten.
        """
        return f"slurm:{self.login or 'local'}"

    @property
    def node_groups(self) -> list[NodeGroup]:
        """The nodes that an autoscaler may start: none."""
        return []

    @property
    def array_numbers(self) -> tuple[int, ...]:
        """The numbers of the array, in order; empty: there is none."""
        return tuple(sorted({number for part in self._array_ranges for number in part}))

    @property
    def array_limit(self) -> int | None:
        """How many tasks of the array run at once at most; None: any number."""
        limit = (self.array or "").partition("%")[2]
        return int(limit) if limit else None

    @property
    def least_time_s(self) -> int:
        """The shortest time limit, in seconds, that leaves a job time to start before it is told to save."""
        return self.stop_grace_s + SIGNAL_MARGIN_S + _SHORTEST_START_S

    def driver_overrides(self) -> list[str]:
        """Return what a driver on the cluster needs beside the address, as changes of a description of the cluster."""
        return self.worker.overrides("worker")

    def _check_time(self) -> None:
        if self.time is None:
            return
        try:
            limit_s = seconds_from(self.time)
        except ValueError as error:
            raise FieldError("time", f'must be such as "4:00:00" or "1-12", in quotes, got {self.time!r}') from error
        if limit_s < self.least_time_s:
            raise FieldError(
                "time",
                f"must be at least {self.least_time_s} s, got {self.time!r}: the job is told to save stop_grace_s="
                f"{self.stop_grace_s} and {SIGNAL_MARGIN_S} s before it, and needs a minute to start; raise it, or "
                "lower stop_grace_s",
            )

    @property
    def _array_ranges(self) -> list[range]:
        parts = (self.array or "").partition("%")[0].split(",")
        found = [match for match in map(_ARRAY_PART.fullmatch, parts) if match]
        return [range(int(match["first"]), int(match["last"] or match["first"]) + 1) for match in found]

    def _check_array(self) -> None:
        if self.array is None:
            return
        parts, percent, limit = self.array.partition("%")
        is_limit = not percent or (limit.isdecimal() and int(limit) > 0)
        if not is_limit or not all(map(_ARRAY_PART.fullmatch, parts.split(","))):
            raise FieldError("array", f"must be such as 0-2, 1,5,9 or 0-9%3, got {self.array!r}")
        if not all(self._array_ranges) or sum(map(len, self._array_ranges)) > _LONGEST_ARRAY:
            raise FieldError("array", f"must have from 1 to {_LONGEST_ARRAY} numbers, got {self.array!r}")

    @staticmethod
    def _check_option(key: str, option: str) -> None:
        if not _OPTION.fullmatch(option):
            raise FieldError(key, f"must be --NAME or --NAME=VALUE, without spaces and quotes, got {option!r}")
        name = option.partition("=")[0]
        if name in _OWN_OPTIONS:
            raise FieldError(key, f"{name} has a field of its own; write {_OWN_OPTIONS[name]}")
        if name in _WRITTEN_OPTIONS:
            raise FieldError(key, f"must not be {name}, which the launcher decides")
        if full := [each for each in (*_OWN_OPTIONS, *_WRITTEN_OPTIONS) if each.startswith(name)]:
            raise FieldError(key, f"must be the full name of an option; {name} may stand for {full[0]}")
