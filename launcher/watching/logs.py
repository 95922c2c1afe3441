"""Reads the logs of a run: those of its workers from its directory, and that of its job from its cluster."""

import codecs
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from cluster.errors import ClusterError
from cluster.run.run_directory import RunDirectory
from launcher.config.cluster_addresses import give_cluster
from launcher.watching.patience import read_patiently
from launcher.watching.status import LONG_SILENCE_S, read_status
from launcher.watching.submitted_job import SubmittedJob

_INTERVAL_S = 2.0
_QUEUE_INTERVAL_S = 10.0
"""The same for a job in a queue: its site may count, and limit, what it is asked."""
_LOGS_INTERVAL_S = 20.0
"""How often workers' logs are read, since agents write them as often; and a job's log once it is long."""
_LONG_LOG_BYTES = 10**6
"""From this size on, a job's log is read less often: a cluster gives it only whole."""
_TAIL_BYTES = 64 * 2**10
"""How much of the end of a log is kept, to find the place in a later read that lacks the beginning."""
_PATIENCE_S = 600.0
"""How long the state of the job may stay unknown while no driver has the run."""
_ALIVE = ("running", "submitted", "requeued")

T = TypeVar("T")


def log_pieces(
    run: RunDirectory,
    worker: int | None,
    *,
    follow: bool,
    warn: Callable[[str], None],
    job: SubmittedJob | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (log name, text) of every log of a run and, with ``follow``, of every addition until the run has ended.

    Args:
        run: The run.
        worker: Yield only the log of this worker.
        follow: Go on until the run and its job have ended; meanwhile, retry a store that does not answer.
        warn: Receives warnings: the store or the cluster does not answer, or what a run that has not begun waits for.
        job: The run's job on a cluster, whose log, the driver's stdout and stderr, comes last. None: no cluster is
            asked.

    Raises:
        StorageError: The store does not answer; with ``follow``, for longer than ``read_patiently`` retries.
        ClusterError: The cluster does not give the log of the job; the other logs have been yielded. With ``follow``,
            the cluster is asked again while the run goes on, but at most ten minutes if no driver has the run.
    """

    def read(call: Callable[[], T]) -> T:
        return read_patiently(call, warn, time.monotonic, time.sleep) if follow else call()

    shown: defaultdict[str, _ShownLog] = defaultdict(_ShownLog)
    interval_s = _INTERVAL_S if job is None or job.scheduler.starts_at_once else _QUEUE_INTERVAL_S
    waiting, workers_read_at, job_due_at = _WaitReporter(run, warn), -math.inf, -math.inf
    while True:
        is_last = True
        if follow:
            document = read(lambda: _document(run, job))
            is_last = not _may_grow(document)
            if not is_last:
                waiting.report(document)
        if is_last or time.monotonic() - workers_read_at >= _LOGS_INTERVAL_S:
            workers_read_at = time.monotonic()
            for name in read(lambda: run.log_names(rank=worker)):
                yield from _addition(shown, name, read(partial(run.read_log, name)), is_last=is_last)
        if job is not None and worker is None and (is_last or time.monotonic() >= job_due_at):
            try:
                log = job.log().encode(errors="replace")
            except ClusterError:
                if is_last:
                    raise
            else:
                if len(log) > _LONG_LOG_BYTES:
                    job_due_at = time.monotonic() + _LOGS_INTERVAL_S
                yield from _addition(shown, f"job {job.id}", log, is_last=is_last)
        if is_last:
            return
        time.sleep(interval_s)


def _document(run: RunDirectory, job: SubmittedJob | None) -> dict[str, Any]:
    return read_status(run, LONG_SILENCE_S) if job is None else job.document(LONG_SILENCE_S)


def _may_grow(document: Mapping[str, Any]) -> bool:
    """Return whether logs may still grow; the job writes the end of its log after the run has ended."""
    return document["status"] in _ALIVE or document.get("job_status") in ("pending", "running")


class _WaitReporter:
    """Warns why no log comes; gives up on a run that no driver has if the state of its job stays unknown.

    Args:
        run: The run that is followed.
        warn: Receives the reason.
    """

    def __init__(self, run: RunDirectory, warn: Callable[[str], None]) -> None:
        self._run, self._warn = run, warn
        self._last_reason = ""
        self._unknown_since: float | None = None

    def report(self, document: Mapping[str, Any]) -> None:
        """Warn if the reason has changed.

        Args:
            document: The status of the run, with the state of its job if a cluster was asked.

        Raises:
            ClusterError: No driver has the run, and the state of its job was unknown for ten minutes.
        """
        reason = self._reason(document)
        if reason and reason != self._last_reason:
            self._warn(reason)
        self._last_reason = reason
        if document.get("job_status", "") is not None:
            self._unknown_since = None
            return
        if self._unknown_since is None:
            self._unknown_since = time.monotonic()
        if document["status"] != "running" and time.monotonic() - self._unknown_since > _PATIENCE_S:
            raise ClusterError(
                f"{self._run.url}: is {document['status']}, and its cluster has told nothing of job {document['job']} "
                f"for {_PATIENCE_S / 60:.0f} minutes: {document['job_message']}"
            )

    def _reason(self, document: Mapping[str, Any]) -> str:
        """Return why no log comes; empty if logs come or will soon."""
        if document.get("job_status", "") is None:
            return f"{document['job_message']}; asking again"
        if document["status"] not in ("submitted", "requeued"):
            return ""
        if "job_status" not in document:
            has_begun = document["status"] == "requeued"
            what = "waits for its scheduler to start it again" if has_begun else "has not begun"
            if "job" not in document:  # its batch script was not submitted by the launcher
                return f"{self._run.url}: {what}"
            where = f"job {document['job']} on {document['cluster']}: {give_cluster(document['cluster'])}"
            return f"{self._run.url}: {what}; it waits as {where} to follow the job"
        if document["job_status"] != "pending":
            return ""
        message = f": {document['job_message']}" if document["job_message"] else ""
        return f"{self._run.url}: job {document['job']} is pending{message}"


class _ShownLog:
    """How much of a log has been shown."""

    def __init__(self) -> None:
        self._bytes = 0
        """The length of the log in the last read."""
        self._tail = b""
        """The end of the log in the last read."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a piece may end within a character

    def addition(self, log: bytes, *, is_last: bool) -> str:
        """Return what was added to a log since the last read.

        Args:
            log: The whole log, or only its end if it is long. If the tail of the last read is not in it, all of it
                counts as new.
            is_last: The log does not grow any more.
        """
        shown = self._bytes
        if log[max(0, shown - len(self._tail)) : shown] != self._tail:
            found = log.rfind(self._tail)
            shown = 0 if found < 0 else found + len(self._tail)
        new = log[shown:]
        self._bytes, self._tail = len(log), log[-_TAIL_BYTES:]
        return self._decoder.decode(new, is_last)


def _addition(shown: defaultdict[str, _ShownLog], name: str, log: bytes, *, is_last: bool) -> Iterator[tuple[str, str]]:
    """Yield what was added to a log since it was shown last, if anything was."""
    if text := shown[name].addition(log, is_last=is_last):
        yield name, text
