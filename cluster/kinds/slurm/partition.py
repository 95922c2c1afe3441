"""A partition of a Slurm cluster: which of its nodes can hold what a job takes of each, and what its limits are.

Slurm accepts a job that no node of the partition can hold, or whose time limit is too long, and leaves it pending for
ever; so those are refused here. Whether an account, a quality of service or a reservation may use the partition, only
Slurm knows.

Sources: sinfo(1) and scontrol(1) of Slurm 22.05.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.capacity import Capacity, Node
from cluster.errors import ClusterError, listed, nearest
from cluster.kinds.slurm.commands import SlurmCommands, query
from cluster.scheduler import ClusterReport
from cluster.spec.durations import seconds_from
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec

_NODE_FORMAT = "%N|%T|%c|%m|%G|%f"
_STATE_MARKS = "*~#!%$@^-+"
"""What may stand behind the state of a node: it does not answer, saves power, reboots, is planned for a job, ..."""
NO_ANSWER = "*"
GONE = frozenset({"down", "drained", "draining", "fail", "failing", "error", "unknown", "inval", "future"})
"""States of nodes that get no new job until a person has looked at them."""
_UNLIMITED = "UNLIMITED"
_NONE = "NONE"
_MB_PER_GB = 1024
_UP = "UP"
_SIMPLE_FEATURE = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmNode:
    """A node as ``sinfo`` shows it.

    Attributes:
        name: Its name.
        state: Its state, with the marks behind it.
        cpus: Its CPUs, as Slurm counts them for ``--cpus-per-task``.
        memory_mb: Its memory in MiB.
        gpus: The number of its GPUs by type; those without a type have an empty one.
        features: Its features.
    """

    name: str
    state: str
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]
    features: frozenset[str]

    @property
    def is_usable(self) -> bool:
        """Whether Slurm may start jobs on it, now or after those that run there."""
        return NO_ANSWER not in self.state and self.state.rstrip(_STATE_MARKS).lower() not in GONE

    @property
    def hardware(self) -> str:
        """What it has, for people."""
        gpus = [f"{count} GPU ({kind})" if kind else f"{count} GPU" for kind, count in self.gpus.items()]
        return ", ".join([f"{self.cpus} CPU", *gpus, f"{self.memory_mb / _MB_PER_GB:.4g} GB"])

    def num_gpus(self, kind: str | None) -> int:
        """Return the number of its GPUs of a type; None: of all types."""
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


def read_partition(commands: SlurmCommands, spec: SlurmClusterSpec) -> ClusterReport:
    """Ask a cluster what its partition has, and report the nodes that a job can get, with what it takes of each.

    What other jobs have reserved counts as free: a job waits for its nodes, and has all of it then.

    Raises:
        ClusterError: As ``SlurmCommands.ask``; or the partition cannot run the job, whatever the number of its nodes.
    """
    asked = [
        query("sinfo", "--noheader", "--Node", f"--partition={spec.partition}", f"--format={_NODE_FORMAT}"),
        query("scontrol", "show", "partition", "--all", "--oneliner"),
    ]
    if spec.exclude is not None:
        asked.append(("scontrol", "show", "hostnames", spec.exclude))
    answers = commands.ask(*asked)
    for answer in answers:
        if answer.code:
            raise commands.refused("does not say which nodes there are", answer)
    excluded = frozenset(answers[2].text.split()) if spec.exclude is not None else frozenset()
    try:
        nodes, partitions = nodes_from(answers[0].text), partitions_from(answers[1].text)
        capacity = capacity_of(spec, nodes, partitions, excluded)
    except ValueError as error:
        raise ClusterError(f"{spec.address}: {error}; use a version of launcher for its Slurm") from error
    return ClusterReport(capacity=capacity, nodes=(), silent=(), warnings=_warnings(spec, partitions[spec.partition]))


def capacity_of(
    spec: SlurmClusterSpec,
    nodes: Sequence[SlurmNode],
    partitions: Mapping[str, Mapping[str, str]],
    excluded: frozenset[str],
) -> Capacity:
    """Return the nodes of a partition that a job can get, at most as many as the partition gives to one job.

    Args:
        spec: The cluster.
        nodes: The nodes of its partition.
        partitions: The fields of every partition of the cluster, by its name.
        excluded: The names of nodes that a job must not get.

    Raises:
        ClusterError: The partition cannot run the job, whatever the number of its nodes.
    """
    partition = partitions.get(spec.partition)
    if partition is None:
        raise ClusterError(
            f"{spec.address}: has no partition {spec.partition!r}{nearest(spec.partition, partitions)}; "
            f"cluster.partition must be one of {listed(sorted(partitions), 20)}"
        )
    where = f"{spec.address}: partition {spec.partition}"
    _check_limits(spec, partition, where)
    allowed = [node for node in nodes if node.name not in excluded]
    fitting = _fitting(spec, allowed, where)
    usable = [node for node in fitting if node.is_usable]
    if not usable:
        states = ", ".join(f"{node.name} ({node.state})" for node in fitting[:4])
        raise ClusterError(
            f"{where}: the nodes that have what a job takes of each get no jobs now: {states}"
            f"{f' and {len(fitting) - 4} more' if len(fitting) > 4 else ''}; see `sinfo -R` there for the reasons"
        )
    most = len(usable) if spec.qos is not None else min(len(usable), _amount(partition, "MaxNodes", len(usable)))
    resources = spec.nodes.resources
    return Capacity(
        nodes=tuple(
            Node(id=node.name, address=node.name, resources=resources, free=resources, drains_at=None, is_here=False)
            for node in usable[:most]
        ),
        limits=None,
    )


def nodes_from(text: str) -> list[SlurmNode]:
    """Return the nodes in lines of ``sinfo`` with the format of this module; a node may have several lines.

    Raises:
        ValueError: A line has another form.
    """
    nodes = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = line.split("|")
        if len(fields) != len(_NODE_FORMAT.split("|")):
            raise ValueError(f"sinfo prints {line[:100]!r}, where --format={_NODE_FORMAT} was asked for")
        name, state, cpus, memory_mb, gres, features = fields
        nodes[name] = SlurmNode(
            name=name,
            state=state,
            cpus=_leading_number(cpus),
            memory_mb=_leading_number(memory_mb),
            gpus=gpus_from(gres),
            features=frozenset(features.split(",")),
        )
    return list(nodes.values())


def gpus_from(gres: str) -> dict[str, int]:
    """Return the number of GPUs by type in generic resources such as ``gpu:a100:4(S:0-1),gpu:v100:2,nvme:1``."""
    counts = Counter[str]()
    for each in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = each.strip().removeprefix("gres/").split(":")
        if name != "gpu":
            continue
        count = rest.pop() if rest and rest[-1].isdecimal() else "1"
        kind = rest[0] if rest and rest[0] != "no_consume" else ""
        counts[kind] += int(count)
    return dict(counts)


def partitions_from(text: str) -> dict[str, dict[str, str]]:
    """Return the fields of every partition in lines of ``scontrol show partition --oneliner``, by its name."""
    partitions = {}
    for line in text.splitlines():
        fields = dict(field.partition("=")[::2] for field in line.split() if "=" in field)
        if "PartitionName" in fields:
            partitions[fields["PartitionName"]] = fields
    return partitions


def _check_limits(spec: SlurmClusterSpec, partition: Mapping[str, str], where: str) -> None:
    state = partition.get("State", _UP)
    if state != _UP:
        raise ClusterError(f"{where} is {state.lower()} and starts no jobs; ask its administrators, or use another")
    most_cpus = _amount(partition, "MaxCPUsPerNode", spec.nodes.cpus)
    if spec.nodes.cpus > most_cpus:
        raise ClusterError(
            f"{where}: gives a job at most {most_cpus} CPU of a node, and cluster.nodes.cpus is {spec.nodes.cpus}; "
            f"write at most {most_cpus}"
        )
    longest = partition.get("MaxTime", _UNLIMITED)
    # A quality of service may lift the partition's limits of time and nodes.
    if spec.time is not None and spec.qos is None and seconds_from(spec.time) > seconds_from(longest):
        raise ClusterError(
            f'{where}: gives a job at most {longest}, and cluster.time is {spec.time}; write at most "{longest}": the '
            "job saves, requeues itself and goes on"
        )
    given = _time_without_request(partition)
    if spec.time is None and seconds_from(given) < spec.least_time_s:
        raise ClusterError(
            f"{where}: gives a job without cluster.time {given}, and this one needs at least {spec.least_time_s} s, of "
            f"which stop_grace_s={spec.stop_grace_s} to save; write cluster.time, or lower stop_grace_s"
        )


def _time_without_request(partition: Mapping[str, str]) -> str:
    """Return the time limit of a job that asks for none."""
    default = partition.get("DefaultTime", _NONE)
    return partition.get("MaxTime", _UNLIMITED) if default == _NONE else default


def _warnings(spec: SlurmClusterSpec, partition: Mapping[str, str]) -> tuple[str, ...]:
    where, warnings = f"{spec.address}: partition {spec.partition}", []
    given, longest = _time_without_request(partition), partition.get("MaxTime", _UNLIMITED)
    if spec.time is None and seconds_from(given) < seconds_from(longest):
        warnings.append(
            f"{where} gives a job without cluster.time only {given}, after which it requeues itself; write "
            f'cluster.time for up to "{longest}"'
        )
    if spec.max_requeues and "CANCEL" in partition.get("PreemptMode", ""):
        warnings.append(
            f"{where} cancels the jobs that it preempts (PreemptMode=CANCEL): such a job saves, and does not start "
            "again by itself; submit the run again then"
        )
    return tuple(warnings)


def _fitting(spec: SlurmClusterSpec, nodes: Sequence[SlurmNode], where: str) -> list[SlurmNode]:
    """Return the nodes that have what a job takes of each.

    Raises:
        ClusterError: There is none.
    """
    needs = _needs(spec.nodes)
    if spec.constraint is not None and _SIMPLE_FEATURE.fullmatch(spec.constraint):
        feature = spec.constraint
        needs[f"the feature {feature} (cluster.constraint)"] = lambda node: feature in node.features
    fitting = [node for node in nodes if all(has(node) for has in needs.values())]
    if fitting:
        return fitting
    missing = [what for what, has in needs.items() if not any(map(has, nodes))]
    kinds = Counter(node.hardware for node in nodes)
    there = [f"{count} node{'s' * (count != 1)} with {hardware}" for hardware, count in kinds.most_common()]
    raise ClusterError(
        f"{where}: no node has {listed(missing) if missing else ' and '.join(needs)}; it has "
        f"{listed(there, 4) or 'no nodes'}{' without those of cluster.exclude' if spec.exclude else ''}"
    )


def _needs(spec: SlurmNodesSpec) -> dict[str, Callable[[SlurmNode], bool]]:
    """Return what a node must have: the words for people, and the test."""
    needs: dict[str, Callable[[SlurmNode], bool]] = {
        f"{spec.cpus} CPU (cluster.nodes.cpus)": lambda node: node.cpus >= spec.cpus
    }
    if spec.gpus:
        kind = f" of type {spec.gpu_type}" if spec.gpu_type else ""
        needs[f"{spec.gpus} GPU{kind} (cluster.nodes.gpus)"] = lambda node: node.num_gpus(spec.gpu_type) >= spec.gpus
    if spec.memory_gb is not None:
        memory_mb = spec.memory_gb * _MB_PER_GB
        needs[f"{spec.memory_gb} GB (cluster.nodes.memory_gb)"] = lambda node: node.memory_mb >= memory_mb
    return needs


def _amount(partition: Mapping[str, str], name: str, unlimited: int) -> int:
    """Return a limit of a partition; without one, the number that stands for it."""
    value = partition.get(name, _UNLIMITED)
    return unlimited if value == _UNLIMITED else int(value)


def _leading_number(text: str) -> int:
    """Return the number in ``64`` or ``64+``."""
    return int(text.rstrip("+"))
