"""A job that brings its own nodes inspects them before workers start, in every try."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.capacity import Capacity
from cluster.errors import ClusterError, DescriptionError
from cluster.run.bundle import make_bundle
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission
from cluster.scheduler import ClusterReport, Needs
from launcher.cli import main
from launcher.config.description import parse
from launcher.planning.nodes import own_versions
from launcher.runs import resumed_plan
from launcher.runs.resume import resume
from tests.launcher_without_ray import Machine
from tests.schedulers import a_cluster, a_node, a_report, answered
from tests.unit.test_submit import JOB, Said


class Planned(BaseException):
    """The run would be planned now, and trained next."""


class Nodes(Machine):
    """The nodes of a job, which report what a test gives them."""

    is_this_machine = False

    def __init__(self, report: ClusterReport) -> None:
        super().__init__(2)
        self.has, self.asked = report, list[Needs]()

    @contextmanager
    def joined(self) -> Iterator[None]:
        yield

    def capacity(self) -> Capacity:  # type: ignore[override]
        return self.has.capacity

    def inspect(self, needs: Needs) -> ClusterReport:
        self.asked.append(needs)
        return answered(self.has, needs)


@pytest.fixture(autouse=True)
def _planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make_plan(*_: Any, **__: Any) -> None:
        raise Planned

    monkeypatch.setattr(resumed_plan, "make_plan", make_plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(f"{tmp_path}/runs/digits")


@pytest.fixture
def submission_id(run: RunDirectory) -> str:
    bundle = make_bundle({})
    run.write_code(bundle.sha256, bundle.data)
    text = parse(JOB.format(store=run.url.rpartition("/")[0]), "digits.yaml").text
    return run.submissions.write(
        Submission(
            number=0, job="digits-0", cluster="slurm:here", description=text, code_sha256=bundle.sha256,
            code_directory=None, working_directory=None, user="ann", host="laptop", time=7.0, versions={}, git=None,
        )
    )  # fmt: skip


def drive(run: RunDirectory, submission_id: str, nodes: Nodes, said: Said | None = None) -> None:
    with run.submissions.answered(submission_id):
        resume(run, (), nodes, said or Said(), submission_id=submission_id, inspects=("TOKEN",))


def test_nodes_that_are_fit_are_planned_for(run, submission_id):
    nodes, said = Nodes(a_cluster(a_node("n1"), a_node("n2"))), Said()
    with pytest.raises(Planned):
        drive(run, submission_id, nodes, said)
    (needs,) = nodes.asked
    assert (needs.store, needs.variables) == (run.url.rpartition("/")[0], ("TOKEN",))
    assert said.phases[0] == "inspecting the nodes"
    sign = run.submissions.read_sign(submission_id)
    assert sign is not None, "and everybody can read what the job is doing"


def test_a_try_after_the_first_may_have_other_nodes(run, submission_id):
    run.submissions.mark_taken(submission_id)
    submission = run.submissions.read(submission_id)
    run.write_description(submission.description, {"code": submission.code_sha256, "attempts": [{}]})
    nodes = Nodes(a_cluster())
    with pytest.raises(Planned):
        drive(run, submission_id, nodes)
    assert len(nodes.asked) == 1


MINE = own_versions()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missing": ("TOKEN",)}, "environment variables: n2 lacks TOKEN; set them where its nodes start"),
        (
            {"versions": {"ray": "2.1.0"}},
            f"versions differ: ray {MINE['ray']} on n1, this machine, 2.1.0 on n2; install the same everywhere",
        ),
        (
            {"store_error": "cannot be written"},
            "the store cannot be used from n2: cannot be written; use one that every node reaches, such as "
            "s3://bucket/runs",
        ),
    ],
)
def test_nodes_that_are_not_fit_end_the_job_before_workers_start(run, submission_id, changes, message):
    nodes = Nodes(a_cluster(a_node("n1"), a_node("n2"), reports=(a_report("n1"), a_report("n2", **changes))))
    with pytest.raises(ClusterError) as caught:
        drive(run, submission_id, nodes)
    assert str(caught.value) == f"the nodes of this job: {message}"
    assert run.submissions.read_failure(submission_id) == str(caught.value), "from anywhere"
    assert not run.exists()


@pytest.mark.parametrize("by", ["person", "next try"])
def test_a_person_learns_that_its_job_is_to_start_it_again(run, submission_id, by):
    said = Said()
    run.submissions.mark_taken(submission_id)
    submission = run.submissions.read(submission_id)
    run.write_description(submission.description, {"code": submission.code_sha256, "attempts": [{}]})
    run.take_lease()
    run.write_status({"status": "requeued", "step": 7})
    with pytest.raises(Planned):
        resume(run, (), Nodes(a_cluster()), said, submission_id=submission_id if by == "next try" else None)
    warned = [text for text in said.warnings if "job digits-0 on slurm:here is to start it again, too" in text]
    assert len(warned) == (by == "person")


def test_what_a_person_resumes_is_not_inspected(run, submission_id):
    nodes = Nodes(a_cluster())
    with pytest.raises(Planned):
        resume(run, (), nodes, Said(), submission_id=submission_id)
    assert nodes.asked == []


@pytest.mark.parametrize("is_inspected", [False, True])
def test_the_command_names_the_variables_as_those_of_the_cluster(run, submission_id, monkeypatch, is_inspected):
    nodes = Nodes(a_cluster())
    monkeypatch.setattr("launcher.config.clusters.open_cluster", lambda _: nodes)
    words = ["resume", run.url, "--submission", submission_id, *["--inspect"] * is_inspected]
    with pytest.raises(Planned):
        CliRunner().invoke(
            main, [*words, "--cluster", "head:6379", 'cluster.env=["A", "B"]'], catch_exceptions=False
        )  # fmt: skip
    assert [needs.variables for needs in nodes.asked] == [("A", "B")] * is_inspected


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--standby", "--inspect", "--submission", "x"], "--standby: is for jobs of submit; leave out --at, --as, "),
        (["--inspect"], "--inspect: is for jobs of submit, which name their --submission; leave it out"),
    ],
)
def test_by_hand(run, words, error):
    ended = CliRunner().invoke(main, ["resume", run.url, *words])
    assert ended.exit_code == DescriptionError.exit_code
    assert ended.stderr.startswith(f"error: {error}")
