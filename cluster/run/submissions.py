"""The submissions of a run: requests to a cluster; each changes nothing until its job takes it.

A submission names the description and the code that its job runs with. The files of the run stay as they are until a
driver has taken the lease for the submission. If two people submit at once, one finds the other's submission, or one's
job does, and that one withdraws its own.
"""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from cluster.errors import DescriptionError, Requeued, StorageError, one_line
from cluster.host.batch_job import EndsEarly
from cluster.storage.documents import read_document, write_document
from cluster.storage.redaction import redacted
from cluster.storage.store import Store
from cluster.storage.typed_json import from_json

SubmissionState = Literal["waiting", "taken", "failed", "stopped", "done"]

Standing = Literal["due", "taken", "superseded", "stopped"]

_MARKS: tuple[SubmissionState, ...] = ("taken", "stopped", "failed", "done")
"""States that a mark file records; if there are several, the first one counts."""
_ID = r"([0-9]{6,})-[0-9]{14,}-[0-9a-f]{8}"
_NAME = re.compile(rf"(?P<id>{_ID})(?:\.(?P<mark>{'|'.join(_MARKS)}))?\.json")
"""Objects with other names beside the submissions are ignored."""
_NO_ERROR_TEXT = "it does not say why"
_ERROR_TEXTS: Mapping[type[BaseException], str] = dict.fromkeys(
    (KeyboardInterrupt, SystemExit), "it was stopped before the run began"
)
"""Texts for exceptions without a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What a cluster job is to run.

    Attributes:
        number: How many jobs of the run were begun before; it is part of the job's name.
        job: The cluster's id of the job.
        cluster: The address of the cluster.
        description: The resolved description, as ``job.yaml`` holds it once the submission is taken.
        code_sha256: The digest of the bundle with the user's modules.
        code_directory: The folder in the bundle where relative paths start; None: they start in an empty folder.
        working_directory: Where the code was packed, for people to read.
        user, host: Who submitted, and on which machine.
        time: When it was submitted, in Unix time.
        versions: Of ``python``, ``ray``, ``torch`` and ``launcher`` on that machine, by these names.
        git: The revision of the working directory and the digest of its changes; None: it is in no repository.
        claimed: When the run's newest driver had taken its lease, by the clock of that driver's host. If the status has
            another value, a driver has come since. None: the run had no driver.
    """

    number: int
    job: str
    cluster: str
    description: str
    code_sha256: str
    code_directory: str | None
    working_directory: str | None
    user: str
    host: str
    time: float
    versions: Mapping[str, str]
    git: Mapping[str, str | None] | None
    claimed: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmissionReport:
    """The state of a submission.

    Attributes:
        id: The submission's name in the run directory.
        number: See ``Submission``.
        state: ``waiting``: no driver has answered it; ``taken``: the run has its description and code; ``done``: there
            was nothing to do; ``failed``: its driver ended before it took the run; ``stopped``: its job was stopped
            before that.
    """

    id: str
    number: int
    state: SubmissionState


@dataclass(frozen=True, kw_only=True, slots=True)
class SignOfLife:
    """Heartbeat of a submission's job that has begun but has not taken the run yet.

    Attributes:
        doing: What the job is doing, for people to read.
        time: When it wrote this, in Unix time by the clock of its host.
    """

    doing: str
    time: float


class UnreadableSubmissionError(StorageError):
    """A submission is missing, torn, or from an incompatible launcher; its number and state are still known."""


class Submissions:
    """The submissions of one run.

    Args:
        store: The store of their folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, submission: Submission, submission_id: str | None = None) -> str:
        """Writes a submission, under ``submission_id`` if one was made before, and returns its id."""
        submission_id = submission_id or make_id(submission.number, submission.time)
        write_document(self._store, f"{submission_id}.json", asdict(submission))
        return submission_id

    def is_there(self, submission_id: str) -> bool:
        """Returns whether a submission was written."""
        return self._store.exists(f"{submission_id}.json")

    def is_answered(self, submission_id: str) -> bool:
        """Returns whether a submission's job has written a heartbeat or a mark."""
        if self._store.exists(f"{submission_id}.sign.json"):
            return True
        return any(report.id == submission_id and report.state != "waiting" for report in self.reports())

    def read(self, submission_id: str) -> Submission:
        """Returns the submission with an id.

        Raises:
            UnreadableSubmissionError: It is missing; or torn, because its writer was killed; or it lacks what this
                launcher needs.
        """
        where = f"{self._store.url}/{submission_id}.json"
        document = read_document(self._store, f"{submission_id}.json")
        if document is None:
            raise UnreadableSubmissionError(f"{where}: is missing or torn; submit the run again")
        try:
            return from_json(Submission, json.dumps(document), ignores_unknown=True)
        except ValueError as error:
            raise UnreadableSubmissionError(f"{where}: {error}; submit the run again with one launcher") from error

    def reports(self) -> list[SubmissionReport]:
        """Returns all states from one listing: by number, within a number those taken last, then by time."""
        found = {(match["id"], match["mark"]) for match in map(_NAME.fullmatch, self._store.names()) if match}

        def state(submission_id: str) -> SubmissionState:
            return next((mark for mark in _MARKS if (submission_id, mark) in found), "waiting")

        reports = [
            SubmissionReport(id=submission_id, number=_number(submission_id), state=state(submission_id))
            for submission_id, mark in found
            if mark is None
        ]
        return sorted(reports, key=lambda report: (report.number, report.state == "taken", report.id))

    def newest(self) -> SubmissionReport | None:
        """Returns the last of ``reports``, or None if the run was never submitted."""
        reports = self.reports()
        return reports[-1] if reports else None

    def read_newest(self) -> tuple[SubmissionReport, Submission] | None:
        """Returns the last of ``reports`` and its submission, or None if the run was never submitted.

        Raises:
            UnreadableSubmissionError: It cannot be read.
        """
        report = self.newest()
        while report is not None:
            try:
                return report, self.read(report.id)
            except UnreadableSubmissionError:
                listed, report = report, self.newest()
                if report == listed:  # else it was withdrawn meanwhile: read the next
                    raise
        return None

    def readable(self) -> Iterator[tuple[SubmissionReport, Submission]]:
        """Reads the submissions one by one, the last of ``reports`` first, and skips unreadable ones."""
        for report in reversed(self.reports()):
            with contextlib.suppress(UnreadableSubmissionError):
                yield report, self.read(report.id)

    def standing(self, submission_id: str) -> Standing:
        """Returns what the job of a submission has to do.

        Returns:
            ``due``: take it; ``taken``: go on with the run, an earlier process of the job has taken it; ``superseded``:
                nothing, another submission that is not older was taken; ``stopped``: nothing, it was stopped before its
                job started.

        Raises:
            DescriptionError: ``submission_id`` is no submission id.
        """
        states = {report.id: report.state for report in self.reports()}
        taken = {other for other, state in states.items() if state == "taken"}
        if any(_number(other) > _number(submission_id) for other in taken):
            return "superseded"
        if submission_id in taken:
            return "taken"
        if any(_number(other) == _number(submission_id) for other in taken):
            return "superseded"
        return "stopped" if states.get(submission_id) == "stopped" else "due"

    def mark_taken(self, submission_id: str) -> None:
        """Records that the run now has the description and the code of a submission."""
        write_document(self._store, f"{submission_id}.taken.json", {})

    def mark_stopped(self, submission_id: str) -> None:
        """Records that a submission's job was stopped before a driver took it."""
        write_document(self._store, f"{submission_id}.stopped.json", {})

    def mark_done(self, submission_id: str) -> None:
        """Records that a submission's driver had nothing to do."""
        write_document(self._store, f"{submission_id}.done.json", {})

    @contextlib.contextmanager
    def answered(self, submission_id: str | None) -> Iterator[None]:
        """Context in which a driver takes a submission. Records an error that ends it before that.

        A submission whose batch job ends early keeps waiting, for the next try of that job.

        Args:
            submission_id: None: the driver was not started for a submission.

        Raises:
            DescriptionError: ``submission_id`` is no submission id.
        """
        if submission_id is not None:
            check_id(submission_id)
        try:
            yield
            if submission_id is not None and self.standing(submission_id) == "due":
                self.mark_done(submission_id)
        except (EndsEarly, Requeued):
            if submission_id is not None:
                with contextlib.suppress(StorageError):  # then it reads as silent until the next try begins
                    self.delete_sign(submission_id)
            raise
        except BaseException as error:
            if submission_id is not None:
                with contextlib.suppress(StorageError):  # the job's output has the error anyway
                    if self.standing(submission_id) == "due":
                        self.mark_failed(submission_id, _ERROR_TEXTS.get(type(error)) or one_line(error) or repr(error))
            raise

    def mark_failed(self, submission_id: str, error: str) -> None:
        """Records why a submission's job ended before a driver took it."""
        # Redacted: everybody who can read the store can read it, and it may be any exception's text.
        write_document(self._store, f"{submission_id}.failed.json", {"error": redacted(error, {})})

    def read_failure(self, submission_id: str) -> str:
        """Returns why the driver of a failed submission ended, in one line."""
        return str((read_document(self._store, f"{submission_id}.failed.json") or {}).get("error", _NO_ERROR_TEXT))

    def write_sign(self, submission_id: str, doing: str) -> None:
        """Writes the heartbeat of a submission's job that has not taken the run yet, and what it is doing."""
        sign = SignOfLife(doing=doing, time=round(time.time(), 3))
        write_document(self._store, f"{submission_id}.sign.json", asdict(sign))

    def read_sign(self, submission_id: str) -> SignOfLife | None:
        """Returns the last heartbeat of a submission's job, or None if there is none that can be read."""
        document = read_document(self._store, f"{submission_id}.sign.json")
        if document is None:
            return None
        try:
            return from_json(SignOfLife, json.dumps(document), ignores_unknown=True)
        except ValueError:  # not written by this launcher: it says nothing of the job
            return None

    def delete_sign(self, submission_id: str) -> None:
        """Deletes the heartbeat of a submission's job; no more will follow."""
        self._store.delete([f"{submission_id}.sign.json"])

    def write_tries(self, submission_id: str, without_progress: int, newest_step: int) -> None:
        """Writes how many tries of a submission's job in a row have ended without a newer checkpoint.

        Args:
            submission_id: The submission.
            without_progress: The number of these tries.
            newest_step: The step of the newest checkpoint; 0: there is none.
        """
        tries = {"without_progress": without_progress, "newest_step": newest_step}
        write_document(self._store, f"{submission_id}.tries.json", tries)

    def read_tries(self, submission_id: str, newest_step: int) -> int:
        """Returns how many tries of a submission's job in a row have ended without a newer checkpoint.

        A try that was killed is not counted, but may have saved: if ``newest_step``, that of the newest checkpoint, is
        not the one that was written with the number, the number is 0.
        """
        tries = read_document(self._store, f"{submission_id}.tries.json") or {}
        return int(tries["without_progress"]) if tries.get("newest_step") == newest_step else 0

    def withdraw(self, submission_id: str) -> None:
        """Deletes a submission that no job is to take."""
        self._store.delete([f"{submission_id}.json"])


def make_id(number: int, at: float) -> str:
    """Returns a new, unique submission id.

    Args:
        number: How many jobs of the run were begun before.
        at: Now, in Unix time.
    """
    return f"{number:06d}-{int(at * 1000):014d}-{secrets.token_hex(4)}"


def check_id(submission_id: str) -> None:
    """Checks that a text is a submission id; the submission need not be written yet.

    Raises:
        DescriptionError: It is not.
    """
    _number(submission_id)


def _number(submission_id: str) -> int:
    match = re.fullmatch(_ID, submission_id)
    if match is None:
        raise DescriptionError(f"--submission {submission_id}: is no submission; leave it out to go on with the run")
    return int(match[1])
