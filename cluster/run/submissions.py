"""The submissions of a run: what somebody handed to a cluster, which changes nothing until its job takes it.

A submission names the description and the code that its job is to run with. The files of the run itself stay as they
are until a driver has claimed the run for it: of two people who submit at once, one finds the submission of the other,
or the job of one does, and takes back its own.
"""

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from cluster.errors import DescriptionError, StorageError, one_line
from cluster.storage.documents import read_document, write_document
from cluster.storage.redaction import redacted
from cluster.storage.store import Store
from cluster.storage.typed_json import from_json

SubmissionState = Literal["waiting", "taken", "failed", "stopped", "done"]

Standing = Literal["due", "taken", "superseded"]

_MARKS: tuple[SubmissionState, ...] = ("taken", "stopped", "failed", "done")
"""Those that a file of its own tells; of several the first counts."""
_ID = r"([0-9]{6,})-[0-9]{14,}-[0-9a-f]{8}"
_NAME = re.compile(rf"(?P<id>{_ID})(?:\.(?P<mark>{'|'.join(_MARKS)}))?\.json")
"""What else lies beside them is none of theirs."""
_UNKNOWN = "it does not say why"
_UNTOLD: Mapping[type[BaseException], str] = dict.fromkeys(
    (KeyboardInterrupt, SystemExit), "it was stopped before the run began"
)
"""What exceptions mean that have no message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What a job of a cluster is to run.

    Attributes:
        number: How many jobs of the run were begun before; the name of the job has it.
        job: What the cluster calls the job.
        cluster: The address of the cluster.
        description: The resolved description, as ``job.yaml`` holds it once the submission is taken.
        code_sha256: The digest of the bundle with the user's modules.
        code_directory: The folder in the bundle in which relative paths start; none: they start in an empty one.
        working_directory: Of whoever packed the code, for people to know.
        user, host: Who submitted, and on which machine.
        time: When, in Unix time.
        versions: Of ``python``, ``ray``, ``torch`` and ``launcher`` there, by these names.
        git: The revision of the working directory there, and the digest of its changes; none: it is in no repository.
        claimed: When the newest driver of the run had claimed it, by the clock of that driver's host: with another one
            in the status, a driver has come since. None: the run had no driver.
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
    """How a submission stands.

    Attributes:
        id: Its name in the run directory.
        number: See ``Submission``.
        state: ``waiting``: no driver has answered it; ``taken``: the run has its description and its code; ``done``:
            there was nothing to do; ``failed``: its driver ended before it took the run; ``stopped``: its job was
            stopped before that.
    """

    id: str
    number: int
    state: SubmissionState


@dataclass(frozen=True, kw_only=True, slots=True)
class SignOfLife:
    """What the job of a submission is at that has begun and has not taken the run yet.

    Attributes:
        doing: What, for people.
        time: When it said so, in Unix time by the clock of its host.
    """

    doing: str
    time: float


class UnreadableSubmissionError(StorageError):
    """A submission is missing, torn, or of a launcher that wrote less; its name tells its number and its state."""


class Submissions:
    """Those of one run.

    Args:
        store: Of their folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, submission: Submission, submission_id: str | None = None) -> str:
        """Writes a submission, by an id that was made for it; returns the id."""
        submission_id = submission_id or make_id(submission.number, submission.time)
        write_document(self._store, f"{submission_id}.json", asdict(submission))
        return submission_id

    def is_there(self, submission_id: str) -> bool:
        """Whether a submission was written."""
        return self._store.exists(f"{submission_id}.json")

    def is_answered(self, submission_id: str) -> bool:
        """Whether its job has told that it has found a submission, or what became of that."""
        if self._store.exists(f"{submission_id}.sign.json"):
            return True
        return any(report.id == submission_id and report.state != "waiting" for report in self.reports())

    def read(self, submission_id: str) -> Submission:
        """The submission with an id.

        Raises:
            UnreadableSubmissionError: There is none; or it is torn: it was being written when its writer was killed;
                or it lacks what this launcher needs to know.
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
        """All of them: by number, of one number those that were taken last, and else by time. One listing."""
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
        """The last of ``reports``; none: the run was never submitted."""
        reports = self.reports()
        return reports[-1] if reports else None

    def read_newest(self) -> tuple[SubmissionReport, Submission] | None:
        """The last of ``reports``, and what it holds; none: the run was never submitted.

        Raises:
            UnreadableSubmissionError: It cannot be read.
        """
        report = self.newest()
        while report is not None:
            try:
                return report, self.read(report.id)
            except UnreadableSubmissionError:
                listed, report = report, self.newest()
                if report == listed:  # and was not just withdrawn
                    raise
        return None

    def readable(self) -> Iterator[tuple[SubmissionReport, Submission]]:
        """Those that can be read, with what they hold; the last of ``reports`` first, read one by one."""
        for report in reversed(self.reports()):
            with contextlib.suppress(UnreadableSubmissionError):
                yield report, self.read(report.id)

    def standing(self, submission_id: str) -> Standing:
        """What a job has to do that was begun for a submission.

        Returns:
            ``due``: to take it; ``taken``: to go on with the run, since an earlier process of the job has taken it;
            ``superseded``: nothing, since another one was taken that is not older.

        Raises:
            DescriptionError: That is no id.
        """
        taken = {report.id for report in self.reports() if report.state == "taken"}
        if any(_number(other) > _number(submission_id) for other in taken):
            return "superseded"
        if submission_id in taken:
            return "taken"
        return "superseded" if any(_number(other) == _number(submission_id) for other in taken) else "due"

    def mark_taken(self, submission_id: str) -> None:
        """Says that the run now has the description and the code of a submission."""
        write_document(self._store, f"{submission_id}.taken.json", {})

    def mark_stopped(self, submission_id: str) -> None:
        """Says that the job of a submission was stopped before a driver took it."""
        write_document(self._store, f"{submission_id}.stopped.json", {})

    @contextlib.contextmanager
    def answered(self, submission_id: str | None) -> Iterator[None]:
        """Within it, a driver takes a submission. An error before that is told in the run directory, too.

        Args:
            submission_id: None: the driver was begun for none.

        Raises:
            DescriptionError: That is no id.
        """
        if submission_id is not None:
            check_id(submission_id)
        try:
            yield
            if submission_id is not None and self.standing(submission_id) == "due":  # there was nothing to do
                write_document(self._store, f"{submission_id}.done.json", {})
        except BaseException as error:
            if submission_id is not None:
                with contextlib.suppress(StorageError):  # the job's own output has the error too
                    if self.standing(submission_id) == "due":
                        self.mark_failed(submission_id, _UNTOLD.get(type(error)) or one_line(error) or repr(error))
            raise

    def mark_failed(self, submission_id: str, error: str) -> None:
        """Says why the job of a submission ended before a driver took it."""
        # The store keeps it for all who may read there, and it may be any exception's.
        write_document(self._store, f"{submission_id}.failed.json", {"error": redacted(error, {})})

    def read_failure(self, submission_id: str) -> str:
        """Why the driver of a submission that failed ended, in a line."""
        return str((read_document(self._store, f"{submission_id}.failed.json") or {}).get("error", _UNKNOWN))

    def write_sign(self, submission_id: str, doing: str) -> None:
        """Says what the job of a submission is at before it takes the run, and that it lives."""
        sign = SignOfLife(doing=doing, time=round(time.time(), 3))
        write_document(self._store, f"{submission_id}.sign.json", asdict(sign))

    def read_sign(self, submission_id: str) -> SignOfLife | None:
        """The last sign of the job of a submission; none: it has given none, or is done with what it was at."""
        document = read_document(self._store, f"{submission_id}.sign.json")
        return None if document is None else SignOfLife(doing=document["doing"], time=document["time"])

    def delete_sign(self, submission_id: str) -> None:
        """Says that the job of a submission gives no more signs."""
        self._store.delete([f"{submission_id}.sign.json"])

    def withdraw(self, submission_id: str) -> None:
        """Deletes a submission that no job is to take."""
        self._store.delete([f"{submission_id}.json"])


def make_id(number: int, at: float) -> str:
    """An id that no other submission has.

    Args:
        number: How many jobs of the run were begun before.
        at: Now, in Unix time.
    """
    return f"{number:06d}-{int(at * 1000):014d}-{secrets.token_hex(4)}"


def check_id(submission_id: str) -> None:
    """Makes sure that a text is the id of a submission, which may yet be written.

    Raises:
        DescriptionError: It is not.
    """
    _number(submission_id)


def _number(submission_id: str) -> int:
    match = re.fullmatch(_ID, submission_id)
    if match is None:
        raise DescriptionError(f"--submission {submission_id}: is no submission; leave it out to go on with the run")
    return int(match[1])
