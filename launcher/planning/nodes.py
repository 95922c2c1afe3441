"""Checks that the nodes of a cluster have what a run needs: versions, variables, the store, and enough room."""

import importlib.metadata
from collections.abc import Callable, Collection, Mapping

from cluster.capacity import Capacity, amounts_text
from cluster.errors import ClusterError, DescriptionError, listed
from cluster.inspection.store import inspect_cluster
from cluster.kinds.cluster import Cluster
from cluster.scheduler import ClusterReport
from cluster.storage.store import Store
from cluster.versions import submission_versions
from jobs.spec import JobSpec
from launcher.config.description import Description, named_errors
from launcher.planning.placement import check_operators, decide_workers, resources_of
from launcher.planning.plan import DryRunResult, Plan, decide

_VERSIONS = ("ray", "python", "torch", "launcher")
_DIGEST_DIGITS = 12
"""Digits of a launcher digest that an error text shows."""


def own_versions() -> dict[str, str]:
    """Return the versions of this process, by the names that ``NodeReport`` uses."""
    return {**submission_versions(), "ray": importlib.metadata.version("ray")}


def inspect_nodes(
    cluster: Cluster, description: Description, variables: tuple[str, ...], warn: Callable[[str], None]
) -> None:
    """Have the nodes of a cluster that this process has joined inspect themselves, and check what they report.

    Args:
        cluster: The cluster.
        description: The job.
        variables: The names of the environment variables that every node must have.
        warn: Receives a warning about nodes that did not report.

    Raises:
        ClusterError: As ``check_nodes``; or the cluster is gone.
        StorageError: This process cannot use the store.
    """
    report = inspect_cluster(cluster, Store(description.spec.store), variables)
    check_nodes(report, description.spec, "the nodes of this job", own_versions(), warn)


def check_nodes(
    report: ClusterReport, spec: JobSpec, where: str, own: Mapping[str, str], warn: Callable[[str], None]
) -> None:
    """Check that the nodes have what a run needs.

    Args:
        report: What the nodes reported; nothing, if they inspect themselves in the job.
        spec: The job; it decides which nodes could hold a worker.
        where: The name of the cluster in errors.
        own: The versions of this process.
        warn: Receives warnings about the cluster, and about nodes that did not report.

    Raises:
        ClusterError: No node answered; or versions differ, a variable is missing, or the store cannot be used.
    """
    if report.silent and not report.nodes:
        raise ClusterError(f"{where}: no node answers: {listed(report.silent)}; look at the cluster's own logs")
    hosts = _ids_of_hosts(spec, report.capacity)
    differences = [text for name in _VERSIONS if (text := _version_difference(report, hosts, name, own[name]))]
    if differences:
        raise ClusterError(f"{where}: versions differ: {'; '.join(differences)}; install the same everywhere")
    lacking = [f"{node.address} lacks {listed(node.missing)}" for node in report.nodes if node.missing]
    if lacking:
        raise ClusterError(f"{where}: environment variables: {'; '.join(lacking)}; set them where its nodes start")
    away = [f"{node.address}: {node.store_error}" for node in report.nodes if node.store_error]
    if away:
        raise ClusterError(
            f"{where}: the store cannot be used from {listed(away, most=3)}; "
            "use one that every node reaches, such as s3://bucket/runs"
        )
    for warning in report.warnings:
        warn(warning)
    if report.silent:
        warn(f"{where}: no answer from {listed(report.silent)}; workers may be placed there all the same")


def _ids_of_hosts(spec: JobSpec, capacity: Capacity) -> set[str]:
    """Return the nodes that could hold a worker; all nodes if the job does not fit, which ``fit`` reports."""
    try:
        gpus = decide_workers(spec, capacity, gpus_here=0).gpus
    except DescriptionError:
        return {node.id for node in capacity.nodes}
    worker = resources_of(spec.workers, gpus)
    return {node.id for node in capacity.nodes if node.most(worker)}


def _version_difference(report: ClusterReport, hosts: Collection[str], name: str, own: str) -> str:
    """Return which nodes, and this machine, have which version of a package; empty if all agree.

    torch has a build per kind of device, such as ``2.13.0+cpu``. Nodes that could hold a worker must have the same
    build. A laptop, or a head that only runs the driver, may have another build of the same version.

    Args:
        report: What the nodes reported.
        hosts: The ids of the nodes that could hold a worker.
        name: The package.
        own: The version on this machine.
    """
    places: dict[str, list[str]] = {}
    builds = set()
    for node in report.nodes:
        version = node.versions.get(name, "none")
        places.setdefault(version, []).append(node.address)
        if node.id in hosts or name != "torch":
            builds.add(version)
    differ = len(builds) > 1 or len({_public(version) for version in places}) > 1
    if places and (differ or _public(own) != _public(next(iter(places)))):
        differ = True
        places.setdefault(own, []).append("this machine")
    if not differ:
        return ""
    return f"{name} " + ", ".join(f"{_short(name, version)} on {listed(there)}" for version, there in places.items())


def _public(version: str) -> str:
    return version.partition("+")[0]


def _short(name: str, version: str) -> str:
    return version[:_DIGEST_DIGITS] if name == "launcher" else version


def fit(description: Description, store: Store, tried: DryRunResult, capacity: Capacity, where: str) -> Plan:
    """Return the plan of a job on a cluster.

    Raises:
        ClusterError: The cluster can never hold the workers; the text lists its nodes.
        DescriptionError: A worker would fail on a GPU.
    """
    try:
        plan = decide(description, store, tried, capacity)
    except DescriptionError as error:
        nodes = [f"{node.address} with {amounts_text(node.resources)}" for node in capacity.nodes]
        grows = [amounts_text(capacity.limits)] if capacity.limits else list(map(str, capacity.groups))
        may_grow = f"; its autoscaler may bring it to {listed(grows)}" if grows else ""
        raise ClusterError(f"{where}: {error}. There is {listed(nodes) or 'no node'}{may_grow}") from error
    with named_errors(description.source):
        check_operators(tried.would_raise_on_gpu, plan.gpus)
    return plan
