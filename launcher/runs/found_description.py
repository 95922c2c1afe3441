"""The description with which a run goes on: its own, or that of a submission that it has yet to take."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import UnreadableSubmissionError
from cluster.storage.store import MissingObject
from launcher.config.description import Description, parse


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundDescription:
    """The description found in a run directory.

    Attributes:
        stored: The run's description; if the run has not begun, the submitted one.
        text: The description to go on with, before overrides.
        submission_id: The submission that ``text`` comes from, which the run has yet to take; None: ``text`` is the
            run's own.
    """

    stored: Description
    text: str
    submission_id: str | None

    def changed(self, overrides: Sequence[str]) -> Description:
        """Return the description with overrides applied.

        Raises:
            DescriptionError: An override is wrong.
        """
        return parse(self.text, self.stored.source, overrides)

    def continued(self, overrides: Sequence[str], reached: int) -> Description:
        """Return the same for a person who resumes the run: remove ``train.max_steps`` if the run has reached it.

        Args:
            overrides: The changes; one that sets ``train.max_steps`` keeps the limit.
            reached: The step that the run has reached.

        Raises:
            DescriptionError: An override is wrong.
        """
        wanted = self.changed(overrides)
        limit = wanted.spec.train.max_steps
        if limit is not None and reached >= limit and not any(o.startswith("train.max_steps=") for o in overrides):
            wanted = self.changed([*overrides, "train.max_steps=null"])  # reported as a change, once the run goes on
        return wanted


def find_description(run: RunDirectory, submission_id: str | None = None) -> FoundDescription:
    """Find the description with which a run goes on.

    Args:
        run: The run, which exists or was submitted.
        submission_id: The submission for which this process was started; None: a person resumes the run.

    Raises:
        ClusterError: The submission is superseded: the run has taken another one since; or it was withdrawn or stopped.
        StorageError: The description cannot be read.
    """
    source = f"{run.url}/job.yaml"
    own_text = None
    with contextlib.suppress(MissingObject):  # the run may be submitted, and not begun
        own_text = run.read_job()
    to_take = _submission_to_take(run, submission_id, has_begun=own_text is not None)
    text = (own_text or run.read_job()) if to_take is None else _submitted_text(run, to_take)
    return FoundDescription(stored=parse(own_text or text, source), text=text, submission_id=to_take)


def _submitted_text(run: RunDirectory, submission_id: str) -> str:
    """Return the description of a submission.

    Raises:
        ClusterError: It was withdrawn.
        StorageError: It cannot be read.
    """
    try:
        return run.submissions.read(submission_id).description
    except UnreadableSubmissionError as error:
        if run.submissions.is_there(submission_id):
            raise
        raise ClusterError(
            f"{run.url}: submission {submission_id} was withdrawn, or another one replaced it before this job started; "
            "nothing is left to do for this job"
        ) from error


def _submission_to_take(run: RunDirectory, submission_id: str | None, *, has_begun: bool) -> str | None:
    """Return the submission that this process takes; None: it goes on with the run's own description.

    A process that was started for no submission leaves waiting submissions to their jobs, unless the run has no
    description yet: then it takes the newest one.

    Raises:
        ClusterError: The submission is superseded: the run has taken another one since; or it was stopped.
    """
    if submission_id is not None:
        standing = run.submissions.standing(submission_id)
        if standing == "superseded":
            raise ClusterError(
                f"{run.url}: submission {submission_id} is superseded, the run was begun for another one since; "
                "nothing is left to do for this job"
            )
        if standing == "stopped":
            raise ClusterError(f"{run.url}: submission {submission_id} was stopped; nothing is left to do for this job")
        return submission_id if standing == "due" else None
    newest = None if has_begun else run.submissions.newest()
    return None if newest is None else newest.id
