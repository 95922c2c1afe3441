"""Hand a run over to a cluster whose jobs start at once: begin a job on standby, then write its submission.

The job is started while the run is still checked, see ``launcher.submission.standby``, so that it is ready when the
checks are done.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from cluster.capacity import Places
from cluster.errors import ClusterError
from cluster.inspection.nodes import NEEDS_VARIABLE, needs_to_text
from cluster.run.submissions import Submission, make_id
from cluster.scheduler import ENDED, JobRequest, Needs
from launcher.submission.handover import HandOver, OvertakenError, ask_twice, is_for
from launcher.submission.job_command import make_command, numbered
from launcher.submission.standby import HAND_OVER_S

STANDBY = "standby"
"""Key in the metadata of a job that was started before its submission was written."""
_LOOK_INTERVAL_S = 0.2
_TAKE_UP_S = 15.0
"""How long a job may take to write that it has found its submission, which is as long as it may take to end."""


@dataclass(kw_only=True, slots=True)
class Standby:
    """A job on standby, see ``launcher.submission.standby``.

    Attributes:
        number: The number of earlier jobs of the run.
        job_id: The name of the job on the cluster.
        submission_id: The submission that it waits for.
        asked_at: When the cluster was asked to start it, by ``time.monotonic``.
        is_used: Whether its submission is written, so that the job goes on without this process.
    """

    number: int
    job_id: str
    submission_id: str
    asked_at: float
    is_used: bool = False

    @property
    def is_in_time(self) -> bool:
        """Whether the job still waits if its submission is written now."""
        return time.monotonic() - self.asked_at < HAND_OVER_S


class StandbyHandOver(HandOver):
    """Hands a run over to a job on standby; if that is gone, begins another one."""

    @contextmanager
    def standby(self, job_id: str, number: int, needs: Needs) -> Iterator[Standby]:
        """Start a job on standby, with ``number`` or the next free number.

        At the end of the block the job is stopped unless it is used. If the cluster does not answer then, the job ends
        by itself once its wait is over.

        Args:
            job_id: The name of a job of the run, with any number.
            number: The number of earlier jobs of the run.
            needs: What the job inspects the nodes for.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile.
            ClusterError: The cluster does not start a job.
        """
        while True:
            standby = Standby(
                number=number,
                job_id=numbered(job_id, number),
                submission_id=make_id(number, time.time()),
                asked_at=time.monotonic(),
            )
            self._tell(f"beginning {standby.job_id}")
            try:
                job = self._begin(self._standby_request(standby, needs))
                if is_for(standby.submission_id, job):
                    yield standby
                    return
            finally:
                if not standby.is_used:
                    self._stop(standby)
            if self._is_of_somebody(job):
                raise OvertakenError(job.id)
            number += 1

    def submit(self, submission: Submission, standby: Standby, places: Places) -> str:
        """Write a submission for the job on standby, or start another job for it if that one is gone.

        Of two processes that do so at the same time, one sees the other's submission and withdraws its own. If neither
        sees the other's, both jobs start, and the one that does not get the lease ends.

        Args:
            submission: The submission, with the number and the name of the job on standby.
            standby: That job.
            places: What the workers reserve.

        Returns:
            The name of the job.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile, and this submission is withdrawn.
            Interrupted, LauncherError: A job may have started, if the message says so.
        """
        newest = self._check_overtaken()
        if standby.is_in_time and newest <= standby.number:
            standby.is_used = True
            try:
                with self.may_run(standby.job_id):
                    self._run.submissions.write(submission, standby.submission_id)  # changes nothing else of the run
                    self._check_overtaken(below=standby.number)
                    if self._is_taken_up(standby):
                        return standby.job_id
            except OvertakenError:
                standby.is_used = False
                self._run.submissions.withdraw(standby.submission_id)
                raise
            self._run.submissions.withdraw(standby.submission_id)
        return self.begin(replace(submission, number=standby.number + 1), places)

    def _is_taken_up(self, standby: Standby) -> bool:
        """Return whether the job takes the submission that was written for it: False if it ended before it saw it.

        The job answers in the run directory. If it is alive and has not answered in time, its store is slow, and it
        counts as taken up.
        """
        deadline = time.monotonic() + _TAKE_UP_S
        while True:
            # Before the store, so that the answer of a job that has ended is seen.
            job = ask_twice(lambda: self._scheduler.read(standby.job_id))
            if self._run.submissions.is_answered(standby.submission_id):
                return True
            if job is None or job.status in ENDED:
                return False
            if time.monotonic() > deadline:
                return True
            time.sleep(_LOOK_INTERVAL_S)

    def _standby_request(self, standby: Standby, needs: Needs) -> JobRequest:
        """Return the request for a job that inspects the nodes and waits for its submission to be written."""
        request = self._request(standby.job_id, standby.submission_id, None)
        return replace(
            request,
            command=make_command(self._run.url, standby.submission_id, self._place, stands_by=True),
            environment={NEEDS_VARIABLE: needs_to_text(needs)},
            metadata={**request.metadata, STANDBY: "1"},
        )

    def _stop(self, standby: Standby) -> None:
        """Stop a job on standby, unless the job of that name is somebody else's."""
        with suppress(ClusterError):
            job = self._scheduler.read(standby.job_id)
            if job is not None and job.status not in ENDED and is_for(standby.submission_id, job):
                self._scheduler.stop(standby.job_id)
