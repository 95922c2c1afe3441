"""Which cluster is meant by ``--cluster``: a file, a name, or the address of a Ray cluster.

A name is that of a file in ``~/.config/launcher/clusters``, or of one that is shipped.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import cluster
from cluster.capacity import num_cores
from cluster.errors import DescriptionError, FieldError, nearest
from cluster.kinds.cluster import Cluster
from cluster.kinds.ray import JoinedRay, LocalRay
from cluster.scheduler import Scheduler
from cluster.spec import KINDS, ClusterSpec, LocalClusterSpec, RayClusterSpec
from cluster.versions import check_ray_version
from launcher.config.description import Language, OfCluster, read, read_text

PREFIX = "cluster."
"""Of the overrides that change the cluster, and not the job."""

_SHIPPED: Final = Path(cluster.__file__).parent
_OWN: Final = "launcher/clusters"
"""The folder of a person's own clusters, in that of their configuration."""


def load_cluster(named: str | None, overrides: Sequence[str]) -> tuple[ClusterSpec, list[str]]:
    """The cluster that is meant, and the overrides of the job: what it says of workers first, the person's own last.

    Args:
        named: HOST:PORT of a Ray head, http(s)://HOST:PORT of its Jobs API, the path of a YAML file, or the name of one
            of the person's own or of those that are shipped; none: this machine.
        overrides: Of both.

    Raises:
        DescriptionError: For every mistake in it, in one line.
    """
    of_cluster = [change.removeprefix(PREFIX) for change in overrides if change.startswith(PREFIX)]
    of_job = [change for change in overrides if not change.startswith(PREFIX)]
    if named is None and of_cluster:
        raise DescriptionError(f"command line: {PREFIX}{of_cluster[0]} changes a cluster; name it with --cluster")
    spec = LocalClusterSpec() if named is None else _read(named, of_cluster)
    return spec, [*map(OfCluster, spec.worker.overrides()), *of_job]


def open_cluster(spec: ClusterSpec) -> Cluster:
    """The cluster that is described, as a driver on one of its hosts joins it.

    Raises:
        DescriptionError: It cannot be joined, for its address is that of its Jobs API.
        ClusterError: Another Ray is installed than those that the driver knows how to steer.
    """
    check_ray_version()
    if isinstance(spec, LocalClusterSpec):
        return LocalRay(num_cores())
    if spec.takes_jobs:
        raise DescriptionError(
            f"{PREFIX}address: {spec.address} takes jobs, and no drivers; use launcher submit, or give HOST:PORT as "
            "`ray start --head` printed it, on a host of the cluster"
        )
    return JoinedRay(spec.address, spec.node_groups)


def load_jobs_cluster(named: str | None, overrides: Sequence[str]) -> tuple[RayClusterSpec, list[str]]:
    """As ``load_cluster``, of a cluster that takes jobs.

    Raises:
        DescriptionError: It takes none; or there is a mistake in its description.
    """
    spec, changes = load_cluster(named, overrides)
    return jobs_cluster(spec), changes


def jobs_cluster(spec: ClusterSpec) -> RayClusterSpec:
    """The same cluster, which takes jobs.

    Raises:
        DescriptionError: It takes none.
    """
    if isinstance(spec, LocalClusterSpec):
        raise DescriptionError(
            f"{PREFIX}kind: local is this machine, which takes no jobs; use launcher run, or give --cluster the "
            "Jobs API of a Ray cluster, such as http://HOST:8265"
        )
    if not spec.takes_jobs:
        host = spec.address.rpartition(":")[0]
        raise DescriptionError(
            f"{PREFIX}address: {spec.address} takes drivers, and no jobs; write http://{host}:8265, or where else the "
            "cluster's dashboard listens"
        )
    return spec


def open_scheduler(spec: RayClusterSpec) -> Scheduler:
    """A cluster that takes jobs, as it runs commands for a process anywhere."""
    from cluster.kinds.ray_jobs import RayJobs  # and with it an HTTP client and the stores

    return RayJobs(spec.address, spec.venv)


def _read(named: str, overrides: Sequence[str]) -> ClusterSpec:
    if re.fullmatch(r"[^/]+:\d+|https?://.*", named):
        source = "--cluster" if "@" in named else f"--cluster {named}"  # before it, a secret may be
        return read(_CLUSTERS, f"kind: ray\naddress: {json.dumps(named)}\n", source, overrides)[0]
    if named.endswith((".yaml", ".yml")):
        path = Path(named)
    else:
        known = _known()
        if named not in known:
            raise DescriptionError(
                f"--cluster {named}: is no cluster{nearest(named, known)}; write HOST:PORT of a Ray head, "
                f"http://HOST:8265 to submit there, the path of a YAML file, or one of {', '.join(sorted(known))}"
            )
        path = known[named]
    return read(_CLUSTERS, read_text(path), path.name, overrides)[0]


def _known() -> dict[str, Path]:
    """The files of the clusters that have a name; a person's own come before those that are shipped."""
    files = [path for folder in (_SHIPPED, _own_folder()) for path in folder.glob("*.yaml")]
    return {path.stem: path for path in files}


def _own_folder() -> Path:
    """``~/.config/launcher/clusters``, or where else the configuration lies.

    Source: XDG Base Directory Specification, which has a relative path ignored.
    """
    configuration = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not configuration.is_absolute():
        configuration = Path.home() / ".config"
    return configuration / _OWN


def language_of(kind: str) -> type[ClusterSpec]:
    """The dataclass that describes clusters of a kind.

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
