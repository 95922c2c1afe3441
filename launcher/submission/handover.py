"""Handing a run over to a cluster: the job that stands by for it, and the submission that the job takes up.

The cluster begins a job of one name once. Each job has the number of its submission in its name, and takes the
submission that it was begun for, and no other.
"""

import getpass
import hashlib
import math
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.errors import ClusterError, Interrupted, LauncherError
from cluster.inspection.nodes import NEEDS_VARIABLE, needs_to_text
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, UnreadableSubmissionError, make_id
from cluster.scheduler import ENDED, Job, Needs, Scheduler
from cluster.spec import RayClusterSpec
from launcher.config.clusters import PREFIX
from launcher.submission.standby import HAND_OVER_S

T = TypeVar("T")

STANDBY = "standby"
"""What the metadata of a job has that was begun before its submission was written."""
_ASK_AGAIN_S = 2.0
_LOOK_INTERVAL_S = 0.2
_TAKE_UP_S = 15.0
"""How long a job may take to tell that it has found its submission: as long as it may take to end."""
_DIGITS = 12
"""Of the digest of a run's URL, in the names of its jobs."""
_LONGEST_NAME = 40


def make_job_id(run_url: str, number: int) -> str:
    """What a run is called on a cluster when it is begun for the ``number``-th time, from 0.

    The same everywhere for one spelling of the URL, so that of two who submit a new run at once each finds the job of
    the other.
    """
    name = re.sub("[^A-Za-z0-9_-]", "-", run_url.rstrip("/").rpartition("/")[2])[:_LONGEST_NAME]
    return f"{name}-{hashlib.sha256(run_url.encode()).hexdigest()[:_DIGITS]}-{number}"


def numbered(job_id: str, number: int) -> str:
    """What a job would be called if it had another number."""
    return f"{job_id.rpartition('-')[0]}-{number}"


def make_command(run_url: str, submission_id: str, place: RayClusterSpec, *, stands_by: bool) -> str:
    """What takes up a submission, as a line for the shell of a host of the cluster; Ray names the cluster there.

    The same command again goes on with the run.

    Args:
        run_url: Whose submission it is.
        submission_id: Its id.
        place: The description of the cluster.
        stands_by: The submission is yet to be written.
    """
    standby = " --standby" if stands_by else ""
    resume = f"exec launcher resume {shlex.quote(run_url)} --submission {submission_id}{standby} --json"
    changes = "".join(f" {shlex.quote(f'{PREFIX}{change}')}" for change in place.driver_overrides())
    return f'{resume} --cluster "$RAY_ADDRESS"{changes}'


def submitter() -> dict[str, str]:
    """``user`` and ``host`` of this process."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = str(os.getuid())
    return {"user": user, "host": socket.gethostname()}


class NothingBegunError(ClusterError):
    """No job has begun for a submission, and nothing is left of it."""


class OvertakenError(NothingBegunError):
    """Somebody else has submitted the same run at the same time.

    Attributes:
        job_id: Of their job, which lives.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the run was submitted by somebody else at the same time, as job {job_id}")
        self.job_id = job_id


@dataclass(kw_only=True, slots=True)
class Standby:
    """A job that stands by, see ``launcher.submission.standby``.

    Attributes:
        number: How many jobs of the run were begun before.
        job_id: What the cluster calls it.
        submission_id: Of the submission that it waits for.
        asked_at: When the cluster was asked for it, by ``time.monotonic``.
        is_used: Its submission is written, so that it goes on without this process.
    """

    number: int
    job_id: str
    submission_id: str
    asked_at: float
    is_used: bool = False

    @property
    def is_in_time(self) -> bool:
        """Whether it waits long enough for a submission that is written now."""
        return time.monotonic() - self.asked_at < HAND_OVER_S


class HandOver:
    """Hands a run over to a cluster.

    Args:
        run: Which; it may not exist yet.
        known: The ids of the submissions that it had when it was decided to submit it: others are of somebody else.
        scheduler: The cluster.
        place: Its description.
        tell: Takes what is done.
    """

    def __init__(
        self,
        run: RunDirectory,
        known: Collection[str],
        scheduler: Scheduler,
        place: RayClusterSpec,
        tell: Callable[[str], None],
    ) -> None:
        self._run, self._known = run, known
        self._scheduler, self._place, self._tell = scheduler, place, tell

    @contextmanager
    def standby(self, job_id: str, number: int, needs: Needs) -> Iterator[Standby]:
        """A job that stands by, with that number or the next one that nobody else has.

        At the end it is stopped, unless it is used. If the cluster does not answer, it ends by itself.

        Args:
            job_id: What a job of the run is called, with any number.
            number: How many jobs of the run were begun before.
            needs: What the nodes are inspected for.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile.
            ClusterError: The cluster does not begin one.
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
        """Writes a submission for the job that stands by, or begins another one for it if that is gone.

        Of two who do so at the same moment one sees the submission of the other and takes back its own. If neither
        does, both jobs begin, and all but the one that claims the run end.

        Args:
            submission: With the number and the name of the job that stands by.
            standby: That.

        Returns:
            What the cluster calls the job.

        Raises:
            OvertakenError: Somebody else has submitted the run meanwhile, and nothing of this submission is left.
            Interrupted, LauncherError: A job may have begun, if the message says so.
        """
        newest = self._check_overtaken()
        if standby.is_in_time and newest <= standby.number:
            standby.is_used = True
            try:
                with self.may_run(standby.job_id):
                    self._run.submissions.write(submission, standby.submission_id)  # the run itself stays as it is
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
        """Within it, whatever ends this process leaves a job that may run, and says so.

        Args:
            job_id: What the cluster calls it.

        Raises:
            Interrupted: By Ctrl-C.
            LauncherError: Any other than ``NothingBegunError``, with that added.
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
        """Makes sure that nobody else has submitted the run to this cluster meanwhile, with a job that lives.

        Args:
            below: Only submissions with lower numbers count.

        Returns:
            The highest number of the submissions of the run; -1: it has none.

        Raises:
            OvertakenError: Somebody has.
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
        """Whether a job takes the submission that was written for it: not if it ended while it stood by.

        It tells so in the run directory. A job that lives and tells nothing has a store that is slow, and will.
        """
        deadline = time.monotonic() + _TAKE_UP_S
        while True:
            job = _asked_again(lambda: self._scheduler.read(standby.job_id))  # before the store: what it wrote is seen
            if self._run.submissions.is_answered(standby.submission_id):
                return True
            if job is None or job.status in ENDED:
                return False
            if time.monotonic() > deadline:
                return True
            time.sleep(_LOOK_INTERVAL_S)

    def _begin_or_withdraw(self, job_id: str, submission_id: str) -> Job:
        """As ``_begin``; takes a submission back if the cluster answers that it has begun no job for it."""
        try:
            return self._begin(job_id, submission_id)
        except ClusterError as error:
            if not self._knows_no(job_id):
                raise
            self._run.submissions.withdraw(submission_id)  # so that a job which comes late ends
            raise NothingBegunError(f"{error}; no job has begun, submit the run again") from error

    def _knows_no(self, job_id: str) -> bool:
        """Whether the cluster answers that it has no such job."""
        try:
            return self._scheduler.read(job_id) is None
        except ClusterError:
            return False

    def _begin(self, job_id: str, submission_id: str, needs: Needs | None = None) -> Job:
        """Begins a job for a submission, unless there is one by that name; returns the one that is there.

        Args:
            job_id: What it is called.
            submission_id: Of the submission.
            needs: What the nodes are inspected for by a job that stands by; none: the submission is written.
        """
        environment = {} if needs is None else {NEEDS_VARIABLE: needs_to_text(needs)}
        standby = {} if needs is None else {STANDBY: "1"}
        command = make_command(self._run.url, submission_id, self._place, stands_by=needs is not None)
        return _asked_again(
            lambda: self._scheduler.begin(
                job_id,
                command,
                environment,
                stop_grace_s=self._place.stop_grace_s,
                metadata={"run": self._run.url, "submission": submission_id, **submitter(), **standby},
            )
        )

    def _stop(self, standby: Standby) -> None:
        """Stops a job that stands by; one of that name may be somebody else's."""
        with suppress(ClusterError):
            job = self._scheduler.read(standby.job_id)
            if job is not None and job.status not in ENDED and _is_for(standby.submission_id, job):
                self._scheduler.stop(standby.job_id)


def _is_for(submission_id: str, job: Job) -> bool:
    return job.metadata.get("submission") == submission_id


def _asked_again(ask: Callable[[], T]) -> T:
    """What a cluster answers, at the second try if not at the first: perhaps only the answer was lost.

    Raises:
        ClusterError: Neither time.
    """
    try:
        return ask()
    except ClusterError:
        time.sleep(_ASK_AGAIN_S)
    return ask()
