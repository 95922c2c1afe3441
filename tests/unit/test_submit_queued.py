"""Submitting to a cluster whose jobs wait in a queue and bring their own nodes: all is checked before a job is begun.

``test_submit`` has what such a cluster shares with one whose jobs start at once.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity import Places, WorkerResources
from cluster.errors import ClusterError, DescriptionError, Interrupted, LauncherError
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submissions, make_id
from cluster.scheduler import Job, JobRequest, JobStatus
from cluster.spec.ray import RayClusterSpec
from cluster.spec.slurm import SlurmClusterSpec, SlurmNodesSpec
from cluster.spec.worker import WorkerSpec
from launcher.config.clusters import load_cluster
from launcher.config.description import ClusterOverride, Description, parse
from launcher.display.tables import plan_text
from launcher.planning.plan import Plan
from launcher.submission import handover as hand_over_module
from launcher.submission import submit as submit_module
from launcher.submission import submitting as submitting_module
from launcher.submission.job_command import make_job_id
from launcher.submission.submit import plan_there, submit, submit_again
from launcher.watching.status import read_status
from tests.schedulers import FakeQueue, a_cluster, a_node
from tests.specs import TRIED
from tests.unit.test_submit import JOB, Said, newest_of, run_of, take_newest

SLURM = SlurmClusterSpec(login="me@login", partition="gpu", nodes=SlurmNodesSpec(cpus=8))
WHERE = "slurm:me@login"
TWO_NODES = a_cluster(a_node("n1", CPU=8.0), a_node("n2", CPU=8.0))


@pytest.fixture(autouse=True)
def _tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial needs torch and seconds, and is not what these tests are about."""
    monkeypatch.setattr(submitting_module, "try_job", lambda *_: TRIED)
    monkeypatch.setattr(submit_module, "try_job", lambda *_: TRIED)
    monkeypatch.setattr(hand_over_module, "_ASK_AGAIN_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "job"
    path.mkdir()
    return path


@pytest.fixture
def job(tmp_path: Path) -> Description:
    return parse(JOB.format(store=tmp_path / "store") + "train: {shards: 32}\n", "digits.yaml")


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue(TWO_NODES)


def hand_over(
    job: Description, folder: Path, queue: FakeQueue, said: Said | None = None, place: SlurmClusterSpec = SLURM
) -> dict[str, Any]:
    return submit(job, folder, queue, place, said or Said())


def changed(job: Description, *overrides: str) -> Description:
    return parse(job.text, "digits.yaml", overrides)


def test_what_is_written_and_asked_for(job, folder, queue, monkeypatch):
    monkeypatch.setenv("SEED", "7")
    (folder / "mine.py").write_text("x = 1\n")
    job = changed(job, "seed=${oc.decode:${oc.env:SEED}}")
    place, said = replace(SLURM, env=("TOKEN",), stop_grace_s=900), Said()
    result = hand_over(job, folder, queue, said, place)
    run = run_of(job)
    report, submission = newest_of(run)
    job_id = make_job_id(run.url, 0)
    assert result == {"run": run.url, "job": job_id, "cluster": WHERE, "status": "submitted"}
    assert (report.number, report.state, submission.job, submission.cluster) == (0, "waiting", job_id, WHERE)
    assert b"mine.py" in run.read_code(submission.code_sha256)
    (request,) = queue.requests
    assert request == JobRequest(
        id=job_id,
        command=f"exec launcher resume {run.url} --submission {report.id} --inspect --json "
        """--cluster "$RAY_ADDRESS" 'cluster.env=["TOKEN", "SEED"]'""",
        environment={},
        stop_grace_s=900,
        metadata={"run": run.url, "submission": report.id, "user": submission.user, "host": submission.host},
        places=Places(resources=WorkerResources(cpus=1.0, gpus=0, accelerator=None), least=2, most=2, placement="pack"),
        variables=("TOKEN", "SEED"),
    )
    assert said.phases == ["trying the job out", f"looking at the nodes of {WHERE}", f"beginning {job_id}"]


def test_its_driver_gets_the_variables_and_what_the_cluster_says_of_workers(job, folder, queue):
    place = replace(SLURM, env=("A", "B"), worker=WorkerSpec(cpus=2.0, placement="spread"))
    wanted = changed(job, *map(ClusterOverride, place.worker.overrides()), "workers.cpus=1.5")
    hand_over(wanted, folder, queue, place=place)
    words = shlex.split(queue.commands[0])
    spec, changes = load_cluster("10.0.0.1:6379", words[words.index("$RAY_ADDRESS") + 1 :])
    worker = WorkerSpec(placement="spread")
    assert spec == RayClusterSpec(address="10.0.0.1:6379", env=("A", "B"), worker=worker)
    workers = parse(newest_of(run_of(job))[1].description, "job.yaml", changes).spec.workers
    assert (workers.cpus, workers.placement) == (1.5, "spread")
    assert queue.requests[0].places == Places(
        resources=WorkerResources(cpus=1.5, gpus=0, accelerator=None), least=2, most=2, placement="spread"
    )


@pytest.mark.parametrize(
    ("change", "gpus", "least", "most"),
    [("workers.num=8", 1, 8, 8), ("workers.num=9", 0, 9, 9), ("workers.num=[2,12]", 1, 2, 12)],
)
def test_what_workers_get_follows_from_what_slurm_reports(job, folder, change, gpus, least, most):
    kind = {"accelerator_type:A100": 1.0}
    queue = FakeQueue(a_cluster(a_node("n1", GPU=4.0, **kind), a_node("n2", GPU=4.0, **kind)))
    said, place = Said(), replace(SLURM, nodes=SlurmNodesSpec(cpus=8, gpus=4, accelerator="A100"))
    hand_over(changed(job, change), folder, queue, said, place)
    places = queue.requests[0].places
    assert (places.resources.gpus, places.least, places.most) == (gpus, least, most)
    assert [warning.partition(": ")[0] for warning in said.warnings] == ["this cluster has 8 GPUs for 9 workers"] * (
        not gpus
    )
    hand_over(changed(job, "name=other", "workers.num=2", "workers.accelerator=A100"), folder, queue, place=place)
    assert queue.requests[1].places.resources.accelerator == "A100"


def test_what_the_cluster_warns_of_is_shown(job, folder, queue):
    queue.has = replace(queue.has, warnings=("preempted jobs do not come back",))
    said, planned, job = Said(), Said(), changed(job, "workers.gpus=0")
    hand_over(job, folder, queue, said)
    plan_there(changed(job, "name=other"), folder, queue, SLURM, planned)
    assert said.warnings == planned.warnings == ["preempted jobs do not come back"]


REFUSALS = {
    "more workers than the partition holds": (
        ["workers.num=17"],
        f"{WHERE}: digits.yaml: workers.num must be at most 16 on this cluster: so many workers of 1 CPU fit on its 2 "
        "nodes, got 17; add nodes, or lower workers.num. There is n1 with 8 CPU, 0 GPU, n2 with 8 CPU, 0 GPU",
    ),
    "a worker that no node holds": (
        ["workers.cpus=9"],
        f"{WHERE}: digits.yaml: workers.num must be at most 0 on this cluster: so many workers of 9 CPU fit on its 2 "
        "nodes, got 2; add nodes, or lower workers.num. There is n1 with 8 CPU, 0 GPU, n2 with 8 CPU, 0 GPU",
    ),
    "GPUs where there are none": (
        ["workers.gpus=1"],
        f"{WHERE}: digits.yaml: workers.gpus=1 for 2 workers needs 2 GPUs, and this cluster has 0; lower workers.num "
        "or set workers.gpus=0. There is n1 with 8 CPU, 0 GPU, n2 with 8 CPU, 0 GPU",
    ),
    "an accelerator that no node has": (
        ["workers.accelerator=H100"],
        f"{WHERE}: digits.yaml: workers.num must be at most 0 on this cluster: so many workers of 1 CPU, H100 fit on "
        "its 2 nodes, got 2; add nodes, or lower workers.num. There is n1 with 8 CPU, 0 GPU, n2 with 8 CPU, 0 GPU",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_written(job, folder, tmp_path, queue, what):
    changes, message = REFUSALS[what]
    with pytest.raises(ClusterError) as caught:
        hand_over(changed(job, *changes), folder, queue)
    assert str(caught.value) == message
    assert caught.value.document == {"run": run_of(job).url, "job": None, "cluster": WHERE}
    assert (queue.requests, (tmp_path / "store").exists()) == ([], False)


@pytest.mark.parametrize("at", ["try_job", "inspect_cluster", "check_nodes", "find_next_job"])
@pytest.mark.parametrize("error", [DescriptionError("model: no"), ClusterError("away"), KeyboardInterrupt()])
def test_nothing_is_begun_or_written_by_a_check_that_fails(job, folder, tmp_path, queue, monkeypatch, at, error):
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(submitting_module, at, fail)
    with pytest.raises(type(error)):
        hand_over(job, folder, queue)
    assert (queue.requests, (tmp_path / "store").exists()) == ([], False)


def test_a_job_that_slurm_refuses_leaves_no_submission(job, folder, queue):
    queue.refusal = f"{WHERE}: does not begin job x: sbatch: error: invalid partition specified: nope"
    with pytest.raises(ClusterError) as caught:
        hand_over(job, folder, queue)
    assert str(caught.value) == f"{queue.refusal}; no job has begun: correct that, or submit the run again"
    assert run_of(job).submissions.reports() == []
    assert not run_of(job).is_known()
    queue.refusal = ""
    assert hand_over(job, folder, queue)["job"] == make_job_id(run_of(job).url, 0)


def test_a_job_that_is_cancelled_for_it_is_not_this_one_leaves_no_submission(job, folder, queue, monkeypatch):
    """Its comment, by which it would be known, is another than was asked for."""

    def begin_and_cancel(request: JobRequest) -> Job:
        queue.sbatch(replace(request, metadata={}))
        queue.stop(request.id)
        raise ClusterError(f"{WHERE}: changes the comment")

    monkeypatch.setattr(queue, "begin", begin_and_cancel)
    with pytest.raises(ClusterError, match="changes the comment; no job has begun"):
        hand_over(job, folder, queue)
    assert run_of(job).submissions.reports() == []


def test_an_answer_that_is_lost_is_asked_for_again(job, folder, queue):
    queue.breaks = 1
    assert hand_over(job, folder, queue)["status"] == "submitted"
    assert (len(queue.requests), len(queue.commands)) == (2, 1)


def test_a_login_host_that_goes_away_while_a_job_is_begun(job, folder, queue, monkeypatch):
    queue.breaks, read = 2, queue.read
    monkeypatch.setattr(queue, "read", lambda job_id: read(job_id) if not queue.requests else away())
    with pytest.raises(ClusterError, match="; job .* may have begun, submit the run again to see$") as caught:
        hand_over(job, folder, queue)
    job_id = make_job_id(run_of(job).url, 0)
    assert caught.value.document == {"run": run_of(job).url, "job": job_id, "cluster": WHERE}
    monkeypatch.undo()
    assert newest_of(run_of(job))[1].job == job_id, "its job may take it"


def away() -> Job | None:
    raise ClusterError(f"{WHERE}: nobody answers")


def test_ctrl_c_while_its_submission_is_written_leaves_none(job, folder, queue, monkeypatch):
    write = Submissions.write

    def write_and_interrupt(submissions: Submissions, *args: Any) -> str:
        write(submissions, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Submissions, "write", write_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        hand_over(job, folder, queue)
    assert (queue.requests, run_of(job).submissions.reports()) == ([], [])


def test_ctrl_c_while_a_job_is_begun(job, folder, queue, monkeypatch):
    begin = queue.begin

    def begin_and_interrupt(request: JobRequest) -> Job:
        begin(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "begin", begin_and_interrupt)
    with pytest.raises(Interrupted) as caught:
        hand_over(job, folder, queue)
    run, job_id = run_of(job), make_job_id(run_of(job).url, 0)
    assert str(caught.value) == (
        f"interrupted while job {job_id} of {run.url} was begun, which may run now; stop it with `launcher stop "
        f"{run.url}` and the same --cluster"
    )
    assert newest_of(run)[1].job == job_id


class TestTheSameRunAgain:
    @pytest.mark.parametrize("status", ["pending", "running"])
    def test_while_its_job_waits_or_runs(self, job, folder, queue, status):
        first, said = hand_over(job, folder, queue), Said()
        queue.known[first["job"]] = status
        assert hand_over(job, folder, queue, said) == first
        assert len(queue.requests) == 1
        assert said.messages == [
            f"{first['run']} is there already, job {first['job']} is {status}; stop it with "
            f"`launcher stop {first['run']}`"
        ]

    @pytest.mark.parametrize("ended", ["succeeded", "failed", "stopped"])
    def test_after_its_job_has_ended(self, job, folder, queue, ended):
        first = hand_over(job, folder, queue)["job"]
        queue.known[first] = ended
        assert hand_over(job, folder, queue)["job"] == make_job_id(run_of(job).url, 1)
        assert [report.number for report in run_of(job).submissions.reports()] == [0, 1]
        assert len(queue.commands) == 2

    @pytest.mark.parametrize("has_taken", [False, True])
    def test_after_slurm_has_forgotten_its_job(self, job, folder, queue, has_taken):
        """A job that never took the run is begun again under its name, and its submission is replaced."""
        hand_over(job, folder, queue)
        if has_taken:
            take_newest(run_of(job))
        queue.known.clear()
        assert hand_over(job, folder, queue)["job"] == make_job_id(run_of(job).url, int(has_taken))
        reports = run_of(job).submissions.reports()
        assert [(report.number, report.state) for report in reports] == (
            [(0, "taken"), (1, "waiting")] if has_taken else [(0, "waiting")]
        )
        assert reports[-1].id == queue.requests[-1].metadata["submission"]

    def test_after_it_was_submitted_to_another_cluster(self, job, folder, queue):
        """That cluster may still know its job, so the submission stays."""
        hand_over(job, folder, queue, place=replace(SLURM, login="me@other"))
        said = Said()
        assert hand_over(job, folder, FakeQueue(TWO_NODES), said)["job"] == make_job_id(run_of(job).url, 1)
        assert [report.number for report in run_of(job).submissions.reports()] == [0, 1]
        assert said.warnings[0].startswith(f"{run_of(job).url} waits on slurm:me@other, too; the job that begins first")

    def test_one_that_another_cluster_is_to_start_again(self, job, folder, queue):
        run = run_of(job)
        hand_over(job, folder, queue, place=replace(SLURM, login="me@other"))
        take_newest(run)
        run.take_lease()
        run.write_status({"status": "requeued", "step": 7})
        queue.known.clear()
        said = Said()
        hand_over(job, folder, queue, said)
        assert said.warnings[0] == (
            f"{run.url}: job {make_job_id(run.url, 0)} on slurm:me@other is to start it again, too, and ends if "
            "somebody drives it then; launcher stop ends that job: give --cluster its file"
        )

    def test_what_waits_on_another_cluster_under_the_same_number_stays(self, job, folder, queue):
        hand_over(job, folder, queue)
        report, submission = newest_of(run_of(job))
        other = run_of(job).submissions.write(replace(submission, cluster="slurm:other"), make_id(0, 7.0))
        queue.known.clear()
        hand_over(job, folder, queue)
        left = [each.id for each in run_of(job).submissions.reports()]
        assert left == [other, queue.requests[-1].metadata["submission"]]
        assert report.id not in left

    def test_when_it_is_complete(self, job, folder, queue):
        run = run_of(job)
        run.write_job(job.text)
        run.take_lease()
        run.write_status({"status": "completed", "step": 3})
        said = Said()
        assert hand_over(job, folder, queue, said)["status"] == "completed"
        assert "is complete; nothing to do" in said.messages[0]
        assert queue.requests == []

    def test_from_its_directory_alone(self, job, folder, queue, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        first = hand_over(job, folder, queue)["job"]
        queue.known[first] = "failed"
        result = submit_again(run_of(job), ["workers.num=4"], queue, SLURM, Said())
        assert (result["job"], result["status"]) == (make_job_id(run_of(job).url, 1), "submitted")
        assert queue.requests[-1].places.most == 4


class TestTwoAtOnce:
    def submitted_by_another(
        self, monkeypatch: pytest.MonkeyPatch, queue: FakeQueue, job: Description, folder: Path, status: JobStatus
    ) -> None:
        """Somebody else submits the run just before the submission of this process is written."""
        write = Submissions.write

        def write_later(submissions: Submissions, *args: Any) -> str:
            monkeypatch.setattr(Submissions, "write", write)
            queue.known[hand_over(job, folder, queue)["job"]] = status
            return write(submissions, *args)

        monkeypatch.setattr(Submissions, "write", write_later)

    def test_the_one_whose_job_slurm_has_first_wins(self, job, folder, queue, monkeypatch):
        self.submitted_by_another(monkeypatch, queue, job, folder, "pending")
        said = Said()
        result = hand_over(job, folder, queue, said)
        (theirs,) = run_of(job).submissions.reports()
        assert queue.metadata[result["job"]]["submission"] == theirs.id
        assert said.messages[-1] == f"the run was submitted by somebody else at the same time, as job {result['job']}"
        assert [*queue.known.values()] == ["pending"]

    def test_a_job_of_somebody_else_that_has_ended_is_followed_by_another(self, job, folder, queue, monkeypatch):
        self.submitted_by_another(monkeypatch, queue, job, folder, "failed")
        result = hand_over(job, folder, queue)
        assert result["job"] == make_job_id(run_of(job).url, 1)
        assert [report.number for report in run_of(job).submissions.reports()] == [0, 1]
        assert queue.known == {make_job_id(run_of(job).url, 0): "failed", result["job"]: "pending"}

    def test_one_that_was_submitted_while_this_one_was_tried_out(self, job, folder, queue, monkeypatch):
        def try_meanwhile(*_: Any) -> Any:
            monkeypatch.setattr(submitting_module, "try_job", lambda *_: TRIED)
            hand_over(job, folder, queue)
            return TRIED

        monkeypatch.setattr(submitting_module, "try_job", try_meanwhile)
        said = Said()
        assert hand_over(job, folder, queue, said)["job"] == make_job_id(run_of(job).url, 0)
        assert said.messages[-1].startswith("the run was submitted by somebody else at the same time")
        assert (len(queue.requests), len(run_of(job).submissions.reports())) == (1, 1)

    def test_a_submission_of_somebody_else_whose_job_is_yet_to_be_begun_stays(self, job, folder, queue, monkeypatch):
        """The job of this one has the name first, so they will find it, and withdraw theirs."""
        write = Submissions.write

        def write_both(submissions: Submissions, submission: Any, *args: Any) -> str:
            write(submissions, submission, make_id(0, 7.0))
            return write(submissions, submission, *args)

        monkeypatch.setattr(Submissions, "write", write_both)
        result = hand_over(job, folder, queue)
        assert (result["job"], len(run_of(job).submissions.reports())) == (make_job_id(run_of(job).url, 0), 2)

    def test_another_run_by_this_name_is_refused(self, job, folder, queue, monkeypatch):
        def try_meanwhile(*_: Any) -> Any:
            run_of(job).write_job(changed(job, "seed=1").text)
            return TRIED

        monkeypatch.setattr(submitting_module, "try_job", try_meanwhile)
        with pytest.raises(DescriptionError, match="exists with another description: seed: 1 -> 0"):
            hand_over(job, folder, queue)
        assert (queue.requests, run_of(job).submissions.reports()) == ([], [])


class TestThePlan:
    def plan(self, job: Description, folder: Path, queue: FakeQueue, place: SlurmClusterSpec = SLURM) -> Plan:
        return plan_there(job, folder, queue, place, Said())

    @pytest.mark.parametrize(
        ("change", "nodes"),
        [
            ("workers.num=8", "1 node of 8 CPU, 0 GPU"),
            ("workers.num=9", "2 nodes of 8 CPU, 0 GPU"),
            ("workers.num=[2,12]", "1 to 2 nodes of 8 CPU, 0 GPU"),
        ],
    )
    def test_it_says_which_nodes_the_job_takes(self, job, folder, queue, change, nodes):
        plan = self.plan(wanted := changed(job, change), folder, queue)
        assert plan.as_dict()["job_nodes"] == nodes
        assert re.search(f"^nodes +{nodes}$", plan_text(wanted.spec, plan), flags=re.MULTILINE)

    def test_it_begins_and_writes_nothing(self, job, folder, queue, tmp_path):
        plan = self.plan(changed(job, "workers.num=[2,12]"), folder, queue)
        assert (plan.num_workers, plan.most_per_host, plan.why_wait) == (12, 8, "")
        assert (queue.requests, (tmp_path / "store").exists()) == ([], False)

    def test_what_does_not_fit(self, job, folder, queue):
        with pytest.raises(LauncherError, match="workers.num must be at most 16 on this cluster"):
            self.plan(changed(job, "workers.num=17"), folder, queue)


def test_the_directory_says_so_to_everybody(job, folder, queue):
    hand_over(job, folder, queue)
    told = read_status(RunDirectory(run_of(job).url))
    assert (told["status"], told["cluster"], told["job"]) == ("submitted", WHERE, make_job_id(run_of(job).url, 0))
