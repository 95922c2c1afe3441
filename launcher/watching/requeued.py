"""A run that the scheduler of its batch job is to start again: what its job says of it, and the end of its wait."""

from collections.abc import Callable, Mapping
from typing import Any

from cluster.run.lease import SupersededError
from cluster.run.run_directory import RunDirectory
from cluster.scheduler import STOPPED_CODES, Job
from cluster.storage.redaction import redacted
from launcher.config.cluster_addresses import give_cluster
from launcher.driver.pending_writes import event_row
from launcher.watching.status import LONG_SILENCE_S, job_of, read_without_checkpoints, without_driver


def with_next_try(document: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return the document of a run, as that of a requeued one if only its driver is lost and its job starts it again.

    A job that its scheduler requeues by itself, after the loss of a node or a preemption, has no time to say so.

    Args:
        document: As from ``read_without_checkpoints``.
        job: The job that has the run.
    """
    claimed = document.get("claimed")
    if document["status"] != "failed" or claimed is None:
        return document
    is_next_try = job.status == "running" and job.began_at is not None and job.began_at > claimed
    return as_requeued(document) if job.status == "pending" or is_next_try else document


def as_requeued(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document of a run whose driver is lost as that of a requeued one."""
    return document | {"status": "requeued", "requeued": "before its driver was lost", "error": None}


def outcome_of(job: Job) -> str:
    """Return the status of a requeued run whose job has ended and starts it no more."""
    was_told = job.status == "stopped" or job.exit_code in STOPPED_CODES
    return "stopped" if was_told else "failed"


def warn_of_next_try(
    run: RunDirectory, status: Mapping[str, Any] | None, warn: Callable[[str], None], here: str | None = None
) -> None:
    """Warn a person who goes on with a run that a job in a queue is to start the run again, too.

    Args:
        run: The run.
        status: The status that its last driver wrote; None: it never had a driver.
        warn: Receives the warning.
        here: The address of the cluster that was asked about its jobs; those do not count.
    """
    about = job_of(run) if status is not None and status["status"] == "requeued" else {}
    place = about.get("cluster")
    if place is not None and place != here:
        warn(
            f"{run.url}: job {about['job']} on {place} is to start it again, too, and ends if somebody drives it "
            f"then; launcher stop ends that job: {give_cluster(place)}"
        )


def end_requeued(
    run: RunDirectory, outcome: str = "stopped", error: str | None = None, *, interrupted: bool = False
) -> None:
    """Record that a run which its scheduler was to start again is stopped, or failed, once its job ends.

    Such a run is requeued, or its last driver is lost. A run with another status stays as it is.

    So does one that was submitted since: a later lease would make that submission count no more.

    Args:
        run: The run.
        outcome: ``stopped`` or ``failed``.
        error: Why it failed.
        interrupted: Whether a signal has stopped it.
    """
    told = read_without_checkpoints(run, LONG_SILENCE_S)["status"]
    status = run.read_status()  # right before the lease, for a driver that has come meanwhile
    if status is None or (told, status["status"]) not in (("requeued", "requeued"), ("failed", "running")):
        return
    end(run, status, outcome, error, interrupted=interrupted)


def end(
    run: RunDirectory,
    status: Mapping[str, Any],
    outcome: str,
    error: str | None = None,
    *,
    interrupted: bool = False,
) -> None:
    """Record how a run has ended that no driver drives to its end.

    This process takes the lease for that, like a driver: one that plans at this moment sees that somebody has had the
    run since it looked, and leaves it. If another driver has just taken the lease, the run is that one's.

    Args:
        run: The run.
        status: The status that its last driver wrote.
        outcome: ``stopped`` or ``failed``.
        error: Why it failed.
        interrupted: Whether a signal has stopped it.
    """
    if error is not None:  # it may be any exception's text, or a job's log, and all who read the store can read it
        error = redacted(error, {})
    try:
        run.take_lease()
        events = run.events()
        events.append(event_row(outcome, {"step": status.get("step")} | ({"error": error} if error else {})))
        events.flush()
        how = {"status": outcome, "requeued": None, "error": error, "interrupted": interrupted}
        run.write_status(without_driver(dict(status)) | how)
    except SupersededError:
        return
