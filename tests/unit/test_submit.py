"""What a submission refuses, in one line and before anything is written; and what it writes and begins."""

import math
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.capacity import Capacity
from cluster.errors import ClusterError, DescriptionError, Interrupted, StorageError
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission, SubmissionReport, Submissions, make_id
from cluster.scheduler import ClusterReport, Job, JobStatus
from cluster.spec.ray import NodeGroupSpec, RayClusterSpec
from cluster.spec.worker import WorkerSpec
from cluster.storage.store import Store
from launcher.cli import main
from launcher.config.clusters import load_cluster
from launcher.config.description import ClusterOverride, Description, load, parse
from launcher.planning.nodes import own_versions
from launcher.submission import handover as hand_over_module
from launcher.submission import standby_handover as standby_module
from launcher.submission import submit as submit_module
from launcher.submission import submitting as submitting_module
from launcher.submission.job_command import make_command, make_job_id
from launcher.submission.standby import WAIT_S
from launcher.submission.standby_handover import STANDBY
from launcher.submission.submit import submit, submit_again
from launcher.watching.status import read_status
from tests import saved
from tests.schedulers import URL, FakeScheduler, a_cluster, a_node, a_report, answered
from tests.specs import TRIED

JOBS = Path(__file__).parents[2] / "jobs"
JOB = """\
name: digits
store: {store}
model: {{_target_: jobs.models.Net}}
data: {{train: jobs.data.digits}}
loss: CrossEntropyLoss
optimizer: SGD
workers: {{num: 2, cpus: 1}}
"""


@dataclass
class Said:
    """A display that remembers."""

    messages: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def update(self, **_: Any) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial needs torch and seconds, and is not what these tests are about; jobs that stand by tell nothing."""
    monkeypatch.setattr(standby_module, "_TAKE_UP_S", -1.0)

    monkeypatch.setattr(submitting_module, "try_job", lambda *_: TRIED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "job"
    path.mkdir()
    return path


@pytest.fixture
def job(tmp_path: Path) -> Description:
    return parse(JOB.format(store=tmp_path / "store"), "digits.yaml")


def hand_over(
    job: Description, folder: Path, scheduler: FakeScheduler, said: Said | None = None, **spec: Any
) -> dict[str, Any]:
    return submit(job, folder, scheduler, RayClusterSpec(address=URL, **spec), said or Said())


def run_of(job: Description) -> RunDirectory:
    return RunDirectory(Store(job.spec.store).at(job.spec.name))


def newest_of(run: RunDirectory) -> tuple[SubmissionReport, Submission]:
    newest = run.submissions.read_newest()
    assert newest is not None
    return newest


def take_newest(run: RunDirectory) -> None:
    """What its driver does."""
    report = run.submissions.newest()
    assert report is not None
    run.submissions.mark_taken(report.id)


def submitted_meanwhile(
    monkeypatch: pytest.MonkeyPatch, scheduler: FakeScheduler, job: Description, folder: Path, status: JobStatus
) -> None:
    """Somebody else submits the same run while this submitter waits for the report of the nodes."""
    report = scheduler.report

    def submit_and_report(job_id: str) -> ClusterReport:
        monkeypatch.setattr(scheduler, "report", report)
        other = hand_over(job, folder, scheduler)["job"]
        scheduler.known[other] = status
        return report(job_id)

    monkeypatch.setattr(scheduler, "report", submit_and_report)


def of_versions(**versions: str) -> Mapping[str, str]:
    return own_versions() | versions


MINE = own_versions()
FIRST, SECOND = a_node("10.0.0.1"), a_node("10.0.0.2")
REFUSALS: dict[str, tuple[ClusterReport, str]] = {
    "nodes of two versions of Ray": (
        a_cluster(FIRST, SECOND, reports=(a_report("10.0.0.1"), a_report("10.0.0.2", versions={"ray": "2.1.0"}))),
        f"versions differ: ray {MINE['ray']} on 10.0.0.1, this machine, 2.1.0 on 10.0.0.2; install the same everywhere",
    ),
    "nodes of another Python": (
        a_cluster(FIRST, reports=(a_report(versions={"python": "3.9"}),)),
        f"versions differ: python 3.9 on 10.0.0.1, {MINE['python']} on this machine; install the same everywhere",
    ),
    "nodes of another torch": (
        a_cluster(FIRST, reports=(a_report(versions={"torch": "2.0.1+cu118"}),)),
        f"versions differ: torch 2.0.1+cu118 on 10.0.0.1, {MINE['torch']} on this machine; install the same everywhere",
    ),
    "nodes of two builds of torch": (
        a_cluster(
            FIRST,
            SECOND,
            reports=(
                a_report("10.0.0.1", versions={"torch": "1+cpu"}),
                a_report("10.0.0.2", versions={"torch": "1+cu"}),
            ),
        ),
        f"versions differ: torch 1+cpu on 10.0.0.1, 1+cu on 10.0.0.2, {MINE['torch']} on this machine; "
        "install the same everywhere",
    ),
    "nodes of another launcher": (
        a_cluster(FIRST, reports=(a_report(versions={"launcher": "0" * 64}),)),
        f"versions differ: launcher 000000000000 on 10.0.0.1, {MINE['launcher'][:12]} on this machine; "
        "install the same everywhere",
    ),
    "a variable that is missing": (
        a_cluster(FIRST, SECOND, reports=(a_report("10.0.0.1"), a_report("10.0.0.2", missing=("TOKEN",)))),
        "environment variables: 10.0.0.2 lacks TOKEN; set them where its nodes start",
    ),
    "a store that a node does not reach": (
        a_cluster(FIRST, SECOND, reports=(a_report("10.0.0.1"), a_report("10.0.0.2", store_error="cannot be written"))),
        "the store cannot be used from 10.0.0.2: cannot be written; use one that every node reaches, such as "
        "s3://bucket/runs",
    ),
    "nodes that do not answer": (
        a_cluster(FIRST, reports=(), silent=("10.0.0.1",)),
        "no node answers: 10.0.0.1; look at the cluster's own logs",
    ),
    "more than there can be": (
        a_cluster(a_node("10.0.0.1", CPU=1.0, GPU=2.0, **{"accelerator_type:H100": 1.0}), a_node("10.0.0.2", CPU=0.0)),
        "digits.yaml: workers.num must be at most 1 on this cluster: so many workers of 1 CPU, 1 GPU fit on its 2 "
        "nodes, got 2; add nodes, or lower workers.num; if its autoscaler may start such nodes, write them as "
        "cluster.autoscaler. "
        "There is 10.0.0.1 with 1 CPU, 2 GPU, H100, 10.0.0.2 with 0 CPU, 0 GPU",
    ),
}
OF_JOBS: dict[str, tuple[str, str]] = {
    "an accelerator that no node has": (
        "workers.accelerator=H100",
        "digits.yaml: workers.num must be at most 0 on this cluster: so many workers of 1 CPU, H100 fit on its 2 "
        "nodes, got 2; add nodes, or lower workers.num; if its autoscaler may start such nodes, write them as "
        "cluster.autoscaler. "
        "There is 10.0.0.1 with 16 CPU, 0 GPU, 10.0.0.2 with 16 CPU, 0 GPU, A100",
    ),
    "GPUs where there are none": (
        "workers.gpus=1",
        "digits.yaml: workers.gpus=1 for 2 workers needs 2 GPUs, and this cluster has 0; lower workers.num or set "
        "workers.gpus=0; if its autoscaler may start such nodes, write them as cluster.autoscaler. "
        "There is 10.0.0.1 with 16 CPU, 0 GPU, 10.0.0.2 with 16 CPU, 0 GPU, A100",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_in_one_line_and_nothing_is_written(job, folder, tmp_path, what):
    report, message = REFUSALS[what]
    scheduler = FakeScheduler(report)
    with pytest.raises(ClusterError) as caught:
        hand_over(job, folder, scheduler)
    assert str(caught.value) == f"{URL}: {message}"
    assert ([*scheduler.known.values()], (tmp_path / "store").exists()) == (["stopped"], False)


@pytest.mark.parametrize("what", OF_JOBS)
def test_a_job_that_asks_for_what_no_node_has_is_refused_in_one_line(job, folder, tmp_path, what):
    change, message = OF_JOBS[what]
    scheduler = FakeScheduler(a_cluster(FIRST, a_node("10.0.0.2", **{"accelerator_type:A100": 1.0})))
    with pytest.raises(ClusterError) as caught:
        hand_over(parse(job.text, "digits.yaml", [change]), folder, scheduler)
    assert str(caught.value) == f"{URL}: {message}"
    assert ([*scheduler.known.values()], (tmp_path / "store").exists()) == (["stopped"], False)


def test_an_operator_that_would_raise_on_its_gpus_is_a_mistake_in_the_job(job, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        submitting_module, "try_job", lambda *_: replace(TRIED, would_raise_on_gpu=("median in model.a",))
    )
    scheduler = FakeScheduler(a_cluster(a_node("10.0.0.1", CPU=4.0, GPU=2.0)))

    with pytest.raises(
        DescriptionError, match=r"^digits\.yaml: train\.deterministic: .* on GPUs of median in model\.a; "
    ):
        hand_over(job, folder, scheduler)

    assert ([*scheduler.known.values()], (tmp_path / "store").exists()) == (["stopped"], False)


def test_a_folder_that_each_node_has_for_itself_is_refused(job, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.schedulers.answer", lambda *_: None)
    with pytest.raises(ClusterError) as caught:
        hand_over(job, folder, FakeScheduler(a_cluster(FIRST, SECOND)))
    own = f"{tmp_path}/store: is a folder of its own there, not the one here"
    assert str(caught.value) == (
        f"{URL}: the store cannot be used from 10.0.0.1: {own}, 10.0.0.2: {own}; "
        "use one that every node reaches, such as s3://bucket/runs"
    )
    assert not (tmp_path / "store").exists()


def test_what_its_autoscaler_may_bring_counts_and_is_told(job, folder):
    none = Capacity(nodes=(), limits={"CPU": 1.0, "memory": 1e9})
    with pytest.raises(ClusterError, match="There is no node; its autoscaler may bring it to 1 CPU$"):
        hand_over(job, folder, FakeScheduler(replace(a_cluster(), capacity=none, nodes=())))
    enough = Capacity(nodes=(), limits={"CPU": 4.0})
    scheduler = FakeScheduler(replace(a_cluster(), capacity=enough, nodes=()))
    assert hand_over(job, folder, scheduler)["status"] == "submitted"


def test_what_is_declared_of_its_autoscaler_counts_and_travels_with_the_job(job, folder):
    """Ray does not tell of it, neither here nor there."""
    head, said = a_node(CPU=0.0), Said()
    with pytest.raises(ClusterError, match="at most 0 on this cluster: .* fit on its 1 node, got 2; add nodes"):
        hand_over(job, folder, FakeScheduler(a_cluster(head)))
    small = (NodeGroupSpec(nodes=4, cpus=0.5), NodeGroupSpec(nodes=1, cpus=1.0, gpus=1, accelerator="H100"))
    with pytest.raises(
        ClusterError,
        match="; its autoscaler may bring it to 4 nodes of 0.5 CPU, 0 GPU, 1 node of 1 CPU, 1 GPU, H100$",
    ):
        hand_over(job, folder, FakeScheduler(a_cluster(head)), autoscaler=small)
    scheduler, groups = FakeScheduler(a_cluster(head)), (NodeGroupSpec(nodes=2, cpus=1.0),)
    assert hand_over(job, folder, scheduler, said, autoscaler=groups)["status"] == "submitted"
    assert said.messages[0].startswith("there is room for 0 of 2 workers now; the run waits for more, ")
    words = shlex.split(scheduler.commands[0])
    cluster, changes = load_cluster("10.0.0.1:6379", words[words.index("$RAY_ADDRESS") + 1 :])
    assert (cluster, changes) == (RayClusterSpec(address="10.0.0.1:6379", autoscaler=groups), [])


def test_what_a_cluster_says_of_workers_goes_with_the_job_and_not_with_the_run(job, folder):
    place, scheduler = RayClusterSpec(address=URL, worker=WorkerSpec(cpus=2.0, placement="spread")), FakeScheduler()
    wanted = parse(job.text, "digits.yaml", [*map(ClusterOverride, place.worker.overrides()), "workers.cpus=1.5"])
    submit(wanted, folder, scheduler, place, Said())
    submitted = run_of(job).submissions.read_newest()[1].description
    words = shlex.split(scheduler.commands[0])
    _, there = load_cluster("10.0.0.1:6379", words[words.index("$RAY_ADDRESS") + 1 :])
    on_it, elsewhere = (parse(submitted, "job.yaml", changes).spec.workers for changes in (there, ()))
    assert (on_it.cpus, on_it.placement) == (1.5, "spread")
    assert (elsewhere.cpus, elsewhere.placement) == (1.5, "pack")


def test_room_that_is_not_there_now_is_waited_for_there(job, folder):
    said = Said()
    scheduler = FakeScheduler(a_cluster(replace(a_node(), free={"CPU": 0.0})))
    assert hand_over(job, folder, scheduler, said)["status"] == "submitted"
    assert said.messages[0] == (
        "there is room for 0 of 2 workers now; the run waits for more, for up to 3600 s (workers.wait_s)"
    )


def test_a_build_of_torch_for_other_devices_is_the_same_torch(job, folder):
    build = MINE["torch"].partition("+")[0] + "+cu999"
    assert hand_over(job, folder, FakeScheduler(a_cluster(reports=(a_report(versions={"torch": build}),))))["job"]


@pytest.mark.parametrize(
    ("head", "version", "refused"),
    [
        (a_node("10.0.0.1", CPU=0.0), "+cpu", False),
        (a_node("10.0.0.1", CPU=1.0, **{"accelerator_type:H100": 0.0}), "+cpu", False),
        (a_node("10.0.0.1", CPU=0.0), ".1", True),
        (a_node("10.0.0.1", CPU=1.0, **{"accelerator_type:H100": 1.0}), "+cpu", True),
    ],
    ids=["no cores", "no accelerator", "another version", "room for a worker"],
)
def test_a_head_without_room_for_a_worker_may_have_another_build_of_torch(job, folder, head, version, refused):
    job = parse(job.text, "digits.yaml", ["workers.accelerator=H100"])
    torch = MINE["torch"].partition("+")[0]
    reports = (
        a_report("10.0.0.1", versions={"torch": f"{torch}{version}"}),
        a_report("10.0.0.2", versions={"torch": f"{torch}+cu130"}),
    )
    scheduler = FakeScheduler(a_cluster(head, a_node("10.0.0.2", **{"accelerator_type:H100": 1.0}), reports=reports))
    if refused:
        with pytest.raises(ClusterError, match="versions differ: torch "):
            hand_over(job, folder, scheduler)
    else:
        assert hand_over(job, folder, scheduler)["status"] == "submitted"


def test_a_node_that_is_silent_is_told_of(job, folder):
    said = Said()
    hand_over(job, folder, FakeScheduler(a_cluster(FIRST, SECOND, reports=(a_report(),), silent=("10.0.0.2",))), said)
    assert said.warnings[:1] == [f"{URL}: no answer from 10.0.0.2; workers may be placed there all the same"]


@pytest.mark.parametrize(
    ("seed", "asked"),
    [
        ("'7'", ()),
        ("${oc.env:SEED}", ("SEED",)),
        ("${oc.env: SEED }", ("SEED",)),
        ("${oc.env:SEED,1}", ("SEED",)),
        ("${oc.env:UNSET_SEED,1}", ()),
        ("${oc.env:UNSET_SEED,${oc.env:SEED}}", ("SEED",)),
        ("${oc.env:${oc.env:NAMED}}", ("NAMED", "SEED")),
    ],
)
def test_what_is_asked_of_each_node(folder, tmp_path, monkeypatch, seed, asked):
    """All that the plan is made with: a node that lacks a variable would train with its default, or not at all."""
    monkeypatch.setenv("SEED", "64")
    monkeypatch.setenv("NAMED", "SEED")
    text = JOB.format(store=tmp_path / "store") + f'seed: "${{oc.decode:{seed}}}"\n'
    scheduler = FakeScheduler()
    hand_over(parse(text, "digits.yaml"), folder, scheduler, env=("TOKEN",))
    (needs,) = scheduler.asked.values()
    assert (needs.store, needs.variables) == (str(tmp_path / "store"), ("TOKEN", *asked))
    imported = {"jobs.training.worker", "launcher.planning.dry_run"}
    assert imported <= set(needs.modules), "what its host imports while it stands by"


def test_a_laptop_plans_for_eight_gpus(folder, tmp_path):
    job = load(JOBS / "resnet50.yaml", [f"store={tmp_path / 'store'}"])
    scheduler = FakeScheduler(a_cluster(a_node(CPU=64.0, GPU=8.0)))
    assert hand_over(job, folder, scheduler)["status"] == "submitted"
    with pytest.raises(ClusterError, match="for 8 workers needs 8 GPUs, and this cluster has 4"):
        hand_over(job, folder, FakeScheduler(a_cluster(a_node(CPU=64.0, GPU=4.0))))


def test_what_is_written(job, folder):
    (folder / "mine.py").write_text("x = 1\n")
    scheduler = FakeScheduler()
    result = hand_over(job, folder, scheduler)
    run = run_of(job)
    assert result == {"run": run.url, "job": make_job_id(run.url, 0), "cluster": URL, "status": "submitted"}
    report = run.submissions.newest()
    assert report is not None
    assert (report.number, report.state) == (0, "waiting")
    assert scheduler.commands == [
        f'exec launcher resume {run.url} --submission {report.id} --standby --json --cluster "$RAY_ADDRESS"'
    ]
    submission = run.submissions.read(report.id)
    assert (submission.job, submission.cluster, submission.description) == (result["job"], URL, job.text)
    assert submission.versions == own_versions()
    assert b"mine.py" in run.read_code(submission.code_sha256)
    assert not run.exists(), "until its driver has taken the run"
    assert run.is_known()


def test_the_cluster_says_how_long_a_job_that_is_stopped_may_save(job, folder):
    scheduler = FakeScheduler()
    hand_over(job, folder, scheduler)
    scheduler.known = dict.fromkeys(scheduler.known, "failed")
    hand_over(job, folder, scheduler, stop_grace_s=900)
    assert scheduler.grace_periods_s == [300, 900]


@pytest.mark.parametrize("name", ["digits", "my run", "ünï", "x" * 100])
def test_a_job_id_is_fit_for_every_cluster(name):
    job_id = make_job_id(f"s3://bucket/runs/{name}", 12)
    assert re.fullmatch("[A-Za-z0-9_-]{1,60}-12", job_id)
    assert job_id != make_job_id(f"s3://other/runs/{name}", 12)


def test_a_url_is_quoted_for_the_shell():
    command = make_command("/runs/my run; rm", "0-ab", RayClusterSpec(address=URL))
    assert "resume '/runs/my run; rm' --submission 0-ab --json" in command


def test_an_answer_that_is_lost_is_asked_for_again(job, folder, monkeypatch):
    monkeypatch.setattr(hand_over_module, "_ASK_AGAIN_S", 0.0)
    scheduler, said = FakeScheduler(breaks=1), Said()
    assert hand_over(job, folder, scheduler, said)["status"] == "submitted"
    assert len(scheduler.commands) == 1
    assert said.messages[0].startswith("submitted digits: ")


def test_a_cluster_that_goes_away_before_anything_is_written(job, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hand_over_module, "_ASK_AGAIN_S", 0.0)
    scheduler = FakeScheduler(breaks=2)
    with pytest.raises(ClusterError, match="nobody answers$") as caught:
        hand_over(job, folder, scheduler)
    assert caught.value.document == {"run": run_of(job).url, "job": None, "cluster": URL}
    assert ([*scheduler.known.values()], (tmp_path / "store").exists()) == (["stopped"], False)
    assert hand_over(job, folder, scheduler)["job"] == make_job_id(run_of(job).url, 1)


def once_written(
    monkeypatch: pytest.MonkeyPatch, scheduler: FakeScheduler, answers: Callable[[str], Job | None]
) -> None:
    """What the cluster says of jobs once a submission is written."""
    write = Submissions.write

    def write_then(*args: Any) -> str:
        monkeypatch.setattr(scheduler, "read", answers)
        return write(*args)

    monkeypatch.setattr(Submissions, "write", write_then)


def away(job_id: str) -> Job | None:
    raise ClusterError(f"{URL}: nobody answers there, {job_id}")


def test_a_cluster_that_goes_away_once_the_submission_is_written(job, folder, monkeypatch):
    monkeypatch.setattr(hand_over_module, "_ASK_AGAIN_S", 0.0)
    scheduler, job_id = FakeScheduler(), make_job_id(run_of(job).url, 0)
    with monkeypatch.context() as while_away:
        once_written(while_away, scheduler, away)
        with pytest.raises(ClusterError, match="; job .* may have begun, submit the run again to see$") as unsure:
            hand_over(job, folder, scheduler)
    assert unsure.value.document == {"run": run_of(job).url, "job": job_id, "cluster": URL}
    assert scheduler.known == {job_id: "pending"}
    assert hand_over(job, folder, scheduler)["job"] == job_id


@pytest.mark.parametrize("is_there", [True, False])
def test_a_store_that_fails_as_the_submission_is_written_leaves_its_job(job, folder, monkeypatch, is_there):
    """It takes it up if it finds it, or ends by itself."""
    scheduler, write = FakeScheduler(), Submissions.write

    def write_and_fail(*args: Any) -> None:
        if is_there:
            write(*args)
        raise StorageError("s3://b/r: nobody answers")

    monkeypatch.setattr(Submissions, "write", write_and_fail)
    with pytest.raises(StorageError, match="; job .* may have begun, submit the run again to see$") as unsure:
        hand_over(job, folder, scheduler)
    job_id = make_job_id(run_of(job).url, 0)
    assert unsure.value.document == {"run": run_of(job).url, "job": job_id, "cluster": URL}
    assert scheduler.known == {job_id: "pending"}


class TestAJobThatDoesNotStandByAnyMore:
    """Another one is begun, for the submission that is written."""

    def is_begun(self, job: Description, scheduler: FakeScheduler, first: JobStatus) -> None:
        run, (standby, begun) = run_of(job), scheduler.commands
        report, submission = newest_of(run)
        assert [*scheduler.known.items()] == [(make_job_id(run.url, 0), first), (submission.job, "pending")]
        assert (submission.job, submission.number) == (make_job_id(run.url, 1), 1)
        assert (" --standby " in standby, " --standby " in begun, report.id in begun) == (True, False, True)
        assert [each.id for each in run.submissions.reports()] == [report.id]

    def test_since_it_was_stopped(self, job, folder, monkeypatch):
        scheduler = FakeScheduler()
        report = scheduler.report

        def stop_and_report(job_id: str) -> ClusterReport:
            scheduler.known[job_id] = "stopped"
            return report(job_id)

        monkeypatch.setattr(scheduler, "report", stop_and_report)
        assert hand_over(job, folder, scheduler)["status"] == "submitted"
        self.is_begun(job, scheduler, "stopped")

    def test_since_the_trial_took_too_long(self, job, folder, monkeypatch):
        monkeypatch.setattr(standby_module, "HAND_OVER_S", 0.0)
        scheduler = FakeScheduler()
        assert hand_over(job, folder, scheduler)["status"] == "submitted"
        self.is_begun(job, scheduler, "stopped")

    def test_since_it_ends_just_then(self, job, folder, monkeypatch):
        """It is said to run until all of its processes have ended."""
        monkeypatch.setattr(standby_module, "_TAKE_UP_S", 60.0)
        monkeypatch.setattr(standby_module, "_LOOK_INTERVAL_S", 0.0)
        scheduler, read, states = FakeScheduler(), FakeScheduler.read, ["running"] * 5 + ["failed"]

        def ends(job_id: str) -> Job | None:
            if states and job_id in scheduler.known:
                scheduler.known[job_id] = states.pop(0)
            return read(scheduler, job_id)

        once_written(monkeypatch, scheduler, ends)
        assert hand_over(job, folder, scheduler)["status"] == "submitted"
        self.is_begun(job, scheduler, "failed")

    def test_and_one_that_says_that_it_has_found_it_is_waited_for_no_longer(self, job, folder, monkeypatch):
        monkeypatch.setattr(standby_module, "_TAKE_UP_S", math.inf)
        monkeypatch.setattr(standby_module, "_LOOK_INTERVAL_S", 0.0)
        scheduler, read, looks = FakeScheduler(), FakeScheduler.read, list[str]()

        def finds(job_id: str) -> Job | None:
            looks.append(job_id)
            if len(looks) == 5:
                run_of(job).submissions.write_sign(run_of(job).submissions.newest().id, "planning")
            return read(scheduler, job_id)

        once_written(monkeypatch, scheduler, finds)
        assert hand_over(job, folder, scheduler)["status"] == "submitted"
        assert (len(looks), len(scheduler.commands)) == (5, 1)

    def test_and_one_that_has_taken_it_and_ended_is_no_such_job(self, job, folder, monkeypatch):
        scheduler = FakeScheduler()

        def ended(job_id: str) -> Job:
            report = run_of(job).submissions.newest()
            run_of(job).submissions.mark_failed(report.id, "there is no such class")
            return Job(id=job_id, status="failed", message="", exit_code=2, began_at=None, metadata={})

        once_written(monkeypatch, scheduler, ended)
        assert hand_over(job, folder, scheduler)["status"] == "failed"
        assert len(scheduler.commands) == 1

    @pytest.mark.parametrize("knows", [True, False])
    def test_on_a_cluster_that_refuses_to_begin_another_leaves_nothing(self, job, folder, monkeypatch, knows):
        """Unless it does not tell that it knows of none: then it may begin it yet."""
        monkeypatch.setattr(hand_over_module, "_ASK_AGAIN_S", 0.0)
        monkeypatch.setattr(standby_module, "HAND_OVER_S", 0.0)
        scheduler = FakeScheduler()
        once_written(monkeypatch, scheduler, (lambda _: None) if knows else away)
        begin = scheduler.begin

        def begin_one(*args: Any, **named: Any) -> Job:
            if scheduler.commands:
                raise ClusterError(f"{URL}: does not begin a job: No available agent")
            return begin(*args, **named)

        monkeypatch.setattr(scheduler, "begin", begin_one)
        what = (
            "no job has begun: correct that, or submit the run again$"
            if knows
            else "may have begun, submit the run again to see$"
        )
        with pytest.raises(ClusterError, match=f"No available agent; .*{what}"):
            hand_over(job, folder, scheduler)
        assert (run_of(job).submissions.newest() is None) == knows


def test_an_error_knows_the_run_and_the_cluster(job, folder):
    with pytest.raises(ClusterError) as refused:
        hand_over(job, folder, FakeScheduler(REFUSALS["nodes of another Python"][0]))
    assert refused.value.document == {"run": run_of(job).url, "job": None, "cluster": URL}


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["try_job", "pack_job", "check_nodes"])
def test_ctrl_c_while_a_job_stands_by_stops_it(job, folder, tmp_path, monkeypatch, at):
    scheduler = FakeScheduler()
    monkeypatch.setattr(submit_module if at == "pack_job" else submitting_module, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        hand_over(job, folder, scheduler)
    assert ([*scheduler.known.values()], (tmp_path / "store").exists()) == (["stopped"], False)


@pytest.mark.parametrize("at", ["write", "is_answered", "read_status"])
def test_ctrl_c_once_the_submission_is_written_says_that_its_job_may_run(job, folder, monkeypatch, at):
    scheduler, write = FakeScheduler(), Submissions.write

    def write_and_interrupt(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    of: Any = submitting_module if at == "read_status" else Submissions
    monkeypatch.setattr(of, at, write_and_interrupt if at == "write" else interrupt)
    with pytest.raises(Interrupted, match="which may run now; stop it with `launcher stop ") as caught:
        hand_over(job, folder, scheduler)
    assert str(caught.value).endswith(f"{run_of(job).url}` and the same --cluster")
    assert caught.value.document == {
        "run": run_of(job).url, "job": make_job_id(run_of(job).url, 0), "cluster": URL,
    }  # fmt: skip
    assert run_of(job).submissions.newest() is not None
    assert [*scheduler.known.values()] == ["pending"]


class TestTheSameRunAgain:
    def test_while_its_job_lives(self, job, folder):
        scheduler, said = FakeScheduler(), Said()
        first = hand_over(job, folder, scheduler)
        again = hand_over(job, folder, scheduler, said)
        assert again == first
        assert len(scheduler.commands) == 1
        assert said.messages == [
            f"{first['run']} is there already, job {first['job']} is pending; stop it with "
            f"`launcher stop {first['run']}`"
        ]

    def test_after_its_job_died(self, job, folder):
        scheduler = FakeScheduler()
        first = hand_over(job, folder, scheduler)["job"]
        scheduler.known[first] = "failed"
        second = hand_over(job, folder, scheduler)["job"]
        assert (first[-2:], second[-2:], len(scheduler.commands)) == ("-0", "-1", 2)

    def test_under_another_spelling_of_its_url(self, job, folder, tmp_path):
        (tmp_path / "other").symlink_to(tmp_path / "store")
        respelled = parse(JOB.format(store=tmp_path / "other"), "digits.yaml")
        assert run_of(respelled).url != run_of(job).url
        scheduler = FakeScheduler()
        first = hand_over(job, folder, scheduler)["job"]
        assert hand_over(respelled, folder, scheduler)["job"] == first
        assert len(scheduler.commands) == 1
        scheduler.known[first] = "failed"
        assert hand_over(respelled, folder, scheduler)["job"] == f"{first[:-1]}1"

    def test_on_a_cluster_that_knows_of_none(self, job, folder):
        first = hand_over(job, folder, FakeScheduler())["job"]
        assert hand_over(job, folder, FakeScheduler())["job"] == first

    def test_on_another_cluster_after_it_ran_on_one(self, job, folder):
        first = hand_over(job, folder, FakeScheduler())["job"]
        take_newest(run_of(job))
        second = hand_over(job, folder, FakeScheduler())["job"]
        assert (first[-2:], second[-2:]) == ("-0", "-1")

    def test_when_somebody_else_was_faster(self, job, folder, monkeypatch):
        said, scheduler = Said(), FakeScheduler()
        submitted_meanwhile(monkeypatch, scheduler, job, folder, "running")
        result = hand_over(job, folder, scheduler, said)
        mine, other = make_job_id(run_of(job).url, 0), make_job_id(run_of(job).url, 1)
        assert result["job"] == other
        assert said.messages == [f"the run was submitted by somebody else at the same time, as job {other}"]
        assert scheduler.known == {mine: "stopped", other: "running"}
        assert [report.number for report in run_of(job).submissions.reports()] == [1], "nothing is left of this one"

    def test_when_the_job_of_somebody_else_has_ended_already(self, job, folder, monkeypatch):
        scheduler = FakeScheduler()
        submitted_meanwhile(monkeypatch, scheduler, job, folder, "failed")
        assert hand_over(job, folder, scheduler)["job"] == make_job_id(run_of(job).url, 2)
        assert [report.number for report in run_of(job).submissions.reports()] == [1, 2]
        assert [*scheduler.known.values()] == ["stopped", "failed", "pending"]

    def test_while_a_job_stands_by_for_somebody_who_may_be_refused(self, job, folder):
        """Nobody waits for that, nor does its number count twice."""
        scheduler, first = FakeScheduler(), make_job_id(run_of(job).url, 0)
        scheduler.known[first], scheduler.metadata[first] = "running", {"submission": "000000-0", STANDBY: "1"}
        assert hand_over(job, folder, scheduler)["job"] == make_job_id(run_of(job).url, 1)
        assert scheduler.known[first] == "running"

    def test_when_the_submission_of_somebody_else_names_ones_own_job(self, job, folder, monkeypatch):
        """Before whoever wrote it has asked the cluster, and found that there is another of that name."""
        scheduler, write = FakeScheduler(), Submissions.write
        own = make_job_id(run_of(job).url, 0)

        def report(job_id: str) -> ClusterReport:
            other = Submission(
                number=0, job=own, cluster=URL, description=job.text, code_sha256="ab", code_directory=None,
                working_directory=None, user="ann", host="other", time=7.0, versions={}, git=None,
            )  # fmt: skip
            write(run_of(job).submissions, other)
            return answered(scheduler.has, scheduler.asked[job_id])

        monkeypatch.setattr(scheduler, "report", report)
        assert hand_over(job, folder, scheduler)["job"] == own
        assert scheduler.known == {own: "pending"}

    def test_when_the_job_of_an_earlier_submit_comes_late(self, job, folder, monkeypatch):
        """Its answer was lost, so that nobody knew of it."""
        scheduler, said = FakeScheduler(), Said()
        first = hand_over(job, folder, scheduler)["job"]
        came, begin = scheduler.known.pop(first), scheduler.begin

        def begin_late(*args: Any, **named: Any) -> Job:
            scheduler.known[first] = came
            return begin(*args, **named)

        monkeypatch.setattr(scheduler, "begin", begin_late)
        assert hand_over(job, folder, scheduler, said)["job"] == first
        assert said.messages == [f"the run was submitted by somebody else at the same time, as job {first}"]
        assert len(scheduler.commands) == 1

    def test_when_somebody_else_begins_a_job_of_the_same_name(self, job, folder, monkeypatch):
        scheduler, first = FakeScheduler(), make_job_id(run_of(job).url, 0)
        begin = scheduler.begin

        def begin_later(*args: Any, **named: Any) -> Job:
            scheduler.known.setdefault(first, "running")
            scheduler.metadata.setdefault(first, {"submission": "000000-of-somebody-else"})
            return begin(*args, **named)

        monkeypatch.setattr(scheduler, "begin", begin_later)
        assert hand_over(job, folder, scheduler)["job"] == make_job_id(run_of(job).url, 1)
        assert [*scheduler.known.values()] == ["running", "pending"], "that of somebody else is left alone"

    @pytest.mark.parametrize("is_lower", [True, False])
    def test_when_somebody_else_writes_a_submission_at_the_same_moment(self, job, folder, monkeypatch, is_lower):
        """Of the two, the one with the higher number takes its own back."""
        scheduler, said, url = FakeScheduler(), Said(), run_of(job).url
        mine, other = make_job_id(url, int(is_lower)), make_job_id(url, int(not is_lower))
        write, others = Submissions.write, make_id(int(not is_lower), 7.0)
        scheduler.known[other], scheduler.metadata[other] = "running", {"submission": others, STANDBY: "1"}

        def write_both(submissions: Submissions, submission: Submission, submission_id: str) -> str:
            write(submissions, replace(submission, job=other, number=int(not is_lower)), others)
            return write(submissions, submission, submission_id)

        monkeypatch.setattr(Submissions, "write", write_both)
        assert hand_over(job, folder, scheduler, said)["job"] == (other if is_lower else mine)
        numbers = [report.number for report in run_of(job).submissions.reports()]
        if is_lower:
            assert said.messages == [f"the run was submitted by somebody else at the same time, as job {other}"]
            assert (numbers, scheduler.known) == ([0], {other: "running", mine: "stopped"})
        else:
            assert said.messages[0].startswith("submitted digits: ")
            assert (numbers, scheduler.known) == ([0, 1], {other: "running", mine: "pending"})

    @pytest.mark.parametrize("ended", ["failed", "stopped", "succeeded"])
    def test_after_its_directory_was_deleted(self, job, folder, ended):
        scheduler = FakeScheduler()
        first = hand_over(job, folder, scheduler)["job"]
        scheduler.known[first] = ended
        shutil.rmtree(run_of(job).url)
        said = Said()
        assert hand_over(job, folder, scheduler, said)["job"] == make_job_id(run_of(job).url, 1)
        assert said.messages[0].startswith("submitted digits: ")

    def test_after_its_directory_was_deleted_while_its_job_lives(self, job, folder):
        scheduler = FakeScheduler(began_at=time.time() - 2 * WAIT_S)
        first = hand_over(job, folder, scheduler)["job"]
        shutil.rmtree(run_of(job).url)
        with pytest.raises(ClusterError, match=f"job {first} is pending, and .* holds no submission any more; stop "):
            hand_over(job, folder, scheduler)
        assert run_of(job).submissions.newest() is None

    def test_a_cluster_that_is_away_is_told_before_the_job_is_tried_out(self, job, folder, monkeypatch):
        def read(_: FakeScheduler, job_id: str) -> Job | None:
            raise ClusterError(f"{URL}: nobody answers there, {job_id}")

        monkeypatch.setattr(FakeScheduler, "read", read)
        said = Said()
        with pytest.raises(ClusterError, match="nobody answers there"):
            hand_over(job, folder, FakeScheduler(), said)
        assert said.phases == []

    def test_while_somebody_drives_it_elsewhere(self, job, folder):
        scheduler, said = FakeScheduler(), Said()
        run = run_of(job)
        run.take_lease()
        run.write_job(job.text)
        assert hand_over(job, folder, scheduler, said) == {
            "run": run.url, "job": None, "cluster": URL, "status": "running",
        }  # fmt: skip
        assert "is running it; stop it with" in said.messages[0]
        assert scheduler.commands == []

    @pytest.mark.parametrize("status", ["stopped", "failed", "completed"])
    def test_after_it_ended(self, job, folder, status):
        scheduler = FakeScheduler()
        hand_over(job, folder, scheduler)
        run = run_of(job)
        take_newest(run)
        run.write_job(job.text)
        run.take_lease()
        run.write_status({"status": status, "step": 3})
        scheduler.known = dict.fromkeys(scheduler.known, "succeeded")
        result = hand_over(job, folder, scheduler)
        is_over = status == "completed"
        assert result["status"] == ("completed" if is_over else "submitted")
        assert len(scheduler.commands) == (1 if is_over else 2)

    def test_after_it_ended_with_a_clock_that_is_behind_that_of_its_host(self, job, folder, monkeypatch):
        """The status tells of the submission, and not of the driver before it."""
        run = run_of(job)
        run.write_job(job.text)
        run.take_lease()
        run.write_status({"status": "stopped", "step": 3})
        with monkeypatch.context() as clock:
            clock.setattr(submitting_module.time, "time", lambda: 1_000.0)
            hand_over(job, folder, FakeScheduler())
        assert read_status(run)["status"] == "submitted"
        run.take_lease()
        run.write_status({"status": "stopped", "step": 4})
        assert read_status(run)["status"] == "stopped", "a person has gone on with the run"

    def test_with_another_description(self, job, folder):
        scheduler = FakeScheduler()
        first = hand_over(job, folder, scheduler)["job"]
        scheduler.known[first] = "failed"
        take_newest(run_of(job))
        run_of(job).write_job(job.text)
        other = replace(job, spec=replace(job.spec, seed=1))
        with pytest.raises(DescriptionError, match="exists with another description: seed: 0 -> 1"):
            hand_over(other, folder, scheduler)
        assert run_of(job).read_job() == job.text

    def test_with_a_description_that_was_repaired_before_anything_was_trained(self, job, folder):
        scheduler, said = FakeScheduler(), Said()
        first = hand_over(job, folder, scheduler)["job"]
        repaired = parse(job.text, "digits.yaml", ["seed=1"])
        hand_over(repaired, folder, scheduler, said)
        assert said.warnings == ["not changed: seed: 0 -> 1"]
        scheduler.known[first] = "failed"
        hand_over(repaired, folder, scheduler, said)
        assert "changed seed: 0 -> 1" in said.messages
        newest = run_of(job).submissions.read_newest()
        assert newest is not None
        assert (newest[0].number, newest[1].description) == (1, repaired.text)

    def test_on_another_cluster_while_it_waits_on_one(self, job, folder):
        hand_over(job, folder, FakeScheduler())
        said = Said()
        other = RayClusterSpec(address="http://other:8265")
        second = submit(job, folder, FakeScheduler(), other, said)["job"]
        assert second.endswith("-1")
        assert f"waits on {URL}, too" in said.warnings[0]
        submissions = run_of(job).submissions
        first, newest = submissions.reports()
        submissions.mark_taken(newest.id)
        assert (submissions.standing(first.id), submissions.standing(newest.id)) == ("superseded", "taken")

    def test_whose_newest_submission_cannot_be_read(self, job, folder):
        scheduler, said = FakeScheduler(), Said()
        first = hand_over(job, folder, scheduler)["job"]
        scheduler.known[first] = "failed"
        run = run_of(job)
        report, _ = newest_of(run)
        run.store.write(f"submissions/{report.id}.json", b'{"numb')
        assert hand_over(job, folder, scheduler, said)["job"] == make_job_id(run.url, 1)
        assert said.warnings[0] == f"{run.url}: submission {report.id} cannot be read, and is passed over"
        assert newest_of(run)[1].number == 1

    def test_with_more_workers(self, job, folder):
        scheduler, said = FakeScheduler(), Said()
        first = hand_over(job, folder, scheduler)["job"]
        scheduler.known[first] = "failed"
        more = parse(job.text, "digits.yaml", ["workers.num=4"])
        hand_over(more, folder, scheduler, said)
        assert "changed workers.num: 2 -> 4" in said.messages
        run = run_of(job)
        report = run.submissions.newest()
        assert report is not None
        assert run.submissions.read(report.id).description == more.text
        assert not run.exists(), "until its driver has taken the run"

    @pytest.mark.parametrize("has_begun", [False, True])
    def test_with_other_code(self, job, folder, has_begun):
        scheduler, said = FakeScheduler(), Said()
        (folder / "mine.py").write_text("x = 1\n")
        first = hand_over(job, folder, scheduler)["job"]
        scheduler.known[first] = "failed"
        run = run_of(job)
        old = newest_of(run)[1].code_sha256
        if has_begun:
            take_newest(run)
            run.write_description(job.text, {"code": old})
        (folder / "mine.py").write_text("x = 2\n")
        second = hand_over(job, folder, scheduler, said)["job"]
        scheduler.known[second] = "failed"
        new = newest_of(run)[1].code_sha256
        assert f"changed code: {old[:12]} -> {new[:12]}" in said.messages
        (folder / "mine.py").write_text(f"x = {1 if has_begun else 2}\n")
        same = Said()
        hand_over(job, folder, scheduler, same)
        assert not [message for message in same.messages if "changed" in message]

    def test_with_other_data(self, job, folder):
        scheduler = FakeScheduler()
        first = hand_over(job, folder, scheduler)["job"]
        scheduler.known[first] = "failed"
        take_newest(run_of(job))
        run_of(job).write_environment({"data_fingerprint": "cd"})
        run_of(job).write_job(job.text)
        with pytest.raises(DescriptionError, match="data has changed since the run began"):
            hand_over(job, folder, scheduler)

    def test_at_its_last_step(self, job, folder):
        scheduler, said = FakeScheduler(), Said()
        limited = parse(job.text, "digits.yaml", ["train.max_steps=5"])
        hand_over(limited, folder, scheduler)
        run = run_of(job)
        take_newest(run)
        run.write_job(job.text)
        run.take_lease()
        saved.save(run.checkpoints, 5, {"model.safetensors": b""})
        run.write_status({"status": "stopped", "step": 5})
        scheduler.known = dict.fromkeys(scheduler.known, "succeeded")
        assert hand_over(limited, folder, scheduler, said)["status"] == "stopped"
        assert said.messages == [f"{run.url} has reached train.max_steps=5; raise it to go on"]
        hand_over(parse(job.text, "digits.yaml", ["train.max_steps=8"]), folder, scheduler)
        assert [*scheduler.known.values()] == ["succeeded", "stopped", "pending"]


class TestFromItsDirectoryAlone:
    OTHER = RayClusterSpec(address="http://other:8265")

    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)

    @pytest.fixture
    def run(self, job: Description, folder: Path) -> RunDirectory:
        """One that was submitted, and whose job file is gone."""
        (folder / "mine.py").write_text("x = 1\n")
        hand_over(job, folder, FakeScheduler())
        shutil.rmtree(folder)
        return run_of(job)

    def test_on_another_cluster(self, run):
        first = run.submissions.read_newest()[1]
        scheduler, said = FakeScheduler(), Said()
        result = submit_again(run, ["workers.num=4"], scheduler, self.OTHER, said)
        assert result == {
            "run": run.url, "job": make_job_id(run.url, 1), "cluster": self.OTHER.address, "status": "submitted",
        }  # fmt: skip
        assert "changed workers.num: 2 -> 4" in said.messages
        second = run.submissions.read_newest()[1]
        changed = {"number", "job", "cluster", "description", "time"}
        assert {name for name, value in asdict(first).items() if asdict(second)[name] != value} == changed
        assert len(scheduler.commands) == 1

    def test_with_what_it_trained_with(self, run, job):
        report, first = run.submissions.read_newest()
        run.submissions.mark_taken(report.id)
        trained = parse(job.text, "digits.yaml", ["workers.num=3"])
        run.write_job(trained.text)
        code = {"code": first.code_sha256, "code_directory": "data", "working_directory": None, "attempts": [{}]}
        run.write_environment(code)
        submit_again(run, [], FakeScheduler(), self.OTHER, Said())
        second = run.submissions.read_newest()[1]
        assert (second.description, second.code_sha256) == (trained.text, first.code_sha256)
        assert (second.code_directory, second.working_directory) == ("data", None)

    def test_a_limit_that_it_has_reached_is_taken_away(self, run, job):
        limited = parse(job.text, "digits.yaml", ["train.max_steps=5"])
        report, first = run.submissions.read_newest()
        run.submissions.mark_taken(report.id)
        run.write_job(limited.text)
        run.write_environment({"code": first.code_sha256, "attempts": [{}]})
        run.take_lease()
        saved.save(run.checkpoints, 5, {"model.safetensors": b""})
        run.write_status({"status": "stopped", "step": 5})
        said = Said()
        submit_again(run, [], FakeScheduler(), self.OTHER, said)
        assert "changed train.max_steps: 5 -> null" in said.messages

    def test_with_another_description(self, run, job):
        run.write_job(job.text)
        run.write_environment({"code": run.submissions.read_newest()[1].code_sha256, "attempts": [{}]})
        with pytest.raises(DescriptionError, match="exists with another description: seed: 0 -> 1"):
            submit_again(run, ["seed=1"], FakeScheduler(), self.OTHER, Said())

    def test_code_that_is_not_there(self, job, tmp_path):
        run = run_of(job)
        run.write_job(job.text)
        run.write_environment({"import_paths": [str(tmp_path)], "attempts": [{}]})
        with pytest.raises(DescriptionError, match="does not hold the user's code; launcher submit its job file"):
            submit_again(run, [], FakeScheduler(), self.OTHER, Said())
        assert run.submissions.newest() is None


def test_a_cluster_that_takes_no_jobs_is_a_mistake_of_the_description(tmp_path):
    from click.testing import CliRunner

    (tmp_path / "digits.yaml").write_text(JOB.format(store=tmp_path / "store"))
    ended = CliRunner().invoke(main, ["submit", str(tmp_path / "digits.yaml"), "--cluster", "local"])
    assert ended.exit_code == 2
    assert "takes no jobs" in ended.stderr
