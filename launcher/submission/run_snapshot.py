"""The state of a run when somebody submits it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, SubmissionReport, UnreadableSubmissionError
from launcher.config.description import Description, Difference, parse
from launcher.runs.changes import changes_of, compare
from launcher.submission.job_command import make_job_id, numbered


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSnapshot:
    """The state of a run before it is submitted.

    Attributes:
        url: The URL of the run.
        stored: Its description; None: the run does not exist.
        status: The status that its last driver wrote; None: it never had a driver.
        known: The ids of its submissions.
        newest: The report of its newest submission; None: it was never submitted.
        submission: The content of that submission; None: there is none, or it cannot be read.
        changed: The changes of its description.
        code_sha256: The digest of its code bundle; None: it has no bundle, or does not exist.
        reached: The step of its newest checkpoint.
    """

    url: str
    stored: Description | None
    status: Mapping[str, Any] | None
    known: frozenset[str]
    newest: SubmissionReport | None
    submission: Submission | None
    changed: list[Difference]
    code_sha256: str | None
    reached: int

    @property
    def waits_on(self) -> str | None:
        """The address of the cluster on which the newest submission waits for its driver; None: it does not wait."""
        is_waiting = self.newest is not None and self.newest.state == "waiting"
        return self.submission.cluster if is_waiting and self.submission is not None else None

    def job_id(self, number: int) -> str:
        """Return the name of a job of the run, spelled as in its newest submission.

        One run directory may have several URLs, from which other names would follow.
        """
        return make_job_id(self.url, number) if self.submission is None else numbered(self.submission.job, number)


def take_snapshot(run: RunDirectory, wanted: Description) -> RunSnapshot:
    """Read the state of a run that is to be submitted with a description.

    Raises:
        DescriptionError: The run exists with another description.
    """
    known = frozenset(report.id for report in run.submissions.reports())
    try:
        newest, submission = run.submissions.read_newest() or (None, None)
    except UnreadableSubmissionError:  # its file name has the number; the next submission replaces it
        newest, submission = run.submissions.newest(), None
    stored, changed, code = None, list[Difference](), None
    if run.exists():
        stored = parse(run.read_job(), f"{run.url}/job.yaml")
        changed, _ = compare(run, stored, wanted)
        code = run.read_environment().get("code")
    elif submission is not None:  # nothing was trained, so any change is allowed
        changed = changes_of(submission.description, wanted)
        code = submission.code_sha256
    return RunSnapshot(
        url=run.url,
        stored=stored,
        status=run.read_status(),
        known=known,
        newest=newest,
        submission=submission,
        changed=changed,
        code_sha256=code,
        reached=max(run.checkpoints.steps(), default=0),
    )
