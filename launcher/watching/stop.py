"""Stopping a run from anywhere: through its directory, and before it has begun through the job that is to begin it."""

import time
from typing import Any

from cluster.errors import ClusterError
from cluster.run.run_directory import RunDirectory
from launcher.watching.status import Lookout, read_status
from launcher.watching.submitted_job import SubmittedJob

_INTERVAL_S = 0.5


def stop_run(run: RunDirectory, timeout_s: float, job: SubmittedJob | None = None) -> dict[str, Any]:
    """Asks a run to save and stop, and waits until it has; one that is not running is left as it is.

    Args:
        run: Which.
        timeout_s: How long to wait, in seconds.
        job: Its job on a cluster, which is stopped if the run has not begun; none: no cluster is asked.

    Returns:
        The ``--json`` document at the end.

    Raises:
        ClusterError: It is still running after ``timeout_s`` seconds; or it has not begun, so that nobody would read
            the request, and the cluster that was named is none, or another one, or does not stop the job.
    """
    deadline = time.monotonic() + timeout_s
    lookout = Lookout(lambda silence_s: read_status(run, silence_s), time.monotonic)
    status = lookout.look()
    if job is not None and job.is_due():  # also of a run that another driver has begun
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
    if status["status"] == "submitted":  # for another cluster, or again
        raise ClusterError(
            f"{run.url}: has not begun yet; to stop its job, {status['job']}, give --cluster the cluster that it was "
            f"submitted to, {status['cluster']}"
        )
    return status
