"""Hand a run over to a cluster: start a job on standby, then write the submission that this job takes.

The cluster starts one job per name. A job's name has the number of its submission, and the job takes only the
submission that it was started for.
"""

import math
import shlex
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.errors import ClusterError, Interrupted, LauncherError
from cluster.inspection.nodes import NEEDS_VARIABLE, needs_to_text
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, UnreadableSubmissionError, make_id
from cluster.scheduler import ENDED, Job, JobRequest, Needs, Scheduler
from cluster.spec.kinds import JobsClusterSpec
from launcher.submission.job_command import make_command, numbered, submitter
from launcher.submission.standby import HAND_OVER_S

T = TypeVar("T")

STANDBY = "standby"
"""Key in the metadata of a job that was started before its submission was written."""
_ASK_AGAIN_S = 2.0
_LOOK_INTERVAL_S = 0.2
_TAKE_UP_S = 15.0
"""How long a job may take to write that it has found its submission, which is as long as it may take to end."""


class NothingBegunError(ClusterError):
    """No job has started for a submission, and the submission is withdrawn."""


class OvertakenError(NothingBegunError):
    """Somebody else has submitted the same run at the same time, and won.

    Attributes:
        job_id: The name of their job, which is alive.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the run was submitted by somebody else at the same time, as job {job_id}")
        self.job_id = job_id


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


class HandOver:
    """Hands a run over to a cluster.

    Args:
        run: The run, which may not exist yet.
        known: The ids of the run's submissions when this process first looked; any other is somebody else's.
        scheduler: The Jobs API of the cluster.
        place: The description of the cluster.
        tell: Shows what is being done.
    """

    def __init__(
        self,
        run: RunDirectory,
        known: Collection[str],
        scheduler: Scheduler,
        place: JobsClusterSpec,
        tell: Callable[[str], None],
    ) -> None:
        self._run, self._known = run, known
        self._scheduler, self._place, self._tell = scheduler, place, tell

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
                job = self._begin(standby.job_id, standby.submission_id, needs)
                if _is_for(standby.submission_id, job):
                    yield standby
                    return
            finally:
                if not standby.is_used:
                    self._stop(standby)
            if job.status not in ENDED and any(_is_for(report.id, job) for report in self._run.submissions.reports()):
                raise OvertakenError(job.id)
            number += 1

    def submit(self, submission: Submission, standby: Standby) -> str:
        """Write a submission for the job on standby, or start another job for it if that one is gone.

        Of two processes that do so at the same time, one sees the other's submission and withdraws its own. If neither
        sees the other's, both jobs start, and the one that does not get the lease ends.

        Args:
            submission: The submission, with the number and the name of the job on standby.
            standby: That job.

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
        number = max(standby.number, newest)
        while True:
            number += 1
            job_id = numbered(standby.job_id, number)
            submission = replace(submission, number=number, job=job_id)
            submission_id = self._run.submissions.write(submission)
            self._tell(f"beginning {job_id}")
            with self.may_run(job_id):
                job = self._begin_or_withdraw(job_id, submission_id)
            if _is_for(submission_id, job):
                return job_id
            self._run.submissions.withdraw(submission_id)

    @contextmanager
    def may_run(self, job_id: str) -> Iterator[None]:
        """Add to errors raised in the block that a job may have started.

        Args:
            job_id: The name of the job.

        Raises:
            Interrupted: In place of KeyboardInterrupt.
            LauncherError: As raised in the block, with the job added unless it is a ``NothingBegunError``.
        """
        try:
            yield
        except KeyboardInterrupt as interrupt:
            url, cluster = shlex.quote(self._run.url), shlex.quote(self._place.address)
            error = Interrupted(
                f"interrupted while job {job_id} of {self._run.url} was begun, which may run now; stop it with "
                f"`launcher stop {url} --cluster {cluster}`"
            )
            error.document = {"job": job_id}
            raise error from interrupt
        except NothingBegunError:
            raise
        except LauncherError as error:
            error.args = (f"{error}; job {job_id} may have begun, submit the run again to see",)
            error.document = {"job": job_id}
            raise

    def _check_overtaken(self, below: float = math.inf) -> int:
        """Check that nobody else has submitted the run to this cluster meanwhile, with a job that is alive.

        Args:
            below: Ignore submissions with this number or a higher one.

        Returns:
            The highest number of the submissions of the run; -1: it has none.

        Raises:
            OvertakenError: Somebody else has.
        """
        reports = self._run.submissions.reports()
        for report in reports:
            if report.id in self._known or report.number >= below:
                continue
            with suppress(UnreadableSubmissionError):  # it was just withdrawn, or its writer was killed
                submission = self._run.submissions.read(report.id)
                job = self._scheduler.read(submission.job) if submission.cluster == self._place.address else None
                if job is not None and job.status not in ENDED and _is_for(report.id, job):
                    raise OvertakenError(job.id)
        return reports[-1].number if reports else -1

    def _is_taken_up(self, standby: Standby) -> bool:
        """Return whether the job takes the submission that was written for it: False if it ended before it saw it.

        The job answers in the run directory. If it is alive and has not answered in time, its store is slow, and it
        counts as taken up.
        """
        deadline = time.monotonic() + _TAKE_UP_S
        while True:
            # Before the store, so that the answer of a job that has ended is seen.
            job = _ask_twice(lambda: self._scheduler.read(standby.job_id))
            if self._run.submissions.is_answered(standby.submission_id):
                return True
            if job is None or job.status in ENDED:
                return False
            if time.monotonic() > deadline:
                return True
            time.sleep(_LOOK_INTERVAL_S)

    def _begin_or_withdraw(self, job_id: str, submission_id: str) -> Job:
        """Do the same as ``_begin``; withdraw the submission if the cluster answers that no job has started for it."""
        try:
            return self._begin(job_id, submission_id)
        except ClusterError as error:
            if not self._has_no_job(job_id):
                raise
            self._run.submissions.withdraw(submission_id)  # so that a job which starts late ends
            raise NothingBegunError(f"{error}; no job has begun, submit the run again") from error

    def _has_no_job(self, job_id: str) -> bool:
        """Return whether the cluster answers that it has no such job."""
        try:
            return self._scheduler.read(job_id) is None
        except ClusterError:
            return False

    def _begin(self, job_id: str, submission_id: str, needs: Needs | None = None) -> Job:
        """Start a job for a submission unless there is one of that name; return the job of that name.

        Args:
            job_id: The name of the job.
            submission_id: The submission that it takes.
            needs: What a job on standby inspects the nodes for; None: the submission is written already, so the job
                does not stand by.
        """
        environment = {} if needs is None else {NEEDS_VARIABLE: needs_to_text(needs)}
        standby = {} if needs is None else {STANDBY: "1"}
        request = JobRequest(
            id=job_id,
            command=make_command(self._run.url, submission_id, self._place, stands_by=needs is not None),
            environment=environment,
            stop_grace_s=self._place.stop_grace_s,
            metadata={"run": self._run.url, "submission": submission_id, **submitter(), **standby},
        )
        return _ask_twice(lambda: self._scheduler.begin(request))

    def _stop(self, standby: Standby) -> None:
        """Stop a job on standby, unless the job of that name is somebody else's."""
        with suppress(ClusterError):
            job = self._scheduler.read(standby.job_id)
            if job is not None and job.status not in ENDED and _is_for(standby.submission_id, job):
                self._scheduler.stop(standby.job_id)


def _is_for(submission_id: str, job: Job) -> bool:
    return job.metadata.get("submission") == submission_id


def _ask_twice(ask: Callable[[], T]) -> T:
    """Ask the cluster, and once more after a failure: perhaps only the answer was lost.

    Raises:
        ClusterError: The cluster did not answer either time.
    """
    try:
        return ask()
    except ClusterError:
        time.sleep(_ASK_AGAIN_S)
    return ask()
