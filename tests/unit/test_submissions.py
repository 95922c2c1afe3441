"""Submissions change nothing in a run until one is taken, whatever becomes of those who wrote them."""

import json
import time
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import pytest

from cluster.errors import ClusterError, DescriptionError, Requeued
from cluster.host.batch_job import EndsEarly
from cluster.run.submissions import SignOfLife, Submission, SubmissionReport, Submissions, UnreadableSubmissionError
from cluster.storage.store import Store

FIRST = Submission(
    number=0,
    job="digits-ab-0",
    cluster="http://head:8265",
    description="name: digits\n",
    code_sha256="0" * 64,
    code_directory=None,
    working_directory="/home/me",
    user="me",
    host="laptop",
    time=1.5,
    versions={"python": "3.11.7"},
    git=None,
)


@pytest.fixture
def submissions(tmp_path: Path) -> Submissions:
    return Submissions(Store(str(tmp_path / "run/submissions")))


def newest(submissions: Submissions) -> SubmissionReport:
    report = submissions.newest()
    assert report is not None
    return report


def test_none_was_written(submissions):
    assert submissions.newest() is None
    assert submissions.standing("000000-00000000001500-1f3ac0de") == "due"
    assert submissions.read_newest() is None


def test_what_is_written_is_read(submissions):
    submission_id = submissions.write(FIRST)
    assert submissions.read(submission_id) == FIRST
    assert submissions.newest() == SubmissionReport(id=submission_id, number=0, state="waiting")


def test_one_that_is_taken_is_due_no_more_and_neither_are_those_before_it(submissions):
    stale, rival, first = (submissions.write(replace(FIRST, number=number)) for number in (0, 1, 1))
    later = submissions.write(replace(FIRST, number=2))
    submissions.mark_taken(first)
    standings = [submissions.standing(each) for each in (stale, rival, first, later)]
    assert standings == ["superseded", "superseded", "taken", "due"]
    assert newest(submissions).id == later
    submissions.withdraw(later)
    assert newest(submissions) == SubmissionReport(id=first, number=1, state="taken")


def test_of_one_number_the_one_that_was_taken_counts_and_else_the_later(submissions):
    early, late = (submissions.write(replace(FIRST, time=time)) for time in (8.0, 9.0))
    assert newest(submissions).id == late
    with pytest.raises(ClusterError), submissions.answered(late):
        raise ClusterError("no room")
    assert (newest(submissions).id, newest(submissions).state) == (late, "failed")
    submissions.mark_taken(early)
    assert (newest(submissions).id, newest(submissions).state) == (early, "taken")
    assert submissions.standing(late) == "superseded"


@pytest.mark.parametrize("document", [{"time": 7.0}, {"doing": "x", "time": "now"}, {"doing": 1, "time": 7.0}])
def test_a_sign_of_something_else_says_nothing(submissions, tmp_path, document):
    submission_id = submissions.write(FIRST)
    (tmp_path / f"run/submissions/{submission_id}.sign.json").write_text(json.dumps(document))
    assert submissions.read_sign(submission_id) is None


def test_a_sign_of_life_answers_nothing(submissions, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 7.0)
    submission_id = submissions.write(FIRST)
    assert submissions.read_sign(submission_id) is None
    submissions.write_sign(submission_id, "waiting for room")
    assert submissions.read_sign(submission_id) == SignOfLife(doing="waiting for room", time=7.0)
    assert submissions.reports() == [SubmissionReport(id=submission_id, number=0, state="waiting")]
    submissions.delete_sign(submission_id)
    assert submissions.read_sign(submission_id) is None


def test_one_that_is_withdrawn_while_it_is_read(submissions, monkeypatch):
    first, rival = submissions.write(FIRST), submissions.write(replace(FIRST, time=9.0))
    list_names = submissions._store.names

    def withdraw_after_listing() -> list[str]:
        names = list_names()
        monkeypatch.setattr(submissions._store, "names", list_names)
        submissions.withdraw(rival)
        return names

    monkeypatch.setattr(submissions._store, "names", withdraw_after_listing)
    assert submissions.read_newest() == (SubmissionReport(id=first, number=0, state="waiting"), FIRST)


def test_numbers_are_not_compared_as_text(submissions):
    ids = [submissions.write(replace(FIRST, number=number)) for number in (9, 10, 1_000_000)]
    assert newest(submissions).id == ids[-1]


@pytest.mark.parametrize("name", ["notes.json", "old/000001-00000000001500-1f3ac0de.json", "000001-copy.json"])
def test_other_files_beside_them_are_passed_over(submissions, name):
    submission_id = submissions.write(FIRST)
    submissions.mark_taken(submission_id)
    submissions._store.write(name, b"{}")
    assert submissions.reports() == [SubmissionReport(id=submission_id, number=0, state="taken")]


def test_what_is_no_submission(submissions):
    submissions.mark_taken(submissions.write(FIRST))
    with pytest.raises(DescriptionError, match="--submission x: is no submission; leave it out"):
        submissions.standing("x")
    with pytest.raises(DescriptionError, match="--submission x: is no submission"), submissions.answered("x"):
        raise AssertionError("nothing is begun")


class TestAnswered:
    def test_an_error_before_it_is_taken_is_told(self, submissions):
        submission_id = submissions.write(FIRST)
        with pytest.raises(ClusterError), submissions.answered(submission_id):
            raise ClusterError("no room:\nadd nodes")
        assert newest(submissions).state == "failed"
        assert submissions.read_failure(submission_id) == "no room: add nodes"
        assert submissions.standing(submission_id) == "due", "a retry of its job may take it yet"

    def test_its_secrets_are_not(self, submissions, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
        submission_id = submissions.write(FIRST)
        with pytest.raises(ValueError, match="no login"), submissions.answered(submission_id):
            raise ValueError("no login with 0123456789abcdef at https://me:hunter22@host/x")
        (failure,) = (tmp_path / "run/submissions").glob("*.failed.json")
        assert "no login with" in failure.read_text()
        assert not [secret for secret in ("0123456789abcdef", "hunter22") if secret in failure.read_text()]

    def test_an_error_afterwards_is_the_runs(self, submissions):
        submission_id = submissions.write(FIRST)

        def train() -> None:
            with submissions.answered(submission_id):
                submissions.mark_taken(submission_id)
                raise ClusterError("a worker died")

        with pytest.raises(ClusterError):
            train()
        assert newest(submissions).state == "taken"

    @pytest.mark.parametrize("signal", [KeyboardInterrupt(), SystemExit(15)])
    def test_a_signal_is_told(self, submissions, signal):
        submission_id = submissions.write(FIRST)
        with pytest.raises(type(signal)), submissions.answered(submission_id):
            raise signal
        assert submissions.read_failure(submission_id) == "it was stopped before the run began"

    @pytest.mark.parametrize("early", [EndsEarly(), Requeued("SIGUSR1 came before training began")])
    def test_one_whose_batch_job_ends_early_waits_for_its_next_try(self, submissions, early):
        submission_id = submissions.write(FIRST)
        submissions.write_sign(submission_id, "planning")
        with pytest.raises(type(early)), submissions.answered(submission_id):
            raise early
        assert newest(submissions).state == "waiting"
        assert submissions.read_sign(submission_id) is None, "it would read as a job that says nothing any more"
        assert submissions.standing(submission_id) == "due"

    def test_the_next_try_of_a_job_that_has_taken_it_goes_on(self, submissions):
        submission_id = submissions.write(FIRST)
        submissions.mark_taken(submission_id)
        for ends in (SystemExit(75), EndsEarly(), ClusterError("no room")):
            with pytest.raises(type(ends)), submissions.answered(submission_id):
                raise ends
            assert (newest(submissions).state, submissions.standing(submission_id)) == ("taken", "taken")

    def test_one_that_asks_for_nothing_is_done(self, submissions):
        submission_id = submissions.write(FIRST)
        with submissions.answered(submission_id):
            pass
        assert newest(submissions).state == "done"

    def test_a_driver_that_was_begun_for_none_writes_nothing(self, submissions, tmp_path):
        with submissions.answered(None):
            pass
        with pytest.raises(ClusterError), submissions.answered(None):
            raise ClusterError("no room")
        assert not (tmp_path / "run").exists()

    def test_one_that_failed_and_is_then_taken(self, submissions):
        submission_id = submissions.write(FIRST)
        with pytest.raises(ClusterError), submissions.answered(submission_id):
            raise ClusterError("no room")
        with submissions.answered(submission_id):
            submissions.mark_taken(submission_id)
        assert newest(submissions).state == "taken"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is missing or torn; submit the run again"),
        (json.dumps({"number": 0}), "job: Field required; submit the run again with one launcher"),
        (json.dumps(asdict(FIRST) | {"number": "0"}), "number: Input should be a valid integer, got '0'; submit"),
    ],
)
def test_one_that_cannot_be_read(submissions, tmp_path, text, said):
    submission_id = submissions.write(FIRST)
    (tmp_path / f"run/submissions/{submission_id}.json").write_text(text)
    with pytest.raises(UnreadableSubmissionError, match=f"{submission_id}.json: {said}"):
        submissions.read(submission_id)
    older = submissions.write(replace(FIRST, time=0.5))
    assert [(report.id, found) for report, found in submissions.readable()] == [(older, replace(FIRST, time=0.5))]
    with pytest.raises(UnreadableSubmissionError, match=said):
        submissions.read_newest()


def test_one_of_a_launcher_that_wrote_only_what_is_required(submissions, tmp_path):
    submission_id = submissions.write(FIRST)
    path = tmp_path / f"run/submissions/{submission_id}.json"
    required = {field.name for field in fields(Submission) if field.default is MISSING}
    path.write_text(json.dumps({name: value for name, value in asdict(FIRST).items() if name in required}))
    assert submissions.read(submission_id) == FIRST
