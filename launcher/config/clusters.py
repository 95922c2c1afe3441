"""Resolves ``--cluster``: a YAML file, a name, or the address of a Ray cluster.

A name stands for a file in ``~/.config/launcher/clusters``, or for a shipped file.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import cluster
from cluster.capacity import NodeGroup, Places, num_cores
from cluster.errors import DescriptionError, FieldError, nearest
from cluster.kinds.cluster import Cluster
from cluster.kinds.ray import JoinedRay, LocalRay
from cluster.scheduler import Scheduler
from cluster.spec.kinds import KINDS, ClusterSpec, JobsClusterSpec
from cluster.spec.local import LocalClusterSpec
from cluster.spec.ray import RayClusterSpec
from cluster.spec.slurm import SlurmClusterSpec
from cluster.versions import check_ray_version
from launcher.config.cluster_addresses import is_typed
from launcher.config.description import ClusterOverride, Language, read, read_text

PREFIX = "cluster."
"""Prefix of the overrides that change the cluster and not the job."""

_SHIPPED: Final = Path(cluster.__file__).parent
_OWN: Final = "launcher/clusters"
"""The folder of the user's cluster files, relative to the XDG configuration folder."""


def load_cluster(named: str | None, overrides: Sequence[str]) -> tuple[ClusterSpec, list[str]]:
    """Return the spec of a cluster, and the overrides of the job: the cluster's worker settings, then the user's.

    Args:
        named: HOST:PORT of a Ray head, http(s)://HOST:PORT of its Jobs API, the path of a YAML file, or the name of one
            of the user's own or of the shipped files. None: this machine.
        overrides: Overrides of the cluster and of the job, mixed.

    Raises:
        DescriptionError: The cluster's description has a mistake; the text is one line.
    """
    of_cluster = [change.removeprefix(PREFIX) for change in overrides if change.startswith(PREFIX)]
    of_job = [change for change in overrides if not change.startswith(PREFIX)]
    if named is None and of_cluster:
        raise DescriptionError(f"command line: {PREFIX}{of_cluster[0]} changes a cluster; name it with --cluster")
    spec = LocalClusterSpec() if named is None else _read(named, of_cluster)
    return spec, [*map(ClusterOverride, spec.worker.overrides()), *of_job]


def open_cluster(spec: ClusterSpec) -> Cluster:
    """Return the cluster for a driver on one of its hosts.

    Raises:
        DescriptionError: The address is that of a Jobs API, which a driver cannot join.
        ClusterError: The driver does not support the installed version of Ray.
    """
    check_ray_version()
    if isinstance(spec, LocalClusterSpec):
        return LocalRay(num_cores())
    if isinstance(spec, SlurmClusterSpec):
        raise DescriptionError(
            f"{PREFIX}kind: slurm takes jobs, and no drivers; use launcher submit, or launcher render to see the script"
        )
    if spec.takes_jobs:
        raise DescriptionError(
            f"{PREFIX}address: {spec.address} takes jobs, and no drivers; use launcher submit, or give HOST:PORT as "
            "`ray start --head` printed it, on a host of the cluster"
        )
    return JoinedRay(spec.address, spec.node_groups)


def load_jobs_cluster(named: str | None, overrides: Sequence[str]) -> tuple[JobsClusterSpec, list[str]]:
    """Like ``load_cluster``, for a cluster that must take jobs.

    Raises:
        DescriptionError: The cluster takes no jobs, or its description has a mistake.
    """
    spec, job_overrides = load_cluster(named, overrides)
    return jobs_cluster(spec), job_overrides


def jobs_cluster(spec: ClusterSpec) -> JobsClusterSpec:
    """Return the same spec, narrowed to a cluster that takes jobs.

    Raises:
        DescriptionError: The cluster takes no jobs.
    """
    if isinstance(spec, LocalClusterSpec):
        raise DescriptionError(
            f"{PREFIX}kind: local is this machine, which takes no jobs; use launcher run, or give --cluster the file "
            "of a Slurm cluster, or the Jobs API of a Ray cluster, such as http://HOST:8265"
        )
    if isinstance(spec, RayClusterSpec) and not spec.takes_jobs:
        host = spec.address.rpartition(":")[0]
        raise DescriptionError(
            f"{PREFIX}address: {spec.address} takes drivers, and no jobs; write http://{host}:8265, or where else the "
            "cluster's dashboard listens"
        )
    return spec


def open_scheduler(spec: JobsClusterSpec) -> Scheduler:
    """Return the scheduler of a cluster that takes jobs; it can be used from any machine."""
    if isinstance(spec, SlurmClusterSpec):
        from cluster.kinds.slurm.jobs import SlurmJobs

        return SlurmJobs(spec)
    from cluster.kinds.ray_jobs import RayJobs  # imports an HTTP client and the stores

    return RayJobs(spec.address, spec.venv)


def job_nodes(spec: JobsClusterSpec, places: Places) -> str:
    """Return the nodes that a job brings for its workers, such as ``2 nodes of 8 CPU, 4 GPU``; empty: it brings none.

    Raises:
        ClusterError: Not even one worker fits on such a node.
    """
    if isinstance(spec, RayClusterSpec):
        return ""
    from cluster.kinds.slurm.script import node_range

    least, most = node_range(spec, places)
    nodes = NodeGroup(most=most, resources=spec.nodes.resources)
    return f"{nodes}" if least == most else f"{least} to {nodes}"


def _read(named: str, overrides: Sequence[str]) -> ClusterSpec:
    if is_typed(named):
        source = "--cluster" if "@" in named else f"--cluster {named}"  # a password may stand before the @
        return _read_spec(f"kind: ray\naddress: {json.dumps(named)}\n", source, overrides)
    if named.endswith((".yaml", ".yml")):
        path = Path(named)
    else:
        known = _named_files()
        if named not in known:
            raise DescriptionError(
                f"--cluster {named}: is no cluster{nearest(named, known)}; write HOST:PORT of a Ray head, "
                f"http://HOST:8265 to submit there, the path of a YAML file, or one of {', '.join(sorted(known))}"
            )
        path = known[named]
    return _read_spec(read_text(path), path.name, overrides)


def _read_spec(text: str, source: str, overrides: Sequence[str]) -> ClusterSpec:
    spec: ClusterSpec = read(_CLUSTERS, text, source, overrides)[0]
    return spec


def _named_files() -> dict[str, Path]:
    """Return the cluster files by name; the user's own replace shipped ones of the same name."""
    files = [path for folder in (_SHIPPED, _own_folder()) for path in folder.glob("[!.]*.yaml")]
    return {path.stem: path for path in files}


def _own_folder() -> Path:
    """Return ``$XDG_CONFIG_HOME/launcher/clusters``, by default ``~/.config/launcher/clusters``.

    Source: XDG Base Directory Specification: a relative ``XDG_CONFIG_HOME`` is ignored.
    """
    configuration = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not configuration.is_absolute():
        configuration = Path.home() / ".config"
    return configuration / _OWN


def language_of(kind: str) -> type[ClusterSpec]:
    """Return the dataclass that describes clusters of a kind.

    Raises:
        DescriptionError: There is no such kind.
    """
    try:
        return _section_of({"kind": kind})
    except FieldError as error:
        raise DescriptionError(f"--cluster {error}") from error


def _section_of(written: Mapping[str, Any]) -> type[ClusterSpec]:
    kind = written.get("kind")
    if kind is None:
        raise FieldError("kind", f"is missing; write one of {', '.join(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise FieldError("kind", f"must be one of {', '.join(KINDS)}, got {kind!r}{nearest(str(kind), KINDS)}")
    return KINDS[kind]


_CLUSTERS: Final = Language(_section_of, "kind")
