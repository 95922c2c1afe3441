"""Watching a run that was submitted, with a clock of its own."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError, StorageError
from cluster.run.run_directory import RunDirectory
from cluster.scheduler import Job
from launcher.watching import watch as watch_module
from launcher.watching.watch import watch
from tests.unit.test_submit import JOB, Said

RUNNING = {"status": "running", "step": 7, "epoch": 0, "metrics": {}, "workers": 2, "total_steps": 10}


class Cluster:
    """Tells of a job what a test has written down, one answer after the other; the last one stays."""

    starts_at_once = False

    def __init__(self, *answers: Job | ClusterError | None) -> None:
        self._answers = list(answers)

    def read(self, _: str) -> Job | None:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, ClusterError):
            raise answer
        return answer

    def log(self, _: str) -> str:
        return "a\nerror: no such thing\nb\n"


def a_job(status: Any, exit_code: int | None = None) -> Job:
    return Job(id="own-0", status=status, message="", exit_code=exit_code, began_at=None, metadata={})


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    run = RunDirectory(str(tmp_path / "run"))
    run.write_job(JOB.format(store=tmp_path))

    def look(
        cluster: Cluster, *statuses: dict[str, Any] | StorageError, job_id: str | None = "own-0"
    ) -> tuple[dict[str, Any], int, float, Said]:
        now, said, left = [0.0], Said(), list(statuses)

        def read_status(*_: Any) -> dict[str, Any]:
            status = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(status, StorageError):
                raise status
            return status

        monkeypatch.setattr(watch_module, "read_status", read_status)

        def sleep(seconds: float) -> None:
            now[0] += seconds
            assert now[0] < 3600

        scheduler: Any = cluster
        document, code = watch(run, job_id, scheduler, said, clock=lambda: now[0], sleep=sleep)
        return document, code, now[0], said

    return look


def test_a_cluster_that_is_away_does_not_matter_while_the_run_goes_on(watched):
    cluster = Cluster(ClusterError("away"))
    document, code, _, _ = watched(cluster, *[RUNNING] * 100, RUNNING | {"status": "completed", "step": 10})
    assert (document["step"], code) == (10, 0)


def test_a_job_that_is_killed_on_a_host_far_away_is_told_within_half_a_minute(watched):
    with pytest.raises(ClusterError, match="job own-0 ended at step 7: error: no such thing; submit the run") as caught:
        watched(Cluster(a_job("running"), a_job("failed")), RUNNING)
    assert caught.value.document is not None
    assert caught.value.document["status"] == "failed"


@pytest.mark.parametrize(
    ("status", "job", "code"),
    [
        ("failed", a_job("failed", 3), 3),
        ("failed", a_job("failed"), 1),
        ("failed", a_job("failed", -9), 1),
        ("failed", a_job("running"), 1),
        ("failed", ClusterError("away"), 1),
        ("failed", None, 1),
        ("stopped", a_job("failed", 130), 130),
        ("stopped", a_job("succeeded", 0), 0),
        ("completed", a_job("running"), 0),
    ],
)
def test_the_exit_code_is_that_of_the_command_which_drove_the_run(watched, status, job, code):
    assert watched(Cluster(job), RUNNING, RUNNING | {"status": status})[1] == code


REQUEUED = RUNNING | {"status": "requeued"}


def test_a_run_that_is_requeued_is_watched_until_its_job_goes_on(watched):
    pending = replace(a_job("pending", 75), message="it may start at 12:00")
    *_, waited_s, said = watched(
        Cluster(a_job("running"), pending), *[REQUEUED] * 100, RUNNING, RUNNING | {"status": "completed"}
    )
    assert waited_s >= 200
    assert said.phases[-1] == "job own-0 is pending: it may start at 12:00"


@pytest.mark.parametrize(
    ("job", "code"),
    [(a_job("failed", 75), 130), (a_job("stopped"), 0), (a_job("failed", 5), 5), (a_job("failed"), 1)],
    ids=["too many tries", "cancelled", "the next try has failed", "killed"],
)
def test_one_whose_job_has_ended_is_stopped_or_failed(watched, job, code):
    document, exit_code, _, _ = watched(Cluster(job), REQUEUED)
    assert (document["status"], exit_code) == ("stopped" if code in (0, 130) else "failed", code)
    assert document["error"].startswith(f"job own-0 {'was stopped' if job.status == 'stopped' else 'ended'} at step 7")


def test_one_whose_cluster_is_away_is_not_watched_without_end(watched):
    with pytest.raises(ClusterError, match="is requeued, and its cluster has not answered for 10 minutes: away; see"):
        watched(Cluster(a_job("pending"), ClusterError("away")), REQUEUED)


def test_nor_one_that_a_job_of_another_cluster_is_to_start_again(watched):
    nobody = ClusterError("not asked")
    document, code, waited_s, _ = watched(Cluster(nobody), RUNNING, REQUEUED, job_id=None)
    assert (document["status"], code) == ("requeued", 75)
    assert 600 < waited_s < 700
    again = [*[REQUEUED] * 200, RUNNING, *[REQUEUED] * 200, RUNNING | {"status": "stopped"}]
    assert watched(Cluster(nobody), *again, job_id=None)[1] == 0


LOST = RUNNING | {"status": "failed", "error": "says nothing", "claimed": 1e9}


def test_a_run_whose_driver_is_lost_is_watched_until_its_job_goes_on(watched):
    again = [replace(a_job("pending"), message="try 2"), replace(a_job("running"), began_at=2e9)]
    cluster = Cluster(a_job("running"), ClusterError("away"), again[0], again[0], again[1])
    _, code, waited_s, said = watched(cluster, RUNNING, *[LOST] * 100, RUNNING, RUNNING | {"status": "completed"})
    assert code == 0
    assert waited_s >= 200
    assert said.phases == ["job own-0 is running", "job own-0 is pending: try 2", "job own-0 is running"]


@pytest.mark.parametrize(
    ("answer", "limit_s"),
    [(a_job("failed"), 30), (replace(a_job("running"), began_at=1e8), 700), (None, 30), (ClusterError("away"), 700)],
    ids=["ended", "hangs", "unknown", "away"],
)
def test_else_it_has_failed(watched, answer, limit_s):
    document, code, waited_s, _ = watched(Cluster(answer), LOST)
    assert (document["status"], document["error"], code) == ("failed", "says nothing", 1)
    assert waited_s < limit_s


@pytest.mark.parametrize("answer", [a_job("running"), ClusterError("away")])
def test_it_has_failed_at_once_on_a_cluster_that_starts_no_job_again(watched, answer):
    cluster = Cluster(answer)
    cluster.starts_at_once = True
    document, code, waited_s, said = watched(cluster, RUNNING, LOST)
    assert (document["status"], document["error"], code) == ("failed", "says nothing", 1)
    assert (waited_s < 30, said.phases) == (True, [])


def test_one_whose_job_is_not_known_any_more_is_an_error(watched):
    with pytest.raises(ClusterError, match="the cluster does not know job own-0 any more; submit the run again"):
        watched(Cluster(None), REQUEUED)


def test_a_driver_whose_clock_is_behind_is_watched_to_its_end(tmp_path):
    run, now = RunDirectory(str(tmp_path / "run")), [0.0]
    run.write_job(JOB.format(store=tmp_path))
    run.take_lease()

    def write(status: str) -> None:
        (name,) = run.store.names("drivers")
        elsewhere = {"place": "elsewhere", "status": status, "step": 7, "updated": time.time() - 600.0 + now[0]}
        run.store.write(name, json.dumps((run.read_status() or {}) | elsewhere).encode())

    def sleep(seconds: float) -> None:
        now[0] += seconds
        write("stopped" if now[0] > 60.0 else "running")

    write("running")
    cluster: Any = Cluster(a_job("running"))
    document, code = watch(run, "own-0", cluster, Said(), clock=lambda: now[0], sleep=sleep)
    assert (document["status"], code) == ("stopped", 0)


def test_a_job_that_waits_says_why(watched):
    submitted = {"status": "submitted", "step": 0}
    document, code, waited_s, _ = watched(Cluster(a_job("pending")), *[submitted] * 50, RUNNING | {"status": "stopped"})
    assert (document["status"], code) == ("stopped", 0)
    assert waited_s >= 100


def test_a_job_that_runs_and_has_not_begun_the_run_says_what_it_is_at(watched):
    submitted = {"status": "submitted", "step": 0, "waits_for": "trying the job out: waiting for room"}
    *_, said = watched(Cluster(a_job("running")), *[submitted] * 3, RUNNING | {"status": "completed"})
    assert said.phases == ["job own-0 is running: trying the job out: waiting for room"]


def test_a_run_that_waits_for_workers_says_for_which_and_then_how_far_it_is(watched):
    waits = [RUNNING | {"waits_for": f"there is room for {n} of at least 2 workers"} for n in (0, 0, 1)]
    *_, said = watched(Cluster(a_job("running")), *waits, RUNNING, RUNNING | {"status": "completed"})
    assert said.phases == [
        "waiting for workers: there is room for 0 of at least 2 workers",
        "waiting for workers: there is room for 1 of at least 2 workers",
    ]


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (a_job("failed", 4), "job own-0 ended before the run began, with exit code 4: error: no such thing; submit"),
        (None, "job own-0 ended before the run began: no code; submit"),
        (ClusterError("away"), "job own-0 ended before the run began: no code; submit"),
    ],
)
def test_a_driver_that_failed_before_it_took_the_run_ends_it(watched, job, why):
    error = "job own-0 ended before the run began: no code; submit the run again"
    failed = {"status": "failed", "step": 0, "begun": False, "error": error}
    with pytest.raises(ClusterError, match=why) as caught:
        watched(Cluster(job), {"status": "submitted", "step": 0}, failed)
    assert caught.value.document is not None
    assert caught.value.document["status"] == "failed"


SUBMITTED = {"status": "submitted", "step": 0}


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([a_job("pending"), None], "the cluster does not know job own-0 any more; submit the run again"),
        ([None], "the cluster does not know job own-0 any more; submit the run again"),
        ([a_job("pending"), ClusterError("http://head: nobody answers")], "not answered for 10 minutes: http://head: "),
    ],
)
def test_a_cluster_that_is_lost_before_the_run_begins_ends_the_wait(watched, answers, why):
    with pytest.raises(ClusterError, match=why) as caught:
        watched(Cluster(*answers), SUBMITTED)
    assert caught.value.document is not None
    assert caught.value.document["status"] == "failed"


def test_a_cluster_that_comes_back_is_waited_for(watched):
    away = [ClusterError("away")] * 50
    cluster = Cluster(a_job("pending"), *away, a_job("pending"), *away, a_job("running"))
    assert watched(cluster, *[SUBMITTED] * 600, RUNNING | {"status": "stopped"})[1] == 0


def test_a_run_that_somebody_else_goes_on_with_is_watched_to_its_end(watched):
    signs = [RUNNING | {"updated": float(number)} for number in range(100)]
    document, code, waited_s, _ = watched(Cluster(a_job("failed", 5)), *signs, RUNNING | {"status": "completed"})
    assert (document["status"], code) == ("completed", 0)
    assert waited_s >= 190


def test_what_the_driver_wrote_last_before_it_was_killed_is_no_sign_of_somebody_else(watched):
    signs = [RUNNING | {"updated": 1.0}, RUNNING | {"updated": 2.0}]
    with pytest.raises(ClusterError, match="job own-0 ended at step 7"):
        watched(Cluster(a_job("failed", -9)), *signs)


def test_a_store_that_is_away_for_a_while_is_waited_for(watched):
    away, ended = [StorageError("s3://b/r: nobody answers")] * 100, RUNNING | {"status": "stopped"}
    _, code, _, said = watched(Cluster(a_job("running")), *away, RUNNING, *away, ended)
    assert code == 0
    assert said.warnings == ["s3://b/r: nobody answers; trying again for 10 minutes"] * 2
    with pytest.raises(StorageError, match="nobody answers; the run may go on"):
        watched(Cluster(a_job("running")), RUNNING, away[0])


def test_a_store_may_be_away_from_the_first_moment(watched, monkeypatch):
    read_job, away = RunDirectory.read_job, [StorageError("s3://b/r: nobody answers")] * 3

    def read_job_if_it_answers(run: RunDirectory) -> str:
        if away:
            raise away.pop()
        return read_job(run)

    monkeypatch.setattr(RunDirectory, "read_job", read_job_if_it_answers)
    assert watched(Cluster(a_job("running")), RUNNING | {"status": "stopped"})[1] == 0
