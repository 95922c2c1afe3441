"""What a run has printed: the logs of its workers, from its directory, and that of its job, from its cluster."""

import time
from collections.abc import Iterator

from cluster.errors import ClusterError
from cluster.run_directory import RunDirectory
from launcher.status import LONG_SILENCE_S, read_status
from launcher.submitted import SubmittedJob

_INTERVAL_S = 2.0
_GOES_ON = ("running", "submitted")


def log_pieces(
    run: RunDirectory, worker: int | None, *, follow: bool, job: SubmittedJob | None = None
) -> Iterator[tuple[str, str]]:
    """(log, text) for every log of a run and, with ``follow``, for what is added to one, until the run has ended.

    Args:
        run: Whose.
        worker: Only this worker's.
        follow: Go on until the run has ended, and its job.
        job: Its job on a cluster, whose log comes last: what the driver's process wrote to stdout and stderr. None: no
            cluster is asked.

    Raises:
        ClusterError: The cluster does not give the log of the job; the others have been yielded. While the run goes on,
            it is asked again.
    """
    shown: dict[str, int] = {}
    while True:
        is_last = not follow or not _goes_on(run, job)
        for name, text in _logs(run, worker, job, is_last=is_last):
            new = text[shown.get(name, 0) :]
            shown[name] = len(text)
            if new:
                yield name, new
        if is_last:
            return
        time.sleep(_INTERVAL_S)


def _goes_on(run: RunDirectory, job: SubmittedJob | None) -> bool:
    """Whether more may come: from the run, or from its job, whose last words come after the end of the run."""
    if job is None:
        return read_status(run, LONG_SILENCE_S)["status"] in _GOES_ON
    document = job.document(LONG_SILENCE_S)
    return document["status"] in _GOES_ON or document["job_status"] in ("pending", "running")


def _logs(
    run: RunDirectory, worker: int | None, job: SubmittedJob | None, *, is_last: bool
) -> Iterator[tuple[str, str]]:
    """(log, text) of all that there is."""
    for name in run.log_names(rank=worker):
        yield name, run.read_log(name).decode(errors="replace")
    if job is None or worker is not None:
        return
    try:
        text = job.log()
    except ClusterError:
        if is_last:
            raise
        return  # out of reach for now
    yield f"job {job.id}", text
