"""What a run has printed: the logs of its workers, from its directory, and that of its job, from its cluster."""

import codecs
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from cluster.errors import ClusterError
from cluster.run.run_directory import RunDirectory
from launcher.watching.patience import read_patiently
from launcher.watching.status import LONG_SILENCE_S, read_status
from launcher.watching.submitted_job import SubmittedJob

_INTERVAL_S = 2.0
_LOGS_INTERVAL_S = 20.0
"""How often the logs of workers are read: agents write them as often. A long log of a job is, too."""
_LONG_LOG_BYTES = 10**6
"""A cluster gives the log of a job only whole."""
_TAIL_BYTES = 64 * 2**10
"""Of the end of a log, by which it is found again in a later one that lacks the beginning."""
_PATIENCE_S = 600.0
"""How long the cluster of a run that has not begun may tell nothing of its job."""
_GOES_ON = ("running", "submitted")

T = TypeVar("T")


def log_pieces(
    run: RunDirectory,
    worker: int | None,
    *,
    follow: bool,
    warn: Callable[[str], None],
    job: SubmittedJob | None = None,
) -> Iterator[tuple[str, str]]:
    """(log, text) for every log of a run and, with ``follow``, for what is added to one, until the run has ended.

    Args:
        run: Whose.
        worker: Only this worker's.
        follow: Go on until the run has ended, and its job; a store that is away meanwhile is waited for, a while.
        warn: Says that it is away, or that the cluster is, and what a run that has not begun waits for.
        job: Its job on a cluster, whose log comes last: what the driver's process wrote to stdout and stderr. None: no
            cluster is asked.

    Raises:
        StorageError: The store does not answer; with ``follow``, not for as long as ``read_patiently`` bears.
        ClusterError: The cluster does not give the log of the job; the others have been yielded. While the run goes on,
            it is asked again, but for ten minutes at most if the run has not begun.
    """

    def read(call: Callable[[], T]) -> T:
        return read_patiently(call, warn, time.monotonic, time.sleep) if follow else call()

    shown: defaultdict[str, _Shown] = defaultdict(_Shown)
    waiting, workers_read_at, job_due_at = _Waiting(run, warn), -math.inf, -math.inf
    while True:
        is_last = True
        if follow:
            document = read(lambda: _document(run, job))
            is_last = not _goes_on(document)
            if not is_last:
                waiting.look_at(document)
        if is_last or time.monotonic() - workers_read_at >= _LOGS_INTERVAL_S:
            workers_read_at = time.monotonic()
            for name in read(lambda: run.log_names(rank=worker)):
                yield from _news(shown, name, read(partial(run.read_log, name)), is_last=is_last)
        if job is not None and worker is None and (is_last or time.monotonic() >= job_due_at):
            try:
                log = job.log().encode(errors="replace")
            except ClusterError:
                if is_last:
                    raise
            else:
                if len(log) > _LONG_LOG_BYTES:
                    job_due_at = time.monotonic() + _LOGS_INTERVAL_S
                yield from _news(shown, f"job {job.id}", log, is_last=is_last)
        if is_last:
            return
        time.sleep(_INTERVAL_S)


def _document(run: RunDirectory, job: SubmittedJob | None) -> dict[str, Any]:
    return read_status(run, LONG_SILENCE_S) if job is None else job.document(LONG_SILENCE_S)


def _goes_on(document: Mapping[str, Any]) -> bool:
    """Whether more may come: from the run, or from its job, whose last words come after the end of the run."""
    return document["status"] in _GOES_ON or document.get("job_status") in ("pending", "running")


class _Waiting:
    """Says why nothing comes, and ends the wait for a run that has not begun, and of whose job nothing is known.

    Args:
        run: Which is followed.
        warn: Is told why.
    """

    def __init__(self, run: RunDirectory, warn: Callable[[str], None]) -> None:
        self._run, self._warn = run, warn
        self._said = ""
        self._unknown_since: float | None = None

    def look_at(self, document: Mapping[str, Any]) -> None:
        """Says what has changed, if something has.

        Args:
            document: How the run stands, with what its cluster says of the job if that was asked.

        Raises:
            ClusterError: The run has not begun, and the cluster has told nothing of its job for a long time.
        """
        text = self._why(document)
        if text and text != self._said:
            self._warn(text)
        self._said = text
        if document.get("job_status", "") is not None:
            self._unknown_since = None
            return
        if self._unknown_since is None:
            self._unknown_since = time.monotonic()
        if document["status"] == "submitted" and time.monotonic() - self._unknown_since > _PATIENCE_S:
            raise ClusterError(
                f"{self._run.url}: has not begun, and its cluster has told nothing of job {document['job']} for "
                f"{_PATIENCE_S / 60:.0f} minutes: {document['job_message']}"
            )

    def _why(self, document: Mapping[str, Any]) -> str:
        """Why nothing comes; empty: something does, or soon will."""
        if document.get("job_status", "") is None:
            return f"{document['job_message']}; asking again"
        if document["status"] != "submitted":
            return ""
        if "job_status" not in document:
            where = f"job {document['job']} on {document['cluster']}"
            return f"{self._run.url}: has not begun; it waits as {where}: give --cluster that to follow the job"
        if document["job_status"] != "pending":
            return ""
        message = f": {document['job_message']}" if document["job_message"] else ""
        return f"{self._run.url}: job {document['job']} is pending{message}"


class _Shown:
    """How much of a log has been shown."""

    def __init__(self) -> None:
        self._bytes = 0
        """Of the log as it was read last."""
        self._tail = b""
        """The end of that."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a piece may end within a character

    def news(self, log: bytes, *, is_last: bool) -> str:
        """What a log has grown by.

        Args:
            log: All of it, or the end of it if it is long; all of that counts as new if the end of what was shown is
                not in it.
            is_last: Nothing is added to it any more.
        """
        shown = self._bytes
        if log[max(0, shown - len(self._tail)) : shown] != self._tail:
            found = log.rfind(self._tail)
            shown = 0 if found < 0 else found + len(self._tail)
        new = log[shown:]
        self._bytes, self._tail = len(log), log[-_TAIL_BYTES:]
        return self._decoder.decode(new, is_last)


def _news(shown: defaultdict[str, _Shown], name: str, log: bytes, *, is_last: bool) -> Iterator[tuple[str, str]]:
    """What a log has grown by since it was shown last, if it has."""
    if new := shown[name].news(log, is_last=is_last):
        yield name, new
