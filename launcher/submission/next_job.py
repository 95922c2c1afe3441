"""Decide whether a submission starts a job for a run, and with which number."""

import shlex
import time
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.run.run_directory import RunDirectory
from cluster.scheduler import ENDED, Job, Scheduler
from cluster.spec.kinds import JobsClusterSpec
from launcher.submission.run_snapshot import RunSnapshot
from launcher.submission.standby import WAIT_S
from launcher.submission.standby_handover import STANDBY
from launcher.watching.status import is_driven


@dataclass(frozen=True, kw_only=True, slots=True)
class NextJob:
    """The next job of a run.

    Attributes:
        number: The number of earlier jobs of the run.
        job_id: The job that is already there; None: there is none.
        why_not: Why no job is to be started; empty: one is.
    """

    number: int
    job_id: str | None = None
    why_not: str = ""


def find_next_job(run: RunDirectory, before: RunSnapshot, scheduler: Scheduler, place: JobsClusterSpec) -> NextJob:
    """Find the next job of a run: a free number, or the reason why none is to be started.

    If the run was submitted to this cluster and the cluster does not know the job, that job is started now under the
    same name. The cluster may know jobs that the run directory does not: a job on standby whose submission may still be
    refused, and jobs of a run directory that was deleted. Their numbers are not used again.

    Raises:
        ClusterError: The cluster does not answer; or a job of the run is alive there, and the run directory was
            deleted.
    """
    status, stop = before.status, f"stop it with `launcher stop {shlex.quote(run.url)}`"
    if status is not None and status["status"] == "completed":
        return NextJob(number=0, why_not=f"{run.url} is complete; nothing to do (another name starts another run)")
    newest = before.newest
    number = 0 if newest is None else newest.number
    while True:
        job = scheduler.read(before.job_id(number))
        if job is None and (newest is None or number > newest.number or before.waits_on == place.address):
            break
        if job is not None and job.status not in ENDED:
            reports = run.submissions.reports()
            if _may_stand_by(job) and job.metadata.get("submission") not in {report.id for report in reports}:
                number += 1
                continue
            if not reports:
                raise ClusterError(
                    f"{place.address}: job {job.id} is {job.status}, and {run.url} holds no submission any more; stop "
                    "that job on the cluster, and submit the run again"
                )
            why = f"{run.url} is there already, job {job.id} is {job.status}; {stop}"
            return NextJob(number=number, job_id=job.id, why_not=why)
        number += 1
    if status is not None and status["status"] == "running" and is_driven(run, dict(status)):
        why = f"{run.url}: process {status['pid']} on {status['host']} is running it; {stop}"
        return NextJob(number=number, why_not=why)
    return NextJob(number=number)


def _may_stand_by(job: Job) -> bool:
    """Return whether a job may still be on standby: it was started so, less than ``2 * WAIT_S`` ago.

    Twice the wait, because the cluster's clock may differ from this host's.
    """
    return STANDBY in job.metadata and (job.began_at is None or time.time() - job.began_at < 2 * WAIT_S)
