"""A run that was submitted, watched and steered by its URL: what its directory says, and what its cluster adds."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sleeping import replace_sleep

from cluster.errors import ClusterError, StorageError
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, SubmissionReport, Submissions
from cluster.scheduler import ClusterReport, Job, JobRequest, JobStatus, Needs, Scheduler
from launcher.cli import main, output
from launcher.config import clusters
from launcher.runs.takeover import check_not_driven_since, observe
from launcher.watching import logs, requeued, stop, submitted_job
from launcher.watching.status import LONG_SILENCE_S, SILENCE_S, read_status
from tests import saved
from tests.schedulers import URL
from tests.unit.test_submit import JOB, Said

ON_CLUSTER = ("--cluster", URL)
JOB_ID = "digits-0123456789ab-0"
LOG = "loading\nerror: s3://bucket/code/ab.zip is missing; restore it\nbye\n"


@dataclass
class FakeCluster(Scheduler):
    """A cluster that has the jobs that a test gives it.

    Attributes:
        known: The jobs, by id.
        logs: What they have printed, by id.
        error: Why it does not answer; none: it does.
        at_stop: Called when a job is stopped; returns how that is then.
        asked_to_stop: The jobs that it was asked to stop.
    """

    known: dict[str, Job] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    error: ClusterError | None = None
    at_stop: Callable[[], JobStatus] = lambda: "stopped"
    asked_to_stop: list[str] = field(default_factory=list)

    def put(self, status: JobStatus, job_id: str = JOB_ID, message: str = "", **of: Any) -> None:
        self.known[job_id] = Job(
            id=job_id, status=status, message=message, exit_code=of.pop("exit_code", None), began_at=1e9, metadata=of
        )

    def inspect(self, needs: Needs) -> ClusterReport:
        raise NotImplementedError

    def report(self, job_id: str) -> ClusterReport:
        raise NotImplementedError

    starts_at_once = True

    def begin(self, request: JobRequest) -> Job:
        raise NotImplementedError

    def script(self, request: JobRequest) -> str:
        raise NotImplementedError

    def read(self, job_id: str) -> Job | None:
        self._answer()
        return self.known.get(job_id)

    def jobs(self) -> list[Job]:
        self._answer()
        return [*self.known.values()]

    def stop(self, job_id: str) -> None:
        self._answer()
        self.asked_to_stop.append(job_id)
        self.put(self.at_stop(), job_id)

    def log(self, job_id: str) -> str:
        self._answer()
        return self.logs.get(job_id, "")

    def _answer(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster()
    monkeypatch.setattr(clusters, "open_scheduler", lambda _: fake)
    monkeypatch.setattr(submitted_job, "_STOP_INTERVAL_S", 0.0)
    monkeypatch.setattr(logs, "_INTERVAL_S", 0.0)
    return fake


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """One that was submitted and has not begun."""
    run = RunDirectory(str(tmp_path / "store/digits"))
    submit(run)
    run.write_job(JOB.format(store=tmp_path / "store"))
    return run


OTHER = "http://other:8265"
SUBMITTED_AT = 1_700_000_000.0


def submit(run: RunDirectory, number: int = 0, cluster: str = URL) -> str:
    return run.submissions.write(
        Submission(
            number=number, job=f"{JOB_ID[:-1]}{number}", cluster=cluster, description="x", code_sha256="0" * 64,
            code_directory=None, working_directory="/home/ann", user="ann", host="laptop", time=SUBMITTED_AT,
            versions={}, git=None, claimed=(run.read_status() or {}).get("claimed"),
        )
    )  # fmt: skip


def drive(run: RunDirectory, status: str, step: int = 7, **more: Any) -> None:
    """What the driver of the newest submission, on another host, leaves in the directory of a run."""
    run.take_lease()
    newest = run.submissions.newest()
    assert newest is not None
    run.submissions.mark_taken(newest.id)
    run.write_status({"status": status, "step": step})
    (name,) = run.store.names("drivers")
    written = (run.read_status() or {}) | {"host": "node-1", "pid": 1, "place": "elsewhere"} | more
    run.store.write(name, json.dumps(written).encode())


def launcher(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def document(*arguments: object) -> Any:
    ended = launcher(*arguments, "--json")
    assert ended.exit_code == 0, ended.stderr
    return json.loads(ended.stdout)


def one_error(ended: Result, exit_code: int) -> str:
    assert ended.exit_code == exit_code, ended.output
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


class TestStatus:
    def test_the_directory_tells_who_submitted_it_when_and_where_to(self, run):
        told = document("status", run.url)
        assert {name: told[name] for name in ("status", "job", "cluster", "user", "host", "submitted_at")} == {
            "status": "submitted", "job": JOB_ID, "cluster": URL, "user": "ann", "host": "laptop",
            "submitted_at": 1_700_000_000.0,
        }  # fmt: skip
        lines = launcher("status", run.url).stdout.splitlines()
        assert lines[0] == f"{run.url} is submitted at step 0, epoch 0, 0 samples"
        assert f"  job        {JOB_ID} on {URL}" in lines
        assert "  submitted  by ann from laptop, 2023-11-14 22:13:20 UTC" in lines
        assert any(f"launcher status {run.url} --cluster {URL}  " in line for line in lines)
        assert any(f"launcher stop {run.url} --cluster {URL} " in line for line in lines)

    def test_the_cluster_tells_why_its_job_waits(self, run, cluster):
        cluster.put("pending", message="no room for 1 CPU")
        told = document("status", run.url, *ON_CLUSTER)
        assert (told["status"], told["job_status"], told["job_message"]) == (
            "submitted", "pending", "no room for 1 CPU",
        )  # fmt: skip
        text = launcher("status", run.url, *ON_CLUSTER).stdout
        assert f"  job        {JOB_ID} on {URL}: pending: no room for 1 CPU\n" in text

    @pytest.mark.parametrize(
        ("ended", "exit_code", "log", "status", "error"),
        [
            (
                "failed", 4, LOG, "failed",
                "ended before the run began, with exit code 4: error: s3://bucket/code/ab.zip is missing; restore it",
            ),
            ("failed", None, "", "failed", "ended before the run began: its host is gone"),
            ("succeeded", 0, "done\n", "failed", "ended before the run began, with exit code 0: done"),
            ("stopped", None, "", "stopped", "was stopped before the run began: its host is gone"),
        ],
    )  # fmt: skip
    def test_a_job_that_ended_before_the_run_began(self, run, cluster, ended, exit_code, log, status, error):
        cluster.put(ended, message="its host is gone", exit_code=exit_code)
        cluster.logs[JOB_ID] = log
        told = document("status", run.url, *ON_CLUSTER)
        assert told["status"] == status
        assert told["error"] == (
            f"job {JOB_ID} {error}; `launcher logs {run.url} --cluster {URL}` shows its log; submit the run again"
        )
        assert document("status", run.url)["status"] == "submitted", "the directory alone cannot know"

    def test_a_job_that_has_begun_says_what_it_is_at_for_as_long_as_it_lives(self, run, monkeypatch):
        newest, now, doing = run.submissions.newest(), [SUBMITTED_AT], "trying the job out: waiting for room"
        monkeypatch.setattr(time, "time", lambda: now[0])
        assert document("status", run.url)["waits_for"] is None
        run.submissions.write_sign(newest.id, doing)
        now[0] += SILENCE_S
        told = document("status", run.url)
        assert (told["status"], told["waits_for"], told["error"]) == ("submitted", doing, None)
        now[0] += 1
        told = document("status", run.url)
        assert (told["status"], told["waits_for"]) == ("failed", None)
        assert told["error"] == (
            f"job {JOB_ID} has said nothing for {SILENCE_S + 1:.0f} s, before the run began ({doing}); "
            "submit the run again"
        )
        assert read_status(run, LONG_SILENCE_S)["status"] == "submitted"
        run.submissions.mark_failed(newest.id, "no room")
        assert document("status", run.url)["error"] == (
            f"job {JOB_ID} ended before the run began: no room; submit the run again"
        )

    def test_a_cluster_that_is_gone_takes_nothing_from_what_is_known(self, run, cluster):
        cluster.error = ClusterError(f"{URL}: nobody answers there")
        told = document("status", run.url, *ON_CLUSTER)
        assert (told["status"], told["user"], told["job_status"]) == ("submitted", "ann", None)
        assert told["job_message"] == f"{URL}: nobody answers there"
        assert f"{JOB_ID} on {URL}: {URL}: nobody answers there\n" in launcher("status", run.url, *ON_CLUSTER).stdout

    def test_a_cluster_that_knows_no_such_job(self, run, cluster):
        del cluster
        told = document("status", run.url, *ON_CLUSTER)
        assert told["status"] == "submitted"
        assert told["job_message"] == (
            f"{URL}: knows no job {JOB_ID}; {run.url} was submitted to {URL}: give --cluster that, or submit the run "
            "again"
        )

    @pytest.mark.parametrize("known", [True, False])
    def test_a_job_that_ended_tells_nothing_of_one_on_another_cluster(self, run, cluster, known):
        submit(run, 1, OTHER)
        if known:
            cluster.put("failed", exit_code=4)
        told = document("status", run.url, *ON_CLUSTER)
        assert {name: told[name] for name in ("status", "error", "job", "cluster", "job_status")} == {
            "status": "submitted", "error": None, "job": f"{JOB_ID[:-1]}1", "cluster": OTHER, "job_status": None,
        }  # fmt: skip
        assert told["job_message"].startswith(f"{URL}: job {JOB_ID} is failed; " if known else f"{URL}: knows no job ")
        assert told["job_message"].endswith(f"; the run was submitted to {OTHER} since: give --cluster that")

    @pytest.mark.parametrize("status", ["running", "completed", "stopped", "failed"])
    def test_of_a_run_that_has_begun_the_directory_has_the_word(self, run, cluster, status):
        drive(run, status)
        cluster.put("failed", exit_code=137)
        told = document("status", run.url, *ON_CLUSTER)
        assert (told["status"], told["step"], told["job"], told["job_status"]) == (status, 7, JOB_ID, "failed")

    def test_what_the_job_wrote_before_it_ended_is_seen(self, run, cluster, monkeypatch):
        cluster.put("succeeded", exit_code=0)
        read = cluster.read

        def read_and_end(job_id: str) -> Job | None:
            if run.read_status() is None:
                drive(run, "completed")
            return read(job_id)

        monkeypatch.setattr(cluster, "read", read_and_end)
        assert document("status", run.url, *ON_CLUSTER)["status"] == "completed"

    def test_one_that_is_withdrawn_while_they_are_read(self, run, cluster, monkeypatch):
        withdrawn, read = submit(run, 1), Submissions.read

        def read_late(submissions: Submissions, submission_id: str) -> Submission:
            if submission_id == withdrawn:
                submissions.withdraw(withdrawn)
            return read(submissions, submission_id)

        cluster.put("pending")
        monkeypatch.setattr(Submissions, "read", read_late)
        assert document("status", run.url, *ON_CLUSTER)["job"] == JOB_ID

    def test_one_that_is_taken_while_it_is_looked_at_is_running(self, run, monkeypatch):
        """Its status was read before the driver wrote it, and its submission after."""
        drive(run, "stopped")
        submit(run, 1)
        newest, late = Submissions.newest, iter([True])

        def newest_late(submissions: Submissions) -> SubmissionReport | None:
            if next(late, False):
                drive(run, "running", step=0, updated=time.time())
            return newest(submissions)

        monkeypatch.setattr(Submissions, "newest", newest_late)
        assert read_status(run)["status"] == "running"

    def test_a_driver_that_failed_before_it_took_the_run_says_why_in_the_directory(self, run, cluster):
        newest = run.submissions.newest()
        assert newest is not None
        with pytest.raises(ClusterError), run.submissions.answered(newest.id):
            raise ClusterError("no GPU there")
        told = document("status", run.url)
        assert (told["status"], told["job"]) == ("failed", JOB_ID)
        assert told["error"] == f"job {JOB_ID} ended before the run began: no GPU there; submit the run again"
        text = launcher("status", run.url).stdout
        assert f"launcher logs {run.url} --cluster {URL} " in text
        cluster.put("failed", exit_code=5)
        cluster.logs[JOB_ID] = "error: no GPU there\n"
        told = document("status", run.url, *ON_CLUSTER)
        assert "ended before the run began, with exit code 5: error: no GPU there; `launcher logs" in told["error"]


@pytest.mark.parametrize("verb", ["status", "logs", "stop"])
def test_a_run_that_was_never_submitted_is_no_job(tmp_path, cluster, verb):
    run = RunDirectory(str(tmp_path / "store/digits"))
    run.write_job(JOB.format(store=tmp_path / "store"))
    del cluster
    assert one_error(launcher(verb, run.url, *ON_CLUSTER), 2) == (
        f"{run.url}: was not submitted, so that it is no job of a cluster; leave out --cluster"
    )


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "list"])
@pytest.mark.parametrize(
    ("named", "error"),
    [
        (
            "head:6379",
            r"cluster\.address: head:6379 takes drivers, and no jobs; write http://head:8265, or where else ",
        ),
        (
            "local",
            r"cluster\.kind: local is this machine, which takes no jobs; .* give --cluster the file of a Slurm ",
        ),
        ("no-such", r"--cluster no-such: is no cluster"),
    ],
)
def test_a_cluster_that_takes_no_jobs_is_a_mistake(run, verb, named, error):
    assert re.match(error, one_error(launcher(verb, run.url, "--cluster", named), 2))


def test_only_what_is_submitted_is_waited_for(run):
    error = one_error(launcher("resume", run.url, "--wait"), 2)
    assert error.startswith("--wait: is for a run that is submitted, ")


def test_the_file_of_a_cluster_is_read_once(run, tmp_path, monkeypatch):
    read, reads = clusters.read_text, []

    def read_text(path: Path) -> str:
        reads.append(path)
        return read(path)

    (tmp_path / "lab.yaml").write_text(f"kind: ray\naddress: {URL}\n")
    monkeypatch.setattr(clusters, "read_text", read_text)
    launcher("resume", run.url, "--cluster", tmp_path / "lab.yaml", "--force")
    launcher("plan", tmp_path / "no.yaml", "--cluster", tmp_path / "lab.yaml")
    assert reads == [tmp_path / "lab.yaml"] * 2


def test_ctrl_c_ends_the_wait_also_while_the_store_is_away(run, monkeypatch):
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    def fail(_: RunDirectory) -> Any:
        raise StorageError("nobody answers")

    monkeypatch.setattr("launcher.watching.watch.watch", interrupt)
    monkeypatch.setattr(RunDirectory, "read_status", fail)
    handed_over = {"run": run.url, "job": JOB_ID, "cluster": URL, "status": "submitted"}
    assert output.watch_submitted(handed_over, FakeCluster(), Said()) == (handed_over, 130)


class TestStop:
    def test_one_that_waits_needs_its_cluster(self, run):
        assert one_error(launcher("stop", run.url), 5) == (
            f"{run.url}: has not begun yet; it waits as job {JOB_ID} on {URL}: give --cluster that to stop it"
        )
        assert not run.is_stop_requested()

    def test_one_that_was_submitted_after_its_driver_died_is_not_stopped(self, run, monkeypatch):
        drive(run, "running", updated=time.time() - 600.0)
        submit(run, 1)
        now = [0.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds

        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        replace_sleep(monkeypatch, sleep)
        assert "has not begun yet; it waits as job" in one_error(launcher("stop", run.url), 5)

    @pytest.mark.parametrize("before", ["pending", "running", "stopped"])
    def test_the_job_is_stopped_and_the_run_is_too(self, run, cluster, before):
        cluster.put(before)
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], told["job"], told["user"]) == ("stopped", JOB_ID, "ann")
        assert cluster.asked_to_stop == ([] if before == "stopped" else [JOB_ID])
        assert document("status", run.url)["status"] == "stopped"
        assert [each["status"] for each in document("list", Path(run.url).parent)] == ["stopped"]
        assert not run.is_stop_requested(), "the next driver would stop at once"

    def test_what_begins_it_again_is_not_stopped(self, run, cluster):
        cluster.put("pending")
        launcher("stop", run.url, *ON_CLUSTER)
        drive(run, "running")
        assert document("status", run.url)["status"] == "running"
        drive(run, "failed")
        submit(run, 1)
        assert document("status", run.url)["status"] == "submitted"

    @pytest.mark.parametrize("ended", ["failed", "succeeded"])
    def test_one_whose_job_has_failed_is_left_as_it_is(self, run, cluster, ended):
        cluster.put(ended)
        cluster.logs[JOB_ID] = LOG
        assert document("stop", run.url, *ON_CLUSTER)["status"] == "failed"
        told = document("status", run.url)
        assert (cluster.asked_to_stop, told["status"]) == ([], "failed")
        assert told["error"] == f"job {JOB_ID} ended before the run began: {LOG.splitlines()[1]}; submit the run again"

    def test_what_its_driver_said_of_its_failure_stays(self, run, cluster):
        with pytest.raises(ClusterError), run.submissions.answered(run.submissions.newest().id):
            raise ClusterError("no GPU there")
        cluster.put("failed")
        document("stop", run.url, *ON_CLUSTER)
        assert "no GPU there" in document("status", run.url)["error"]
        cluster.known.clear()
        assert document("stop", run.url, *ON_CLUSTER)["status"] == "failed"

    def test_one_whose_job_its_cluster_does_not_know_is_stopped(self, run, cluster):
        assert document("stop", run.url, *ON_CLUSTER)["status"] == "stopped"
        assert (cluster.asked_to_stop, document("status", run.url)["status"]) == ([], "stopped")

    def test_one_whose_job_another_cluster_does_not_know_is_left_as_it_is(self, run, cluster):
        del cluster
        assert f"{OTHER}: knows no job {JOB_ID}; " in one_error(launcher("stop", run.url, "--cluster", OTHER), 5)
        assert document("status", run.url)["status"] == "submitted"

    def test_one_that_is_driven_is_asked_through_its_directory(self, run, cluster, monkeypatch):
        cluster.put("running")
        drive(run, "running")
        written = run.read_status()

        def request_stop(directory: RunDirectory) -> None:
            assert written is not None
            directory.store.write(
                directory.store.names("drivers")[0], json.dumps(written | {"status": "stopped"}).encode()
            )

        monkeypatch.setattr(RunDirectory, "request_stop", request_stop)
        monkeypatch.setattr(stop, "_INTERVAL_S", 0.0)
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], told["step"], cluster.asked_to_stop) == ("stopped", 7, [])

    @pytest.mark.parametrize("as_what", ["stopped", "completed"])
    def test_a_driver_that_took_it_meanwhile_has_the_word(self, run, cluster, as_what):
        def save_and_end() -> JobStatus:
            drive(run, as_what)
            return "stopped"

        cluster.put("running")
        cluster.at_stop = save_and_end
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], told["step"]) == (as_what, 7)
        newest = run.submissions.newest()
        assert newest is not None
        assert newest.state == "taken"

    def test_it_is_not_waited_for_without_end(self, run, cluster):
        cluster.put("pending")
        cluster.at_stop = lambda: "pending"
        error = one_error(launcher("stop", run.url, *ON_CLUSTER, "--timeout", "0"), 5)
        assert error.startswith(f"{URL}: job {JOB_ID} is pending, and has not ended since it was asked to stop; ")
        assert document("status", run.url)["status"] == "submitted"

    @pytest.mark.parametrize("where", [URL, OTHER])
    def test_a_submission_that_came_meanwhile_is_not_stopped(self, run, cluster, where):
        def submit_again() -> JobStatus:
            submit(run, 1, where)
            return "stopped"

        cluster.put("pending")
        cluster.at_stop = submit_again
        error = one_error(launcher("stop", run.url, *ON_CLUSTER), 5)
        assert error == (
            f"{run.url}: has not begun yet; it waits as job {JOB_ID[:-1]}1 on {where}: give --cluster that to stop it"
        )

    @pytest.mark.parametrize("ended", ["failed", "succeeded", "stopped"])
    def test_one_that_waits_on_another_cluster_too_is_not_stopped(self, run, cluster, ended):
        submit(run, 1, OTHER)
        cluster.put(ended)
        error = one_error(launcher("stop", run.url, *ON_CLUSTER), 5)
        assert error.endswith(f" it waits as job {JOB_ID[:-1]}1 on {OTHER}: give --cluster that to stop it")

    @pytest.mark.parametrize("status", ["failed", "stopped"])
    def test_what_goes_on_with_the_run_has_the_word(self, run, status):
        """A person resumes it elsewhere, and the submission that came to nothing counts no more."""
        newest = run.submissions.newest()
        assert newest is not None
        run.submissions.mark_stopped(newest.id)
        run.take_lease()
        run.write_status({"status": status, "step": 9})
        assert document("status", run.url)["step"] == 9

    def test_a_cluster_that_is_away_says_so(self, run, cluster):
        cluster.error = ClusterError(f"{URL}: nobody answers there")
        assert one_error(launcher("stop", run.url, *ON_CLUSTER), 5) == f"{URL}: nobody answers there"

    @pytest.mark.parametrize("is_away", [True, False])
    @pytest.mark.parametrize("status", ["completed", "stopped", "failed", "running"])
    def test_one_that_has_ended_is_left_to_a_cluster_that_starts_no_job_again(self, run, cluster, status, is_away):
        """The job may still finish the run of the tracker; and the driver of one that is "running" is lost."""
        drive(run, status, updated=time.time() - 600.0)
        cluster.put("running")
        cluster.error = ClusterError(f"{URL}: nobody answers there") if is_away else None
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], cluster.asked_to_stop) == ("failed" if status == "running" else status, [])


class TestStopLost:
    """A run whose driver is lost, or has written how it ended, and whose job its scheduler starts again."""

    @pytest.fixture(autouse=True)
    def _has_a_queue(self, cluster, monkeypatch):
        monkeypatch.setattr(cluster, "starts_at_once", False)

    @pytest.fixture(autouse=True)
    def now(self, monkeypatch):
        """The time, which passes while a command sleeps."""
        now = [0.0]

        def sleep(_: float) -> None:
            now[0] += 2.0

        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        replace_sleep(monkeypatch, sleep)
        return now

    @pytest.mark.parametrize("status", ["stopped", "failed"])
    def test_a_job_whose_driver_wrote_the_end_may_end_by_itself(self, run, cluster, status, now, monkeypatch):
        drive(run, status)
        cluster.put("running")
        read = cluster.read

        def read_and_end(job_id: str) -> Job | None:
            if now[0] >= 10.0:
                cluster.put("succeeded")
            return read(job_id)

        monkeypatch.setattr(cluster, "read", read_and_end)
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], cluster.asked_to_stop) == (status, [])

    @pytest.mark.parametrize(("job", "waited_s"), [("pending", 0.0), ("running", 20.0)])
    def test_else_it_is_stopped(self, run, cluster, job, waited_s, now):
        drive(run, "failed")
        cluster.put(job)
        document("stop", run.url, *ON_CLUSTER)
        assert (cluster.asked_to_stop, now[0]) == ([JOB_ID], waited_s)

    @pytest.mark.parametrize("before", ["pending", "running"])
    @pytest.mark.parametrize("status", ["running", "stopped", "failed"])
    def test_its_job_is_stopped(self, run, cluster, status, before):
        drive(run, status, updated=time.time() - 600.0)
        cluster.put(before)
        told = document("stop", run.url, *ON_CLUSTER)
        ended = "failed" if status == "failed" else "stopped"
        assert (cluster.asked_to_stop, told["status"], told["step"]) == ([JOB_ID], ended, 7)
        assert document("status", run.url)["status"] == ended

    def test_it_is_once_the_driver_counts_as_lost(self, run, cluster, monkeypatch):
        drive(run, "running", updated=time.time())
        cluster.put("pending")
        monkeypatch.setattr(RunDirectory, "request_stop", lambda _: drive(run, "running", updated=time.time() - 600.0))
        assert document("stop", run.url, *ON_CLUSTER)["status"] == "stopped"
        assert cluster.asked_to_stop == [JOB_ID]

    @pytest.mark.parametrize(
        ("status", "began_s", "told"),
        [("pending", 0.0, "requeued"), ("running", 600.0, "requeued"), ("running", -600.0, "failed")],
        ids=["waits", "runs again", "runs, and its driver says nothing"],
    )
    def test_one_whose_own_job_starts_it_again_counts_as_requeued(self, run, cluster, status, began_s, told):
        drive(run, "running", updated=time.time() - 600.0)
        cluster.put(status, message="try 2")
        cluster.known[JOB_ID] = replace(cluster.known[JOB_ID], began_at=time.time() + began_s)
        found = document("status", run.url, *ON_CLUSTER)
        assert (found["status"], found["job"], found["job_status"]) == (told, JOB_ID, status)
        (listed,) = document("list", Path(run.url).parent, *ON_CLUSTER)
        assert (listed["status"], listed.get("job_status")) == (told, status if told == "requeued" else None)
        if told == "requeued":
            assert found["error"] is None
            line = "nothing saved yet before its driver was lost; its scheduler starts it again"
            assert line in launcher("status", run.url, *ON_CLUSTER).stdout.splitlines()

    @pytest.mark.parametrize("job", ["failed", None])
    @pytest.mark.parametrize("status", ["running", "stopped", "failed"])
    def test_one_whose_job_is_over_is_left_as_it_is(self, run, cluster, status, job):
        drive(run, status, updated=time.time() - 600.0)
        if job is not None:
            cluster.put(job)
        lease = run.store.names("drivers")
        told = document("stop", run.url, *ON_CLUSTER)
        assert told["status"] == ("stopped" if status == "stopped" else "failed")
        assert (cluster.asked_to_stop, run.store.names("drivers")) == ([], lease)

    @pytest.mark.parametrize("status", ["running", "completed"])
    def test_one_that_is_driven_or_complete_keeps_its_job(self, run, cluster, status, monkeypatch):
        drive(run, status, updated=time.time())
        cluster.put("running")
        monkeypatch.setattr(RunDirectory, "request_stop", lambda _: drive(run, "stopped"))
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], cluster.asked_to_stop) == ("completed" if status == "completed" else "stopped", [])


class TestRequeued:
    """A run whose batch job has ended early, and starts again."""

    @pytest.fixture(autouse=True)
    def _requeued(self, run):
        drive(run, "requeued", requeued="at the time limit of its job", saved_step=3, error=None)
        saved.save(run.checkpoints, 7, {"model.bin": b"m"})

    def test_the_directory_says_so(self, run):
        told = document("status", run.url)
        assert {name: told[name] for name in ("status", "step", "saved_step", "job", "cluster", "user", "error")} == {
            "status": "requeued", "step": 7, "saved_step": 7, "job": JOB_ID, "cluster": URL, "user": "ann",
            "error": None,
        }  # fmt: skip
        lines = launcher("status", run.url).stdout.splitlines()
        assert lines[0].startswith(f"{run.url} is requeued at step 7")
        assert lines[2] == "saved at step 7 at the time limit of its job; its scheduler starts it again"
        assert any(f"launcher stop {run.url} --cluster {URL} " in line for line in lines)
        assert [each["status"] for each in document("list", Path(run.url).parent)] == ["requeued"]
        assert " requeued " in launcher("list", Path(run.url).parent).stdout

    @pytest.mark.parametrize("status", ["pending", "running"])
    def test_the_cluster_says_when_it_starts_again(self, run, cluster, status):
        cluster.put(status, message="it may start at 12:00")
        told = document("status", run.url, *ON_CLUSTER)
        assert (told["status"], told["job_status"], told["job_message"]) == (
            "requeued", status, "it may start at 12:00",
        )  # fmt: skip
        (listed,) = document("list", Path(run.url).parent, *ON_CLUSTER)
        assert (listed["status"], listed["job_status"]) == ("requeued", status)

    def test_a_job_that_has_ended_starts_nothing(self, run, cluster):
        cluster.put("failed", exit_code=75)
        cluster.logs[JOB_ID] = "launcher: not requeued, after 100 tries\n"
        told = document("status", run.url, *ON_CLUSTER)
        assert (told["status"], told["saved_step"]) == ("stopped", 7)
        assert told["error"].startswith(
            f"job {JOB_ID} ended at step 7, with exit code 75: launcher: not requeued, after 100 tries; "
        )
        (listed,) = document("list", Path(run.url).parent, *ON_CLUSTER)
        assert listed["status"] == "stopped"
        assert document("status", run.url)["status"] == "requeued", "the directory alone cannot know"

    def test_nor_does_one_that_the_cluster_has_forgotten(self, run, cluster):
        del cluster
        told = document("status", run.url, *ON_CLUSTER)
        assert (told["status"], told["job_status"]) == ("stopped", None)
        assert told["error"] == (
            f"{URL}: does not know job {JOB_ID} any more, which was to start the run again; submit the run again"
        )
        (listed,) = document("list", Path(run.url).parent, *ON_CLUSTER)
        assert (listed["status"], listed["error"]) == ("stopped", told["error"])

    def test_a_cluster_that_is_away_or_another_one_says_nothing_of_it(self, run, cluster):
        def statuses(*options: str) -> list[str]:
            (listed,) = document("list", Path(run.url).parent, *options)
            return [document("status", run.url, *options)["status"], listed["status"]]

        cluster.error = ClusterError(f"{URL}: nobody answers there")
        assert statuses(*ON_CLUSTER) == ["requeued"] * 2
        cluster.error = None
        assert statuses("--cluster", OTHER) == ["requeued"] * 2

    def test_to_stop_it_its_cluster_is_needed(self, run):
        assert one_error(launcher("stop", run.url), 5) == (
            f"{run.url}: waits for its scheduler to start it again; it was submitted to {URL}: give --cluster that to "
            "stop it"
        )
        assert document("status", run.url)["status"] == "requeued"

    @pytest.mark.parametrize("exit_code", [0, 1, 2, 5, 137, None])
    def test_a_next_try_that_has_failed_is_no_stop(self, run, cluster, exit_code):
        cluster.put("succeeded" if exit_code == 0 else "failed", exit_code=exit_code)
        cluster.logs[JOB_ID] = LOG
        told = document("status", run.url, *ON_CLUSTER)
        assert told["status"] == "failed"
        assert "code/ab.zip is missing; restore it" in told["error"]
        assert [each["status"] for each in document("list", Path(run.url).parent, *ON_CLUSTER)] == ["failed"]
        assert document("stop", run.url, *ON_CLUSTER)["status"] == "failed"
        told = document("status", run.url)
        assert (told["status"], told["step"], told["saved_step"]) == ("failed", 7, 7)
        assert "code/ab.zip is missing; restore it" in told["error"]
        assert run.events().read()[-1]["kind"] == "failed"

    @pytest.mark.parametrize("exit_code", [75, 130, 143])
    def test_one_that_was_told_to_end_is(self, run, cluster, exit_code):
        cluster.put("failed", exit_code=exit_code)
        assert document("status", run.url, *ON_CLUSTER)["status"] == "stopped"
        assert document("stop", run.url, *ON_CLUSTER)["status"] == "stopped"
        told = document("status", run.url)
        assert (told["status"], told["error"]) == ("stopped", None)

    @pytest.mark.parametrize("before", ["pending", "running", "stopped", None])
    def test_then_its_job_is_stopped_and_the_run_is_too(self, run, cluster, before):
        if before is not None:
            cluster.put(before)
        told = document("stop", run.url, *ON_CLUSTER)
        assert told["status"] == "stopped"
        assert cluster.asked_to_stop == ([JOB_ID] if before in ("pending", "running") else [])
        told = document("status", run.url)
        assert (told["status"], told["step"], told["saved_step"], told["requeued"]) == ("stopped", 7, 7, None)
        assert run.events().read()[-1]["kind"] == "stopped"
        assert not run.is_stop_requested(), "the next driver would stop at once"

    @pytest.mark.parametrize("left_there", [None, "failed", "pending"])
    def test_one_that_waits_for_a_job_on_another_cluster_is_not(self, run, cluster, left_there):
        submit(run, 1, OTHER)
        drive(run, "requeued", step=9)
        if left_there is not None:
            cluster.put(left_there)
        error = one_error(launcher("stop", run.url, *ON_CLUSTER), 5)
        assert "waits for its scheduler to start it again" in error
        assert OTHER in error
        assert document("status", run.url)["status"] == "requeued"

    def test_its_job_is_that_which_has_taken_it(self, run):
        submit(run, 1, OTHER)
        run.take_lease()  # the next try of the first job
        run.write_status({"status": "requeued", "step": 9})
        told = document("status", run.url)
        assert (told["status"], told["job"], told["cluster"]) == ("requeued", JOB_ID, URL)

    def test_a_driver_that_comes_meanwhile_keeps_it(self, run, monkeypatch):
        read = requeued.read_without_checkpoints

        def read_and_drive(directory: RunDirectory, silence_s: float) -> dict[str, Any]:
            told = read(directory, silence_s)
            drive(run, "running", step=9)
            return told

        monkeypatch.setattr(requeued, "read_without_checkpoints", read_and_drive)
        requeued.end_requeued(run)
        assert (run.read_status() or {})["status"] == "running"

    def test_a_driver_that_plans_meanwhile_leaves_it(self, run, cluster):
        cluster.put("pending")
        observed = observe(run)
        document("stop", run.url, *ON_CLUSTER)
        with pytest.raises(ClusterError, match="has driven it since this process looked at it"):
            check_not_driven_since(run, observed, take_over=False)

    def test_one_that_has_started_meanwhile_is_asked_as_usual(self, run, cluster, monkeypatch):
        """The next try takes the run just as the command has seen it requeued, and a person drives it elsewhere."""

        def takes_it() -> JobStatus:
            drive(run, "running")
            return "stopped"

        def request_stop(directory: RunDirectory) -> None:
            written = directory.read_status() or {}
            directory.store.write(
                directory.store.names("drivers")[0], json.dumps(written | {"status": "stopped", "step": 9}).encode()
            )

        monkeypatch.setattr(RunDirectory, "request_stop", request_stop)
        cluster.put("running")
        cluster.at_stop = takes_it
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], told["step"]) == ("stopped", 9)

    def test_one_that_is_requeued_as_it_is_asked_is_stopped_too(self, run, cluster, monkeypatch):
        drive(run, "running", updated=time.time())
        cluster.put("running")
        monkeypatch.setattr(RunDirectory, "request_stop", lambda _: drive(run, "requeued", step=9))
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], told["step"], cluster.asked_to_stop) == ("stopped", 9, [JOB_ID])

    def test_one_that_is_requeued_on_its_way_out_is_stopped(self, run, cluster):
        """The next try saves, and its script does not requeue it, because it was asked to stop."""

        def saves() -> JobStatus:
            drive(run, "requeued", step=9)
            return "failed"

        cluster.put("running")
        cluster.at_stop = saves
        told = document("stop", run.url, *ON_CLUSTER)
        assert (told["status"], told["step"]) == ("stopped", 9)

    @pytest.mark.parametrize("named", [True, False])
    def test_its_logs_are_followed_to_the_end_of_the_run(self, run, cluster, monkeypatch, named):
        cluster.put("pending", message="it may start at 12:00")
        looks = 0

        def sleep(_: float) -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                drive(run, "running", updated=time.time())
                cluster.put("running")
            if looks == 5:
                drive(run, "completed")
                cluster.put("succeeded")
            assert looks < 10

        replace_sleep(monkeypatch, sleep)
        ended = launcher("logs", run.url, "-f", *(ON_CLUSTER if named else ()))
        assert (ended.exit_code, looks) == (0, 5), ended.stderr
        assert ended.stderr.splitlines() == [
            f"warning: {run.url}: job {JOB_ID} is pending: it may start at 12:00" if named else
            f"warning: {run.url}: waits for its scheduler to start it again; it waits as job {JOB_ID} on {URL}: give "
            "--cluster that to follow the job"
        ]  # fmt: skip

    def test_nor_for_ever_if_its_cluster_says_nothing(self, run, cluster, monkeypatch):
        now = [0.0]

        def sleep(_: float) -> None:
            now[0] += 2.0
            assert now[0] < 3600

        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        replace_sleep(monkeypatch, sleep)
        cluster.error = ClusterError(f"{URL}: nobody answers there")
        ended = launcher("logs", run.url, "-f", *ON_CLUSTER)
        assert (ended.exit_code, now[0]) == (5, 602)
        assert "is requeued, and its cluster has told nothing of job" in ended.stderr.splitlines()[-1]

    def test_nor_further_than_its_job(self, run, cluster, monkeypatch):
        replace_sleep(monkeypatch, lambda _: cluster.put("stopped"))
        cluster.put("pending")
        assert launcher("logs", run.url, "-f", *ON_CLUSTER).exit_code == 0

    def test_one_that_nobody_submitted(self, tmp_path, monkeypatch):
        run = RunDirectory(str(tmp_path / "store/other"))
        run.write_description(JOB.format(store=tmp_path / "store"), {})
        run.take_lease()
        run.write_status({"status": "requeued", "step": 7})
        assert one_error(launcher("stop", run.url), 5) == (
            f"{run.url}: waits for its scheduler to start it again; cancel its batch job there"
        )
        replace_sleep(monkeypatch, lambda _: run.write_status({"status": "completed", "step": 7}))
        ended = launcher("logs", run.url, "-f")
        assert ended.stderr == f"warning: {run.url}: waits for its scheduler to start it again\n"


SLURM = "slurm:me@login"


class TestNamedByItsFile:
    """No text advises a value of --cluster that cannot be typed."""

    @pytest.fixture(autouse=True)
    def _on_slurm(self, run, tmp_path, cluster):
        submit(run, 1, SLURM)
        (tmp_path / "lab.yaml").write_text("kind: slurm\nlogin: me@login\npartition: gpu\nnodes: {cpus: 8}\n")
        self.on_slurm = ("--cluster", tmp_path / "lab.yaml")
        self.run, self.cluster = run, cluster

    def _texts(self) -> list[str]:
        verbs = [("status",), ("stop",), ("stop", *ON_CLUSTER), ("status", *ON_CLUSTER), ("status", *self.on_slurm)]
        ended = [launcher(verb, self.run.url, *options) for verb, *options in verbs]
        return [each.stdout + each.stderr for each in ended]

    @pytest.mark.parametrize("begun", [False, True])
    @pytest.mark.parametrize("job", ["pending", "failed", None])
    def test_in_what_the_verbs_say(self, begun, job):
        if begun:
            drive(self.run, "requeued")
        if job is not None:
            self.cluster.put(job, f"{JOB_ID[:-1]}1")
        texts = self._texts()
        assert [text for text in texts if f"--cluster {SLURM}" in text or "it was submitted to, slurm" in text] == []
        assert f"{SLURM}: give --cluster its file to stop it\n" in texts[1]
        if job is None:
            assert f"{SLURM} since: give --cluster its file" in texts[3]
        if job == "failed":
            assert f"`launcher logs {self.run.url} --cluster CLUSTER` shows its log" in texts[4]

    def test_in_what_logs_waits_for(self, monkeypatch):
        replace_sleep(monkeypatch, lambda _: drive(self.run, "completed"))
        ended = launcher("logs", self.run.url, "-f")
        assert ended.stderr.endswith(f" on {SLURM}: give --cluster its file to follow the job\n")


class TestLogs:
    @pytest.fixture(autouse=True)
    def _two_logs(self, run, cluster):
        drive(run, "failed")
        run.write_log(0, 0, b"worker zero\n")
        run.write_log(0, 1, b"worker one\n")
        cluster.put("failed")
        cluster.logs[JOB_ID] = LOG

    def test_that_of_the_job_comes_last(self, run):
        ended = launcher("logs", run.url, *ON_CLUSTER)
        assert (ended.exit_code, ended.stdout) == (0, f"worker zero\nworker one\n{LOG}")
        assert ended.stderr.splitlines()[-1] == f"--- job {JOB_ID}"
        assert launcher("logs", run.url).stdout == "worker zero\nworker one\n"

    def test_those_of_one_worker_are_of_no_driver(self, run):
        assert launcher("logs", run.url, "--worker", 1, *ON_CLUSTER).stdout == "worker one\n"

    @pytest.mark.parametrize("follow", [(), ("-f",)])
    def test_a_cluster_that_is_gone_takes_none_of_the_workers(self, run, cluster, follow):
        cluster.error = ClusterError(f"{URL}: nobody answers there")
        ended = launcher("logs", run.url, *ON_CLUSTER, *follow)
        assert (ended.exit_code, ended.stdout) == (5, "worker zero\nworker one\n")
        assert ended.stderr.splitlines()[-1] == f"error: {URL}: nobody answers there"


class TestFollow:
    def test_a_job_that_fails_before_the_run_begins_ends_it(self, run, cluster, monkeypatch):
        cluster.put("pending")
        looks = 0

        def sleep(_: float) -> None:
            nonlocal looks
            looks += 1
            cluster.error = ClusterError(f"{URL}: nobody answers there") if looks == 2 else None
            if looks == 1:
                cluster.put("running")
                cluster.logs[JOB_ID] = "loading\n"
            if looks == 4:
                cluster.put("failed", exit_code=4)
                cluster.logs[JOB_ID] = LOG
            assert looks < 10

        replace_sleep(monkeypatch, sleep)
        ended = launcher("logs", run.url, "-f", *ON_CLUSTER)
        assert (ended.exit_code, ended.stdout, looks) == (0, LOG, 4)
        assert ended.stderr.splitlines() == [
            f"warning: {run.url}: job {JOB_ID} is pending",
            f"--- job {JOB_ID}",
            f"warning: {URL}: nobody answers there; asking again",
            f"--- job {JOB_ID}",
        ]

    @pytest.fixture
    def now(self, monkeypatch) -> list[float]:
        """The time, which passes only while the command sleeps; an hour at most."""
        now = [0.0]

        def sleep(_: float) -> None:
            now[0] += 2.0
            assert now[0] < 3600

        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        replace_sleep(monkeypatch, sleep)
        return now

    @pytest.mark.parametrize(
        ("error", "why"),
        [(ClusterError(f"{URL}: nobody answers there"), "nobody answers there"), (None, f"knows no job {JOB_ID}; ")],
    )
    def test_a_job_of_which_nothing_is_known_before_the_run_begins_is_not_waited_for_without_end(
        self, run, cluster, now, error, why
    ):
        cluster.error = error
        ended = launcher("logs", run.url, "-f", *ON_CLUSTER)
        assert ended.exit_code == 5
        first, last = ended.stderr.splitlines()
        assert first.startswith(f"warning: {URL}: {why}")
        assert first.endswith("; asking again")
        assert last.startswith(
            f"error: {run.url}: is submitted, and its cluster has told nothing of job {JOB_ID} for 10 minutes: "
            f"{URL}: {why}"
        )
        assert 600 < now[0] < 610

    def test_a_cluster_that_is_away_does_not_end_the_logs_of_a_run_that_goes_on(self, run, cluster, now, monkeypatch):
        drive(run, "running")
        cluster.error = ClusterError(f"{URL}: nobody answers there")
        sleep = time.sleep

        def sleep_and_end(seconds: float) -> None:
            sleep(seconds)
            if now[0] == 900:
                cluster.error = None
                cluster.put("succeeded")
                cluster.logs[JOB_ID] = LOG
                drive(run, "completed")

        replace_sleep(monkeypatch, sleep_and_end)
        ended = launcher("logs", run.url, "-f", *ON_CLUSTER)
        assert (ended.exit_code, ended.stdout, now[0]) == (0, LOG, 900)
        assert ended.stderr.splitlines() == [
            f"warning: {URL}: nobody answers there; asking again",
            f"--- job {JOB_ID}",
        ]

    def test_a_long_log_of_a_job_is_asked_for_more_rarely(self, run, cluster, now, monkeypatch):
        """A cluster gives it only whole."""
        drive(run, "running")
        cluster.put("running")
        cluster.logs[JOB_ID] = "loading\n"
        asked_at, log, sleep = [], cluster.log, time.sleep

        def log_and_note(job_id: str) -> str:
            asked_at.append(now[0])
            return log(job_id)

        def sleep_and_print(seconds: float) -> None:
            sleep(seconds)
            if now[0] == 6:
                cluster.logs[JOB_ID] += f"{'x' * 99}\n" * 10_000
            if now[0] == 60:
                cluster.logs[JOB_ID] += "bye\n"
                cluster.put("succeeded")
                drive(run, "completed")

        monkeypatch.setattr(cluster, "log", log_and_note)
        replace_sleep(monkeypatch, sleep_and_print)
        ended = launcher("logs", run.url, "-f", *ON_CLUSTER)
        assert (ended.exit_code, ended.stdout) == (0, cluster.logs[JOB_ID])
        assert asked_at == [0, 2, 4, 6, 26, 46, 60]

    def test_without_a_cluster_it_says_what_a_run_that_has_not_begun_waits_for(self, run, now, monkeypatch):
        sleep = time.sleep

        def sleep_and_end(seconds: float) -> None:
            sleep(seconds)
            if now[0] == 900:
                drive(run, "completed")

        replace_sleep(monkeypatch, sleep_and_end)
        ended = launcher("logs", run.url, "-f")
        assert (ended.exit_code, now[0]) == (0, 900)
        assert ended.stderr == (
            f"warning: {run.url}: has not begun; it waits as job {JOB_ID} on {URL}: give --cluster that to follow the "
            "job\n"
        )

    def test_the_last_words_of_the_job_come_after_the_end_of_the_run(self, run, cluster, monkeypatch):
        cluster.put("running")
        drive(run, "failed")

        def sleep(_: float) -> None:
            assert not cluster.logs, "it has ended"
            cluster.put("failed", exit_code=1)
            cluster.logs[JOB_ID] = LOG

        replace_sleep(monkeypatch, sleep)
        assert launcher("logs", run.url, "-f", *ON_CLUSTER).stdout == LOG


class TestQueue:
    """A cluster whose jobs wait in a queue."""

    @pytest.fixture(autouse=True)
    def _has_a_queue(self, cluster, monkeypatch):
        monkeypatch.setattr(cluster, "starts_at_once", False)
        self.slept: list[float] = []

    def test_it_is_asked_every_ten_seconds_for_logs(self, run, cluster, monkeypatch):
        def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            drive(run, "completed")
            cluster.put("succeeded")

        replace_sleep(monkeypatch, sleep)
        cluster.put("pending")
        assert launcher("logs", run.url, "-f", *ON_CLUSTER).exit_code == 0
        assert self.slept == [10.0]

    def test_and_for_the_end_of_a_job_that_is_stopped(self, run, cluster, monkeypatch):
        def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            cluster.put("stopped")

        replace_sleep(monkeypatch, sleep)
        cluster.put("pending")
        cluster.at_stop = lambda: "running"
        assert document("stop", run.url, *ON_CLUSTER)["status"] == "stopped"
        assert self.slept == [10.0]


class TestList:
    def test_the_cluster_tells_of_what_has_not_begun(self, run, cluster, tmp_path):
        other = RunDirectory(str(tmp_path / "store/other"))
        submit(other)
        other.write_job("x")
        drive(other, "running")
        cluster.put("failed", message="no such node", run=run.url)
        cluster.put("running", "other-0", run=other.url)
        told = {each["run"]: each for each in document("list", tmp_path / "store", *ON_CLUSTER)}
        assert (told[run.url]["status"], told[run.url]["error"]) == ("failed", "no such node")
        assert told[other.url]["status"] == "running"
        assert [each["status"] for each in document("list", tmp_path / "store")] == ["submitted", "running"]

    def test_one_that_is_torn_hides_no_other_run(self, run, tmp_path):
        drive(run, "stopped")
        run.store.write(f"submissions/{submit(run, 1)}.json", b'{"numb')
        submit(RunDirectory(str(tmp_path / "store/other")))
        torn, other = document("list", tmp_path / "store")
        assert (torn["status"], torn["step"], other["status"]) == ("failed", 7, "submitted")
        assert torn["error"].endswith(".json: is missing or torn; submit the run again")

    def test_jobs_that_wait_for_runs_of_other_stores(self, run, cluster, tmp_path):
        cluster.put("pending", message="no room", run=run.url, user="ann", host="laptop")
        cluster.put("running", "busy-0", run="s3://bucket/busy")
        cluster.put("pending", "notebook")  # of somebody who has no launcher
        (tmp_path / "empty").mkdir()
        (waiting,) = document("list", tmp_path / "empty", *ON_CLUSTER)
        assert {name: waiting[name] for name in ("run", "status", "job", "job_status", "user", "host", "cluster")} == {
            "run": run.url, "status": "submitted", "job": JOB_ID, "job_status": "pending", "user": "ann",
            "host": "laptop", "cluster": URL,
        }  # fmt: skip
        header, line = launcher("list", tmp_path / "empty", *ON_CLUSTER).stdout.splitlines()
        assert header.endswith("  job")
        assert re.match(rf"digits +submitted +0 .*  {JOB_ID} on {URL}: pending: no room$", line)
        (own,) = document("list", tmp_path / "store", *ON_CLUSTER)
        assert (own["run"], own["job_status"]) == (run.url, "pending")

    def test_a_job_whose_submission_is_not_written_yet_is_no_run(self, run, cluster, tmp_path):
        (tmp_path / "empty").mkdir()
        submission_id = submit(run)
        cluster.put("pending", run=run.url, submission=submission_id)
        cluster.put("pending", "standby-0", run=str(tmp_path / "store/refused"), submission=submission_id)
        (waiting,) = document("list", tmp_path / "empty", *ON_CLUSTER)
        assert waiting["run"] == run.url

    def test_a_cluster_that_is_away_is_a_warning(self, run, cluster, tmp_path):
        cluster.error = ClusterError(f"{URL}: nobody answers there")
        ended = launcher("list", tmp_path / "store", *ON_CLUSTER, "--json")
        assert (ended.exit_code, ended.stderr) == (0, f"warning: {URL}: nobody answers there\n")
        assert [each["run"] for each in json.loads(ended.stdout)] == [run.url]
