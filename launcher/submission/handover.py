"""Hand a run over to a cluster: write its submission, and start the job that takes it.

The cluster starts one job per name. A job's name has the number of its submission, and the job takes only the
submission that it was started for. A cluster whose jobs start at once begins the job first, see
``launcher.submission.standby_handover``; on any other, the submission waits for its job in the run directory.
"""

import math
import shlex
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from cluster.capacity import Places
from cluster.errors import ClusterError, Interrupted, LauncherError, StorageError
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, UnreadableSubmissionError, make_id
from cluster.scheduler import ENDED, Job, JobRequest, Scheduler
from cluster.spec.kinds import JobsClusterSpec
from launcher.submission.job_command import make_command, numbered, submitter

T = TypeVar("T")

_ASK_AGAIN_S = 2.0


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


class HandOver:
    """Hands a run over to a cluster.

    Args:
        run: The run, which may not exist yet.
        known: The ids of the run's submissions when this process first looked; any other is somebody else's.
        scheduler: The cluster.
        place: The description of the cluster.
        variables: The names of environment variables that every node must have.
        tell: Shows what is being done.
    """

    def __init__(
        self,
        run: RunDirectory,
        known: Collection[str],
        scheduler: Scheduler,
        place: JobsClusterSpec,
        variables: tuple[str, ...],
        tell: Callable[[str], None],
    ) -> None:
        self._run, self._known = run, known
        self._scheduler, self._place, self._variables, self._tell = scheduler, place, variables, tell

    def begin(self, submission: Submission, places: Places) -> str:
        """Write a submission, and start a job for it, with its number or the next free one.

        Of two processes that do so at the same time, the one whose job the cluster starts wins, and the other withdraws
        its submission. If both jobs start, the one that does not get the lease ends.

        Args:
            submission: The submission, with the name of the job for its number.
            places: What the workers reserve.

        Returns:
            The name of the job.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile, and this submission is withdrawn.
            NothingBegunError: The cluster refuses the job, and this submission is withdrawn.
            Interrupted, LauncherError: A job may have started, if the message says so.
        """
        number = self._free_number(submission)
        while True:
            job_id = numbered(submission.job, number)
            self._tell(f"beginning {job_id}")
            with self._nothing_left(submission_id := make_id(number, submission.time)):
                self._run.submissions.write(replace(submission, number=number, job=job_id), submission_id)
            with self.may_run(job_id):
                job = self._begin_or_withdraw(self._request(job_id, submission_id, places), submission_id)
                if is_for(submission_id, job):
                    self._withdraw_replaced(number)
                    return job_id
            self._run.submissions.withdraw(submission_id)
            if self._is_of_somebody(job):
                raise OvertakenError(job.id)
            number += 1

    def offer(self, submission: Submission, places: Places) -> JobRequest:
        """Write a submission, and return the request for its job, which another starts: a person, or an array.

        Args:
            submission: The submission, with the name of the job for its number.
            places: What the workers reserve.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile, and nothing is left of this submission.
        """
        number = self._free_number(submission)
        job_id, submission_id = numbered(submission.job, number), make_id(number, submission.time)
        with self._nothing_left(submission_id):
            self._run.submissions.write(replace(submission, number=number, job=job_id), submission_id)
            job = self._scheduler.read(job_id)  # perhaps its script, rendered before, was handed over meanwhile
            if job is not None and job.status not in ENDED:
                raise OvertakenError(job.id)
            self._withdraw_replaced(number)
        return self._request(job_id, submission_id, places)

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
            error = Interrupted(
                f"interrupted while job {job_id} of {self._run.url} was begun, which may run now; stop it with "
                f"`launcher stop {shlex.quote(self._run.url)}` and the same --cluster"
            )
            error.document = {"job": job_id}
            raise error from interrupt
        except NothingBegunError:
            raise
        except LauncherError as error:
            error.args = (f"{error}; job {job_id} may have begun, submit the run again to see",)
            error.document = {"job": job_id}
            raise

    @contextmanager
    def _nothing_left(self, submission_id: str) -> Iterator[None]:
        """Withdraw a submission, for which no job is begun yet, if the block that writes it fails."""
        try:
            yield
        except BaseException:  # also Ctrl-C
            with suppress(StorageError):
                self._run.submissions.withdraw(submission_id)
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
                if job is not None and job.status not in ENDED and is_for(report.id, job):
                    raise OvertakenError(job.id)
        return reports[-1].number if reports else -1

    def _free_number(self, submission: Submission) -> int:
        """Return the number of a submission, or a higher one if somebody else has submitted the run meanwhile.

        Raises:
            OvertakenError: Their job is alive.
        """
        newest = self._check_overtaken()
        return submission.number if newest <= submission.number else newest + 1

    def _withdraw_replaced(self, number: int) -> None:
        """Withdraw the submissions of the same number that wait here for a job that this cluster does not know.

        Their scripts were rendered and not handed over, or the cluster has lost their jobs. Such a job ends if it
        starts after all.
        """
        for report in self._run.submissions.reports():
            if report.number != number or report.state != "waiting" or report.id not in self._known:
                continue
            with suppress(UnreadableSubmissionError):
                if self._run.submissions.read(report.id).cluster == self._place.address:
                    self._run.submissions.withdraw(report.id)

    def _is_of_somebody(self, job: Job) -> bool:
        """Return whether a job is alive and its submission is written: on standby, it may still be refused."""
        return job.status not in ENDED and any(is_for(report.id, job) for report in self._run.submissions.reports())

    def _begin_or_withdraw(self, request: JobRequest, submission_id: str) -> Job:
        """Start a job; withdraw its submission if the cluster answers that no job has started for it."""
        try:
            return self._begin(request)
        except ClusterError as error:
            if not self._has_no_job(request.id, submission_id):
                raise
            self._run.submissions.withdraw(submission_id)  # so that a job which starts late ends
            raise NothingBegunError(f"{error}; no job has begun: correct that, or submit the run again") from error

    def _has_no_job(self, job_id: str, submission_id: str) -> bool:
        """Return whether the cluster answers that it has no job for a submission, or only one that is over."""
        try:
            job = self._scheduler.read(job_id)
        except ClusterError:
            return False
        return job is None or (job.status in ENDED and not is_for(submission_id, job))

    def _begin(self, request: JobRequest) -> Job:
        """Start a job unless there is one of that name; return the job of that name."""
        return ask_twice(lambda: self._scheduler.begin(request))

    def _request(self, job_id: str, submission_id: str, places: Places | None) -> JobRequest:
        """Return the request for the job of a submission that is written.

        On a cluster whose jobs do not start at once, the job inspects its own nodes.
        """
        inspects = None if self._scheduler.starts_at_once else self._variables
        return JobRequest(
            id=job_id,
            command=make_command(self._run.url, submission_id, self._place, inspects=inspects),
            environment={},
            stop_grace_s=self._place.stop_grace_s,
            metadata={"run": self._run.url, "submission": submission_id, **submitter()},
            places=places,
            variables=self._variables,
        )


def is_for(submission_id: str, job: Job) -> bool:
    """Return whether a job was started for a submission."""
    return job.metadata.get("submission") == submission_id


def ask_twice(ask: Callable[[], T]) -> T:
    """Ask the cluster, and once more after a failure: perhaps only the answer was lost.

    Raises:
        ClusterError: The cluster did not answer either time.
    """
    try:
        return ask()
    except ClusterError:
        time.sleep(_ASK_AGAIN_S)
    return ask()
