"""An array: a run for each number, handed over together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.capacity import Places
from cluster.errors import ClusterError, StorageError
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission
from cluster.scheduler import Job, JobRequest
from launcher.cli import main
from launcher.submission import handover, submit, submitting
from tests.schedulers import FakeQueue
from tests.specs import TRIED
from tests.unit.test_submit import JOB

CLUSTER = "kind: slurm\nlogin: me@login\npartition: gpu\nnodes: {cpus: 8}\narray: 0-2%2\n"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> FakeQueue:
    """A cluster; the dry run needs torch and seconds, and is not what these tests are about."""
    queue = FakeQueue()
    monkeypatch.setattr("launcher.config.clusters.open_scheduler", lambda _: queue)
    monkeypatch.setattr(submitting, "try_job", lambda *_: TRIED)
    monkeypatch.setattr(handover, "_ASK_AGAIN_S", 0.0)
    return queue


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "digits.yaml").write_text(JOB.format(store=tmp_path / "store"))
    (tmp_path / "uni.yaml").write_text(CLUSTER)
    return tmp_path / "store"


def launcher(verb: str, store: Path, *more: str) -> Result:
    return CliRunner().invoke(
        main, [verb, str(store.parent / "digits.yaml"), "--cluster", str(store.parent / "uni.yaml"), *more]
    )


def waiting(store: Path, number: int) -> list[str]:
    """The ids of a run's submissions."""
    return [report.id for report in RunDirectory(f"{store}/digits-{number}").submissions.reports()]


def test_each_number_is_a_run_with_that_seed(queue, store) -> None:
    ended = launcher("submit", store, "--json")
    assert ended.exit_code == 0, ended.stderr
    documents = json.loads(ended.stdout)
    assert [document["run"] for document in documents] == [f"{store}/digits-{number}" for number in range(3)]
    assert {document["status"] for document in documents} == {"submitted"}
    (array,) = queue.arrays
    for number, request in array.items():
        found = RunDirectory(f"{store}/digits-{number}").submissions.read_newest()
        assert found is not None
        assert (found[0].id, found[1].job) == (request.metadata["submission"], request.id)
        assert f"seed: {number}\n" in found[1].description
        assert f"name: digits-{number}\n" in found[1].description
    assert len({request.id for request in array.values()}) == 3


def test_those_that_are_there_already_are_left_alone(queue, store) -> None:
    launcher("submit", store)
    job_id = queue.arrays[0][1].id
    queue.known[job_id] = "failed"
    ended = launcher("submit", store, "--json")
    assert [*queue.arrays[1]] == [1]
    assert [document["job"] for document in json.loads(ended.stdout)][0::2] == [
        queue.arrays[0][number].id for number in (0, 2)
    ]
    assert queue.arrays[1][1].id != job_id


def test_one_that_is_refused_leaves_nothing(queue, store) -> None:
    queue.refusal = "slurm:me@login: does not take the array: Invalid account"
    ended = launcher("submit", store)
    assert (ended.exit_code, queue.refusal in ended.stderr) == (5, True)
    assert [waiting(store, number) for number in range(3)] == [[], [], []]


def test_an_answer_that_is_lost_may_have_begun_it(queue, store) -> None:
    queue.breaks = 2
    ended = launcher("submit", store)
    assert ended.exit_code == 5
    assert "nobody answers; jobs of the array may have begun, submit it again to see" in ended.stderr
    assert [len(waiting(store, number)) for number in range(3)] == [1, 1, 1]
    assert json.loads(launcher("submit", store, "--json").stdout)[0]["status"] == "submitted"
    assert [len(waiting(store, number)) for number in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("has_any", [True, False, ClusterError("nobody answers"), KeyboardInterrupt()])
def test_ctrl_c_while_it_is_begun_leaves_submissions_for_jobs_that_may_run(queue, store, monkeypatch, has_any) -> None:
    """The cluster may not say whether it has any, or not before a second Ctrl-C. Its jobs may be named later."""

    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    def say(_: object) -> bool:
        if isinstance(has_any, BaseException):
            raise has_any
        return has_any

    monkeypatch.setattr(queue, "begin_array", interrupt)
    monkeypatch.setattr(queue, "has_any", say)
    ended = launcher("submit", store)
    assert ended.exit_code == 130
    assert ("may have begun" in ended.stderr) == (has_any is not False)
    assert [len(waiting(store, number)) for number in range(3)] == [int(has_any is not False)] * 3


@pytest.mark.parametrize(("error", "exit_code"), [(StorageError("the store is away"), 4), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("fails", ["note", "documents"])
def test_an_error_once_it_has_begun_leaves_the_submissions(queue, store, monkeypatch, fails, error, exit_code) -> None:
    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr(submit._Array, fails, fail)
    ended = launcher("submit", store)
    assert (ended.exit_code, len(queue.arrays)) == (exit_code, 1)
    assert "; jobs of the array may have begun, submit it again to see" in ended.stderr
    assert [len(waiting(store, number)) for number in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("verb", ["submit", "render"])
def test_ctrl_c_while_one_is_tried_out_leaves_nothing(queue, store, monkeypatch, verb) -> None:
    tried = [TRIED, TRIED]

    def try_or_interrupt(*_: object) -> Any:
        if not tried:
            raise KeyboardInterrupt
        return tried.pop()

    monkeypatch.setattr(submitting, "try_job", try_or_interrupt)
    assert launcher(verb, store).exit_code == 130
    assert (tried, queue.arrays) == ([], [])
    assert [waiting(store, number) for number in range(3)] == [[], [], []]


def test_one_that_somebody_else_submits_meanwhile_is_left_to_them(queue, store, monkeypatch) -> None:
    """Task 0 while the array is begun, so that their job has its name; task 1 while it is tried out."""
    theirs, begin = {"run": "x", "submission": "theirs"}, queue.begin_array

    def begin_later(requests: dict[int, JobRequest]) -> dict[int, Job]:
        queue.sbatch(replace(requests[0], metadata=theirs))
        return begin(requests)

    offer = handover.HandOver.offer

    def offer_or_lose(self: handover.HandOver, submission: Submission, places: Places) -> JobRequest:
        if "digits-1-" in submission.job:
            raise handover.OvertakenError(submission.job)
        return offer(self, submission, places)

    monkeypatch.setattr(queue, "begin_array", begin_later)
    monkeypatch.setattr(handover.HandOver, "offer", offer_or_lose)
    ended = launcher("submit", store, "--json")
    assert ended.exit_code == 0, ended.stderr
    assert [*queue.arrays[0]] == [0, 2]
    assert [len(waiting(store, number)) for number in range(3)] == [0, 0, 1]
    documents = json.loads(ended.stdout)
    assert [document["job"].rpartition("-")[0].rpartition("-")[0] for document in documents] == [
        f"digits-{number}" for number in range(3)
    ]
    assert documents[2]["status"] == "submitted"
    assert ended.stderr.count("the run was submitted by somebody else at the same time, as job digits-") == 2


def test_its_script(queue, store) -> None:
    ended = launcher("render", store)
    assert ended.exit_code == 0, ended.stderr
    assert [line[:2] for line in ended.stdout.splitlines()[1:]] == ["0)", "1)", "2)"]
    assert queue.arrays == []
    assert [len(waiting(store, number)) for number in range(3)] == [1, 1, 1]
    document = json.loads(launcher("render", store, "--json").stdout)
    assert [*document] == ["runs", "script"]
    launcher("submit", store)
    again = launcher("render", store)
    assert (again.exit_code, "each run of the array has a job already" in again.stderr) == (5, True)


def test_it_has_no_one_run_to_wait_for(queue, store) -> None:
    ended = launcher("submit", store, "--wait")
    assert (ended.exit_code, "--wait: shows one run" in ended.stderr) == (2, True)
    assert (queue.arrays, store.exists()) == ([], False)


@pytest.mark.parametrize("verb", ["submit", "render"])
def test_a_seed_beside_it_is_refused(queue, store, verb) -> None:
    ended = launcher(verb, store, "seed=5")
    assert (ended.exit_code, queue.arrays, store.exists()) == (2, [], False)
    assert ended.stderr == (
        "error: command line: seed=5: each task of cluster.array has its number as its seed; leave out seed\n"
    )
