"""What a run has printed: the logs of its workers, from its directory, and that of its job, from its cluster."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from cluster.errors import ClusterError
from cluster.run_directory import RunDirectory
from launcher.patience import read_patiently
from launcher.status import LONG_SILENCE_S, read_status
from launcher.submitted import SubmittedJob

_INTERVAL_S = 2.0
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
        warn: Says that it is away.
        job: Its job on a cluster, whose log comes last: what the driver's process wrote to stdout and stderr. None: no
            cluster is asked.

    Raises:
        StorageError: The store does not answer; with ``follow``, not for as long as ``read_patiently`` bears.
        ClusterError: The cluster does not give the log of the job; the others have been yielded. While the run goes on,
            it is asked again.
    """

    def read(call: Callable[[], T]) -> T:
        return read_patiently(call, warn, time.monotonic, time.sleep) if follow else call()

    shown: dict[str, int] = {}
    while True:
        is_last = not follow or not read(lambda: _goes_on(run, job))
        for name in read(lambda: run.log_names(rank=worker)):
            text = read(partial(run.read_log, name)).decode(errors="replace")
            yield from _news(shown, name, text)
        if job is not None and worker is None:
            try:
                text = job.log()
            except ClusterError:
                if is_last:
                    raise
            else:
                yield from _news(shown, f"job {job.id}", text)
        if is_last:
            return
        time.sleep(_INTERVAL_S)


def _goes_on(run: RunDirectory, job: SubmittedJob | None) -> bool:
    """Whether more may come: from the run, or from its job, whose last words come after the end of the run."""
    if job is None:
        return read_status(run, LONG_SILENCE_S)["status"] in _GOES_ON
    document = job.document(LONG_SILENCE_S)
    return document["status"] in _GOES_ON or document["job_status"] in ("pending", "running")


def _news(shown: dict[str, int], name: str, text: str) -> Iterator[tuple[str, str]]:
    """What a log has grown by since it was shown last, if it has."""
    new = text[shown.get(name, 0) :]
    shown[name] = len(text)
    if new:
        yield name, new
