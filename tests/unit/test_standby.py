"""A job that stands by: what it tells whoever submits, how long it waits, and that it changes nothing until then."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.errors import ClusterError, DescriptionError, StorageError
from cluster.inspection.nodes import NEEDS_VARIABLE, needs_to_text, report_from_log
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, make_id
from cluster.scheduler import ClusterReport, Needs
from cluster.storage.store import Store
from launcher.cli import main
from launcher.submission import standby as standby_module
from launcher.submission.standby import HAND_OVER_S, WAIT_S, stand_by
from tests.schedulers import URL, a_cluster

NEEDS = Needs(store="s3://b/runs", variables=("TOKEN",), check="check")
SUBMISSION = Submission(
    number=0, job="a-0", cluster=URL, description="name: a\n", code_sha256="ab", code_directory=None,
    working_directory=None, user="ann", host="laptop", time=7.0, versions={}, git=None,
)  # fmt: skip


ID = "000000-00000000000007-0123abcd"
FOR_PEOPLE = ("--at=1", "--as=b", "--force", "--take-over", "--wait")


class OneNode:
    """A cluster that has been joined."""

    def __init__(self) -> None:
        self.asked: list[Needs] = []

    def inspect(self, needs: Needs) -> ClusterReport:
        self.asked.append(needs)
        return a_cluster()


class Clock:
    """Time that passes while somebody sleeps, and what happens then."""

    def __init__(self) -> None:
        self.now, self.events = 0.0, dict[float, Any]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [at for at in self.events if at <= self.now]:
            self.events.pop(due)()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv(NEEDS_VARIABLE, needs_to_text(NEEDS))
    monkeypatch.setattr(standby_module, "import_ahead", lambda *_: None)
    return RunDirectory(str(tmp_path / "store/a"))


def test_it_reports_first_and_returns_once_the_submission_is_there(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster: Any = OneNode()
    clock, submission_id, told = Clock(), make_id(0, 7.0), list[str]()
    seen = dict[str, Any]()

    def write() -> None:
        seen.update(log=capsys.readouterr().err, store=(tmp_path / "store").exists())
        run.submissions.write(SUBMISSION, submission_id)

    clock.events[WAIT_S - 1.0] = write
    stand_by(run, submission_id, cluster, told.append, clock=clock, sleep=clock.sleep)
    assert cluster.asked == [NEEDS]
    assert report_from_log(seen["log"]) == a_cluster()
    assert not seen["store"], "it has written nothing"
    assert told == ["inspecting the nodes", f"waiting for submission {submission_id}"]
    assert run.submissions.standing(submission_id) == "due"
    assert run.submissions.is_answered(submission_id), "the submitter knows that it is taken up"


def test_it_ends_if_no_submission_comes(run: RunDirectory) -> None:
    cluster: Any = OneNode()
    clock = Clock()
    run.submissions.write(SUBMISSION)  # of somebody else
    with pytest.raises(ClusterError, match=r"submission \S+ was not found within 300 s: .*; submit the run again$"):
        stand_by(run, make_id(0, 7.0), cluster, lambda _: None, clock=clock, sleep=clock.sleep)
    assert WAIT_S < clock.now < WAIT_S + 1.0
    assert [report.state for report in run.submissions.reports()] == ["waiting"], "of that it says nothing"


def test_a_store_that_is_away_meanwhile_may_come_back(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: Any = OneNode()
    clock, submission_id = Clock(), make_id(0, 7.0)
    exists, write = Store.exists, Store.write
    run.submissions.write(SUBMISSION, submission_id)

    def back_after(seconds: float, call: Any) -> Any:
        def away(*args: Any) -> Any:
            if clock.now < seconds:
                raise StorageError("the store is away")
            return call(*args)

        return away

    monkeypatch.setattr(Store, "exists", back_after(50.0, exists))
    monkeypatch.setattr(Store, "write", back_after(100.0, write))
    stand_by(run, submission_id, cluster, lambda _: None, clock=clock, sleep=clock.sleep)
    assert clock.now >= 100.0
    assert run.submissions.is_answered(submission_id)


def test_it_waits_longer_than_a_submitter_counts_on_it(run: RunDirectory) -> None:
    cluster: Any = OneNode()
    clock, submission_id = Clock(), make_id(0, 7.0)
    clock.events[HAND_OVER_S + 50.0] = lambda: run.submissions.write(SUBMISSION, submission_id)
    stand_by(run, submission_id, cluster, lambda _: None, clock=clock, sleep=clock.sleep)


def test_what_is_no_submission(run: RunDirectory) -> None:
    cluster: Any = OneNode()
    with pytest.raises(DescriptionError, match="--submission newest: is no submission"):
        stand_by(run, "newest", cluster, lambda _: None)
    assert cluster.asked == []


def test_outside_of_a_job(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NEEDS_VARIABLE)
    cluster: Any = OneNode()
    with pytest.raises(ClusterError, match="launcher submit sets it, begin this as a job of Ray$"):
        stand_by(run, make_id(0, 7.0), cluster, lambda _: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--standby"], "--standby: waits for a submission; name it with --submission"),
        (["--standby", "--submission", ID], "this machine takes no jobs; give --cluster the HOST:PORT of a Ray head"),
        *((["--standby", "--submission", ID, option], "--standby: is for jobs of submit") for option in FOR_PEOPLE),
    ],
)
def test_by_hand(run: RunDirectory, words: list[str], message: str) -> None:
    ended = CliRunner().invoke(main, ["resume", run.url, *words])
    assert ended.exit_code in (2, 5)
    assert message in ended.stderr
