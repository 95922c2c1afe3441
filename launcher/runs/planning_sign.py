"""Signs of life of a submitted job that plans: it writes what it is doing until the run's own status takes over."""

import contextlib
import math
from collections.abc import Callable, Iterator

from cluster.run.lease import STATUS_INTERVAL_S
from cluster.run.run_directory import RunDirectory
from launcher.driver.background_writer import BackgroundWriter


@contextlib.contextmanager
def planning_sign(
    run: RunDirectory, submission_id: str | None, tell: Callable[[str], None]
) -> Iterator[Callable[[str], None]]:
    """Write a sign of life for a submission every few seconds inside the block, and delete it at the end.

    If the block raises, the sign stays, and the submission records the error.

    Args:
        run: The run.
        submission_id: The submission that this process has yet to take; None: it was started for none, and writes no
            sign.
        tell: Shows on this host what the job is doing.

    Yields:
        A function that shows and writes what the job is doing.
    """
    if submission_id is None:
        yield tell
        return
    doing = "planning"

    def write() -> Iterator[None]:
        run.submissions.write_sign(submission_id, doing)
        yield

    def tell_both(what: str) -> None:
        nonlocal doing
        tell(what)
        doing = what
        signs.ask()

    with BackgroundWriter(write, STATUS_INTERVAL_S, patience_s=math.inf) as signs:  # a job without a sign goes on
        yield tell_both
    signs.check()
    run.submissions.delete_sign(submission_id)  # the run's own status follows
