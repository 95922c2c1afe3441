"""The job of a batch scheduler that this process drives a run in, as the job's script describes it in the environment.

A batch job has a time limit and may be preempted, and its scheduler may then start the same command again. The script
sends SIGUSR1 when its job has to end early. This module knows no scheduler.
"""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.errors import DescriptionError

ENDING_EARLY: Final = signal.SIGUSR1
"""The script sends this to the driver when its job has to end early: at its time limit, or because it is preempted."""
_ENDS_AT = "LAUNCHER_JOB_ENDS_AT"
_NOTICE_S = "LAUNCHER_JOB_NOTICE_S"
_REQUEUES = "LAUNCHER_JOB_REQUEUES"
_LOST_NODES = "LAUNCHER_JOB_LOST_NODES"
_ID = "LAUNCHER_JOB_ID"
_USUAL_NOTICE_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchJob:
    """What a driver knows of its batch job; the defaults are of one that runs in none.

    Attributes:
        ends_at: The Unix time of the job's time limit; None: it has none.
        notice_s: How many seconds before ``ends_at`` the script sends SIGUSR1.
        requeues: Whether the scheduler starts the same command again if it ends with the exit code of ``Requeued``.
        lost_nodes_path: The file to which the driver appends the address of each node that the next try should do
            without, one a line; None: it tells nobody.
    """

    ends_at: float | None = None
    notice_s: float = _USUAL_NOTICE_S
    requeues: bool = False
    lost_nodes_path: Path | None = None

    def exclude(self, address: str) -> None:
        """Tell the scheduler that the next try should do without a node; ``lost_nodes_path`` is not None.

        Raises:
            OSError: The file cannot be written.
        """
        assert self.lost_nodes_path is not None
        with self.lost_nodes_path.open("a") as file:
            file.write(f"{address}\n")


class EndsEarly(KeyboardInterrupt):
    """SIGUSR1 has come, and the scheduler starts the same command again."""


def batch_job() -> BatchJob:
    """Read the batch job of this process from its environment.

    Raises:
        DescriptionError: A variable has a value that means nothing.
    """
    names = (_ENDS_AT, _NOTICE_S, _REQUEUES, _LOST_NODES)
    ends_at, notice_s, requeues, path = (os.environ.get(name, "") for name in names)
    if not re.fullmatch("[0-9]{0,15}", ends_at):
        raise DescriptionError(
            f"{_ENDS_AT}: must be a Unix time in whole seconds, got {ends_at!r}; leave it unset if the job has no limit"
        )
    if not re.fullmatch("[0-9]{0,15}", notice_s):
        raise DescriptionError(
            f"{_NOTICE_S}: must be a whole number of seconds, got {notice_s!r}; leave it unset if it is not known"
        )
    if requeues not in ("", "1"):
        raise DescriptionError(f"{_REQUEUES}: must be 1, got {requeues!r}; leave it unset if the job is not requeued")
    return BatchJob(
        ends_at=float(ends_at) if ends_at else None,
        notice_s=float(notice_s) if notice_s else _USUAL_NOTICE_S,
        requeues=requeues == "1",
        lost_nodes_path=Path(path) if path else None,
    )


def batch_job_id() -> str | None:
    """Return the id of the batch job of this process, the same in each of its tries; None: it has none, or is in none.

    A process of the job that looks alive while this one runs is of an earlier try, on a node that is cut off from the
    scheduler.
    """
    return os.environ.get(_ID) or None


def is_batch_job() -> bool:
    """Return whether the script of a batch job has started this process, or one before it."""
    return any(os.environ.get(name) for name in (_ENDS_AT, _REQUEUES, _LOST_NODES))


def interruption(number: int) -> KeyboardInterrupt:
    """Return what the handler of a signal raises before training begins, for the signal that has come."""
    return EndsEarly() if number == ENDING_EARLY and os.environ.get(_REQUEUES) == "1" else KeyboardInterrupt()
