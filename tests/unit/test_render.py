"""The batch script that a person hands over: all of a submission is there, and the run is found as if submitted."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.errors import ClusterError, DescriptionError
from cluster.run.submissions import Submissions
from cluster.spec.ray import RayClusterSpec
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec
from launcher.cli import main
from launcher.config.description import Description, parse
from launcher.submission import submitting as submitting_module
from launcher.submission.handover import OvertakenError
from launcher.submission.job_command import make_job_id
from launcher.submission.submit import render, submit
from launcher.watching.status import read_status
from launcher.watching.submitted_job import submitted_job
from tests import saved
from tests.launcher_without_ray import Machine
from tests.schedulers import URL, FakeQueue, FakeScheduler
from tests.specs import TRIED
from tests.unit.test_submit import JOB, Said, newest_of, run_of, take_newest

SLURM = SlurmClusterSpec(login="me@login", partition="gpu", nodes=SlurmNodesSpec(cpus=8), env=("TOKEN",))
WHERE = "slurm:me@login"
CLUSTER = "kind: slurm\nlogin: me@login\npartition: gpu\nnodes: {cpus: 8}\n"


@pytest.fixture(autouse=True)
def _tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial needs torch and seconds, and is not what these tests are about."""
    monkeypatch.setattr(submitting_module, "try_job", lambda *_: TRIED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "job"
    path.mkdir()
    return path


@pytest.fixture
def job(tmp_path: Path) -> Description:
    return parse(JOB.format(store=tmp_path / "store"), "digits.yaml")


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue()


def rendered(job: Description, folder: Path, queue: FakeQueue, said: Said | None = None) -> dict[str, Any]:
    return render(job, folder, queue, SLURM, said or Said())


def submissions_of(job: Description) -> list[str]:
    return [report.id for report in run_of(job).submissions.reports()]


def test_it_is_the_script_of_the_job_that_submit_would_begin(job, folder, queue):
    (folder / "mine.py").write_text("x = 1\n")
    said, run = Said(), run_of(job)
    document = rendered(job, folder, queue, said)
    report, submission = newest_of(run)
    assert document == {
        "run": run.url, "job": make_job_id(run.url, 0), "cluster": WHERE, "status": "submitted",
        "script": f"#!/bin/bash\n#SBATCH --job-name={make_job_id(run.url, 0)}\n{queue.requests[0].command}\n",
    }  # fmt: skip
    assert (submission.job, submission.cluster, submission.description) == (document["job"], WHERE, job.text)
    assert b"mine.py" in run.read_code(submission.code_sha256)
    assert (queue.known, queue.commands) == ({}, []), "nothing is handed over"
    assert said.messages[-1].startswith("prepared digits: ")
    assert read_status(run)["status"] == "submitted"

    submit(job, folder, queue, SLURM, Said())
    told, asked = queue.requests
    assert asked.command == told.command.replace(report.id, asked.metadata["submission"])
    assert (asked.id, asked.places, asked.variables) == (told.id, told.places, told.variables)
    assert submissions_of(job) == [asked.metadata["submission"]], "and what was rendered before is replaced"


def test_the_run_is_found_once_the_script_is_handed_over(job, folder, queue):
    rendered(job, folder, queue)
    queue.sbatch(queue.requests[0])
    told = submitted_job(run_of(job), queue, WHERE).document()
    assert (told["status"], told["job_status"], told["job"]) == ("submitted", "pending", queue.requests[0].id)


def test_a_second_one_replaces_the_first(job, folder, queue, monkeypatch):
    rendered(job, folder, queue)
    (first,) = submissions_of(job)
    changed = parse(job.text, "digits.yaml", ["seed=1"])
    said = Said()
    second = rendered(changed, folder, queue, said)
    assert "changed seed: 0 -> 1" in said.messages
    assert (second["job"], len(submissions_of(job))) == (make_job_id(run_of(job).url, 0), 1)
    assert newest_of(run_of(job))[1].description == changed.text

    monkeypatch.setattr("launcher.config.clusters.open_cluster", lambda _: Machine(2))
    ended = launcher("resume", run_of(job).url, "--submission", first, "--inspect", "--json", "--cluster", "head:6379")
    assert ended.exit_code == 5, "and no code with which a job requeues itself"
    why = (
        f"{run_of(job).url}: submission {first} was withdrawn, or another one replaced it before this job started; "
        "nothing is left to do for this job"
    )
    assert (ended.stderr, json.loads(ended.stdout)["error"]) == (f"error: {why}\n", why)


@pytest.mark.parametrize("again", [rendered, submit])
def test_one_that_is_handed_over_while_the_next_is_tried_out_stays(job, folder, queue, monkeypatch, again):
    rendered(job, folder, queue)
    first = submissions_of(job)

    def try_later(*_: Any) -> Any:
        queue.sbatch(queue.requests[0])
        return TRIED

    monkeypatch.setattr(submitting_module, "try_job", try_later)
    if again is rendered:
        with pytest.raises(OvertakenError, match="was submitted by somebody else at the same time, as job"):
            rendered(job, folder, queue)
    else:
        assert submit(job, folder, queue, SLURM, Said())["job"] == queue.requests[0].id
    assert submissions_of(job) == first


def test_two_people_at_once_leave_each_other_alone(job, folder, queue, monkeypatch):
    """The job that begins first has the run."""
    write, others = Submissions.write, list[str]()

    def write_both(submissions: Submissions, *args: Any) -> str:
        monkeypatch.setattr(Submissions, "write", write)
        rendered(job, folder, queue)
        others.extend(submissions_of(job))
        return write(submissions, *args)

    monkeypatch.setattr(Submissions, "write", write_both)
    rendered(job, folder, queue)
    assert len(submissions_of(job)) == 2
    submissions = run_of(job).submissions
    submissions.mark_taken(others[0])
    (mine,) = set(submissions_of(job)) - {*others}
    assert submissions.standing(mine) == "superseded"


def test_one_that_a_job_takes_meanwhile_stays(job, folder, queue, monkeypatch):
    """Then the script that is printed is for nothing, and its job says so."""
    rendered(job, folder, queue)
    (first,) = submissions_of(job)
    write = Submissions.write

    def write_later(submissions: Submissions, *args: Any) -> str:
        submissions.mark_taken(first)
        return write(submissions, *args)

    monkeypatch.setattr(Submissions, "write", write_later)
    rendered(job, folder, queue)
    (second,) = set(submissions_of(job)) - {first}
    assert run_of(job).submissions.standing(second) == "superseded"


def test_one_that_somebody_else_submits_meanwhile_is_theirs(job, folder, queue, monkeypatch):
    def try_meanwhile(*_: Any) -> Any:
        monkeypatch.setattr(submitting_module, "try_job", lambda *_: TRIED)
        submit(job, folder, queue, SLURM, Said())
        return TRIED

    monkeypatch.setattr(submitting_module, "try_job", try_meanwhile)
    with pytest.raises(OvertakenError, match="was submitted by somebody else at the same time, as job "):
        rendered(job, folder, queue)
    assert len(submissions_of(job)) == 1


class TestNothingIsPrinted:
    @pytest.mark.parametrize("status", ["pending", "running"])
    def test_while_a_job_of_the_run_is_there(self, job, folder, queue, status):
        rendered(job, folder, queue)
        queue.sbatch(queue.requests[0])
        queue.known[queue.requests[0].id] = status
        said, run, job_id = Said(), run_of(job), queue.requests[0].id
        with pytest.raises(ClusterError) as caught:
            rendered(parse(job.text, "digits.yaml", ["seed=1"]), folder, queue, said)
        assert str(caught.value) == (
            f"{run.url} is there already, job {job_id} is {status}; stop it with `launcher stop {run.url}`"
        )
        assert caught.value.document == {"run": run.url, "job": job_id, "cluster": WHERE, "status": "submitted"}
        assert said.warnings == ["not changed: seed: 0 -> 1"]
        assert (len(queue.requests), len(submissions_of(job))) == (1, 1)

    def test_of_a_run_that_is_complete(self, job, folder, queue):
        run = run_of(job)
        run.write_job(job.text)
        run.take_lease()
        run.write_status({"status": "completed", "step": 3})
        with pytest.raises(ClusterError, match="is complete; nothing to do") as caught:
            rendered(job, folder, queue)
        assert caught.value.document is not None
        assert (caught.value.document["status"], caught.value.document["job"]) == ("completed", None)
        assert submissions_of(job) == []

    def test_of_a_run_at_its_last_step(self, job, folder, queue):
        limited = parse(job.text, "digits.yaml", ["train.max_steps=5"])
        rendered(limited, folder, queue)
        run = run_of(job)
        take_newest(run)
        run.write_job(limited.text)
        run.take_lease()
        saved.save(run.checkpoints, 5, {"model.safetensors": b""})
        run.write_status({"status": "stopped", "step": 5})
        with pytest.raises(ClusterError, match=r"has reached train\.max_steps=5; raise it to go on"):
            rendered(limited, folder, queue)
        assert len(queue.requests) == 1

    def test_if_the_script_cannot_be_written(self, job, folder, queue):
        queue.refusal = f"{WHERE}: workers.num=[1,9]: a job takes at most 4 nodes"
        with pytest.raises(ClusterError) as caught:
            rendered(job, folder, queue)
        assert str(caught.value) == queue.refusal
        assert submissions_of(job) == []
        assert not run_of(job).is_known()

    def test_of_a_cluster_that_takes_commands(self, job, folder, tmp_path):
        said = Said()
        with pytest.raises(DescriptionError) as caught:
            render(job, folder, FakeScheduler(), RayClusterSpec(address=URL), said)
        assert str(caught.value) == f"{URL}: takes commands, and no scripts; use launcher submit"
        assert (said.phases, (tmp_path / "store").exists()) == ([], False), "before it is tried out"


def launcher(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


class TestTheCommand:
    @pytest.fixture
    def words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: FakeQueue) -> list[str]:
        """Of the command."""
        (tmp_path / "digits.yaml").write_text(JOB.format(store=tmp_path / "store"))
        (tmp_path / "lab.yaml").write_text(CLUSTER)
        monkeypatch.setattr("launcher.config.clusters.open_scheduler", lambda _: queue)
        return ["render", str(tmp_path / "digits.yaml"), "seed=3", "--cluster", str(tmp_path / "lab.yaml")]

    def test_stdout_is_the_script_and_nothing_else(self, words, queue, tmp_path):
        ended = launcher(*words)
        assert (ended.exit_code, ended.stdout) == (
            0, f"#!/bin/bash\n#SBATCH --job-name={queue.requests[0].id}\n{queue.requests[0].command}\n",
        )  # fmt: skip
        assert "prepared digits: " in ended.stderr
        assert "seed: 3\n" in newest_of(run_of(parse(JOB.format(store=tmp_path / "store"), "a")))[1].description

    def test_json(self, words, queue):
        document = json.loads(launcher(*words, "--json").stdout)
        assert list(document) == ["run", "job", "cluster", "status", "script"]
        assert (document["job"], document["cluster"]) == (queue.requests[0].id, WHERE)

    def test_a_job_that_is_there_already(self, words, queue):
        launcher(*words)
        queue.sbatch(queue.requests[0])
        ended = launcher(*words)
        assert (ended.exit_code, ended.stdout) == (5, "")
        assert f"error: {queue.requests[0].metadata['run']} is there already, job " in ended.stderr
        document = json.loads(launcher(*words, "--json").stdout)
        assert (document["status"], document["job"]) == ("submitted", queue.requests[0].id)

    def test_it_is_told_which_cluster(self, words):
        ended = launcher(*words[:-2])
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert "Missing option '--cluster'" in ended.stderr
