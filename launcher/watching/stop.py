"""Stops a run from any machine: through its directory, or through its job on a cluster if no driver has it."""

import time
from collections.abc import Mapping
from typing import Any

from cluster.errors import ClusterError
from cluster.run.run_directory import RunDirectory
from launcher.config.cluster_addresses import give_cluster
from launcher.watching.status import Lookout, read_status
from launcher.watching.submitted_job import SubmittedJob

_INTERVAL_S = 0.5
_END_DELAY_S = 20.0
"""How long a job may take to end by itself once its driver has written how the run ended."""


def stop_run(run: RunDirectory, timeout_s: float, job: SubmittedJob | None = None) -> dict[str, Any]:
    """Ask a run to save and stop, and wait until it has; a run that is not running is left as it is.

    Args:
        run: The run.
        timeout_s: How long to wait, in seconds.
        job: The run's job on a cluster, which is stopped if it has yet to begin the run, or if its scheduler may start
            it again and no live driver has the run. None: no cluster is asked.

    Returns:
        The ``--json`` document after the stop.

    Raises:
        ClusterError: The run is still running after ``timeout_s``. Or no driver reads the request, because the run has
            not begun or waits for its scheduler to start it again, and no cluster was named, or another cluster, or the
            cluster does not stop the job.
    """
    deadline = time.monotonic() + timeout_s
    lookout = Lookout(lambda silence_s: read_status(run, silence_s), time.monotonic)
    status = lookout.look()
    if job is not None and (job.is_due() or _may_start_again(status, job, deadline)):  # even if another driver runs it
        status = job.stopped(deadline)
    if status["status"] == "running":
        run.request_stop()
    while status["status"] == "running":
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{run.url}: still running {timeout_s:.0f} s after it was asked to stop, at step {status['step']}; "
                "it stops when its step and its save are done: look at `launcher status`, or wait with --timeout"
            )
        time.sleep(_INTERVAL_S)
        status = lookout.look()
    # The driver was lost meanwhile, or the run was requeued.
    if job is not None and status["status"] != "stopped" and _may_start_again(status, job, deadline):
        status = job.stopped(deadline)
    if status["status"] == "requeued":
        how = "cancel its batch job there"
        if "cluster" in status:
            how = f"it was submitted to {status['cluster']}: {give_cluster(status['cluster'])} to stop it"
        raise ClusterError(f"{run.url}: waits for its scheduler to start it again; {how}")
    if status["status"] == "submitted":  # on another cluster, or submitted again meanwhile
        raise ClusterError(
            f"{run.url}: has not begun yet; it waits as job {status['job']} on {status['cluster']}: "
            f"{give_cluster(status['cluster'])} to stop it"
        )
    return status


def _may_start_again(status: Mapping[str, Any], job: SubmittedJob, deadline: float) -> bool:
    """Return whether a job may yet start a run that no live driver has, whatever the last one wrote or did not write.

    A driver that has written how the run ended may still draw pictures; its job has some time to end by itself.

    Raises:
        ClusterError: The cluster does not answer.
    """
    if status["status"] == "requeued":
        return True
    if status["status"] in ("running", "completed") or job.scheduler.starts_at_once:
        return False
    return job.is_alive(min(deadline, time.monotonic() + _END_DELAY_S))
