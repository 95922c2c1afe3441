"""A job on standby: a cluster starts it while the submitter still checks the run, so that neither waits for the other.

The job joins the cluster, has the nodes inspect themselves, prints their report, and has its host import what workers
there need. It then waits for its submission to be written, and takes up the run. Before that it changes nothing of the
run and holds no resources that workers reserve. The submitter stops a job that it does not need; a job whose submitter
died ends by itself.
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
"""How long after it asked for the job a submitter may still count on that: the rest is for slow requests."""
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
    """Prints the report of the nodes to stderr, and returns once the submission is there.

    Then the submission has a sign of life, by which the submitter knows that it is taken up.

    Args:
        run: Which will be submitted; it need not exist.
        submission_id: Of the submission for which this job was begun.
        cluster: This process has joined it.
        tell: Takes what the job is at.
        clock, sleep: Seconds that only grow, and waiting for some.

    Raises:
        DescriptionError: That is no id.
        ClusterError: The cluster is gone; or no submission came in time.
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
    """Whether the submission is there; the submitter is told so. A store that is away may come back."""
    try:
        if not run.submissions.is_there(submission_id):
            return False
        run.submissions.write_sign(submission_id, "planning")
    except StorageError:
        return False
    return True
