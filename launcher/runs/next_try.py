"""The tries of one batch job: its scheduler starts the same command again, which goes on with the run or leaves it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.errors import ClusterError, Interrupted, Requeued, StorageError, one_line
from cluster.host.batch_job import EndsEarly, batch_job
from cluster.run.run_directory import RunDirectory
from launcher.watching.requeued import end, end_requeued
from launcher.watching.status import without_driver

_MOST_TRIES = 3
"""How many tries in a row may end without a newer checkpoint than the one that they began with."""
_EARLY_S = 60.0
"""A scheduler may send the signal of the time limit so much earlier than it was told to; Slurm does."""


@contextlib.contextmanager
def answered(run: RunDirectory, submission_id: str | None) -> Iterator[None]:
    """Context in which the job of a submission drives its run; see ``Submissions.answered``.

    A run that waits for its next try is marked as failed, or as stopped, if that try ends before it drives the run.
    """
    with run.submissions.answered(submission_id):
        try:
            yield
        except (EndsEarly, Requeued, SystemExit):  # it waits for another one; or the run has ended, and says how
            raise
        except BaseException as error:
            if submission_id is not None:
                with contextlib.suppress(StorageError):  # the job's output has the error anyway
                    if run.submissions.standing(submission_id) == "taken":
                        if isinstance(error, (KeyboardInterrupt, Interrupted)):
                            end_requeued(run, interrupted=True)
                        else:
                            end_requeued(run, "failed", one_line(error) or repr(error))
            raise


def bounded_tries(run: RunDirectory, submission_id: str | None, drive: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Drive a run in one try of a submission's job. Count tries that end early without a newer checkpoint.

    A try that is preempted says nothing of the run, and is not counted. Nor is one after which the store is away: how
    the try has ended matters more.

    Args:
        run: The run.
        submission_id: The submission for which this process was started; None: there is no job whose tries count.
        drive: Drives the run, and returns its ``--json`` document.

    Raises:
        ClusterError: This was the last of too many in a row, so the scheduler should not start another one.
    """
    if submission_id is None:
        return drive()
    began_at, before = time.monotonic(), _newest_step(run)
    try:
        document = drive()
    except (EndsEarly, Requeued) as error:
        node = error.node if isinstance(error, Requeued) else None
        why = "on SIGUSR1 before training began" if node is None else f"to go on without node {node}"
        with contextlib.suppress(StorageError):
            _count(run, submission_id, before, began_at, why)
        raise
    if document["status"] == "requeued":
        with contextlib.suppress(StorageError):
            _count(run, submission_id, before, began_at, document["requeued"])
    return document


@contextlib.contextmanager
def planned_elsewhere() -> Iterator[None]:
    """Context in which a try plans. If the GPU of the dry run is lost, the next try does without its node.

    Raises:
        Requeued: The GPU is lost, and the scheduler starts the same command again.
    """
    try:
        yield
    except ClusterError as error:
        job = batch_job()
        if error.cause != "gpu_lost" or error.node is None or job.lost_nodes_path is None or not job.requeues:
            raise
        try:
            job.exclude(error.node)
        except OSError:  # the next try might get the same node
            raise error from None
        requeued = Requeued(f"{error}; the next try of this job does without that node")
        requeued.node = error.node
        raise requeued from error


def stopped(run: RunDirectory) -> dict[str, Any] | None:
    """Return the document of a run that somebody stopped since the try before; None: it is to go on.

    A signal to the driver alone does not count: had it been meant for the job, there would be no next try.
    """
    status = run.read_status()
    if status is None:
        return None
    if run.is_stop_requested():
        if status["status"] in ("requeued", "running"):
            end(run, status, "stopped")
        run.clear_stop()
    elif status["status"] != "stopped" or status.get("interrupted"):
        return None
    return without_driver(run.read_status() or status) | {"interrupted": False}


def _count(run: RunDirectory, submission_id: str, before: int, began_at: float, why: str) -> None:
    submissions, newest = run.submissions, _newest_step(run)
    tries = 0
    if newest <= before:
        tries = submissions.read_tries(submission_id, before) + (not _is_preempted(why, began_at))
    is_last = tries >= _MOST_TRIES
    submissions.write_tries(submission_id, 0 if is_last else tries, newest)  # a person may start the job again
    if not is_last:
        return
    url = run.url
    advice = (
        f"look at its failures with `launcher logs {url}`"
        if why.startswith("to go on without")
        else "give the job more time, or save more often (checkpoint.every_steps)"
    )
    saved = f"the newest is of step {newest}" if newest else "there is none yet"
    raise ClusterError(
        f"{url}: {tries} tries of its batch job in a row ended without a newer checkpoint, this one {why}; {saved}; "
        f"{advice}, then submit it again"
    )


def _is_preempted(why: str, began_at: float) -> bool:
    """Return whether a signal, and not that of the time limit, has ended a try that still had most of its time."""
    job = batch_job()
    if not why.startswith("on "):
        return False
    return job.ends_at is None or job.ends_at - time.time() > max(job.notice_s + _EARLY_S, time.monotonic() - began_at)


def _newest_step(run: RunDirectory) -> int:
    return max(run.checkpoints.steps(), default=0)
