"""Finds the run, the cluster and the job that the arguments of a verb name."""

from typing import TYPE_CHECKING

from cluster.errors import DescriptionError

if TYPE_CHECKING:
    from cluster.kinds.cluster import Cluster
    from cluster.run.run_directory import RunDirectory
    from cluster.scheduler import Scheduler
    from cluster.spec.kinds import JobsClusterSpec
    from launcher.watching.submitted_job import SubmittedJob


def find_run(url: str) -> "RunDirectory":
    """Return the directory of a run.

    Raises:
        DescriptionError: There is no run at this URL.
    """
    from cluster.run.run_directory import RunDirectory

    run_directory = RunDirectory(url)
    if not run_directory.is_known():
        raise DescriptionError(
            f"{run_directory.url} is no run: it has no job.yaml; launcher list shows the runs of a store"
        )
    return run_directory


def find_cluster(cluster_name: str | None, overrides: tuple[str, ...]) -> tuple["Cluster", list[str]]:
    """Return the cluster for a driver on one of its hosts, and the overrides of the job."""
    from launcher.config.clusters import load_cluster, open_cluster

    spec, job_overrides = load_cluster(cluster_name, overrides)
    return open_cluster(spec), job_overrides


def find_scheduler(
    cluster_name: str | None, overrides: tuple[str, ...] = ()
) -> tuple["Scheduler", "JobsClusterSpec", list[str]]:
    """Return the scheduler of a cluster that takes jobs, the cluster's spec, and the overrides of the job."""
    from launcher.config.clusters import load_jobs_cluster, open_scheduler

    cluster_spec, job_overrides = load_jobs_cluster(cluster_name, overrides)
    return open_scheduler(cluster_spec), cluster_spec, job_overrides


def find_job_of_run(run_directory: "RunDirectory", cluster_name: str | None) -> "SubmittedJob | None":
    """Return the job of a run on the named cluster; None if no cluster is named."""
    if cluster_name is None:
        return None
    from launcher.watching.submitted_job import submitted_job

    scheduler, cluster_spec, _ = find_scheduler(cluster_name)
    return submitted_job(run_directory, scheduler, cluster_spec.address)
