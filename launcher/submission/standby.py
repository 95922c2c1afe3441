"""A job on standby: the cluster starts it while the submitter still checks the run, to save its start-up time.

The job joins the cluster, has the nodes inspect themselves, prints their report, and imports on its host what workers
need. It then waits for its submission to be written, and resumes the run. Until then it changes nothing of the run and
holds no resources of workers. The submitter stops a job that it does not need; a job whose submitter died ends by
itself after ``WAIT_S``.
"""

import sys
import time
from collections.abc import Callable

from cluster.errors import ClusterError, StorageError
from cluster.inspection.nodes import needs_of_environment, report_to_text
from cluster.kinds.cluster import Cluster
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import check_id
from launcher.planning.plan import import_ahead

WAIT_S = 300.0
"""How long a job waits for its submission."""
HAND_OVER_S = WAIT_S - 60.0
"""How long after asking for the job a submitter may still write its submission; the rest of the wait is for slow
requests."""
_LOOK_INTERVAL_S = 0.2


def stand_by(
    run: RunDirectory,
    submission_id: str,
    cluster: Cluster,
    tell: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Print the report of the nodes to stderr, wait for the submission, and acknowledge it with a sign of life.

    Args:
        run: The run that will be submitted; it need not exist.
        submission_id: The submission for which this job was started.
        cluster: The cluster, which this process has joined.
        tell: Shows what the job is doing.
        clock, sleep: A monotonic clock in seconds, and its ``sleep``.

    Raises:
        DescriptionError: ``submission_id`` is not an id.
        ClusterError: The cluster is gone; or the submission was not written in time.
    """
    check_id(submission_id)
    deadline, needs = clock() + WAIT_S, needs_of_environment()
    import_ahead(cluster, needs.modules)
    tell("inspecting the nodes")
    sys.stderr.write(report_to_text(cluster.inspect(needs)))
    sys.stderr.flush()
    tell(f"waiting for submission {submission_id}")
    while not _is_acknowledged(run, submission_id):
        if clock() > deadline:
            raise ClusterError(
                f"{run.url}: submission {submission_id} was not found within {WAIT_S:g} s: whoever began this job has "
                "died or given up, or the store was away; submit the run again"
            )
        sleep(_LOOK_INTERVAL_S)


def _is_acknowledged(run: RunDirectory, submission_id: str) -> bool:
    """Return whether the submission is there; if so, write the sign of life by which the submitter knows it.

    A store that does not answer counts as no submission yet: it may answer at the next look.
    """
    try:
        if not run.submissions.is_there(submission_id):
            return False
        run.submissions.write_sign(submission_id, "planning")
    except StorageError:
        return False
    return True
