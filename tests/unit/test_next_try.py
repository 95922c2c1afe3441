"""The next try of a batch job: what it goes on with, what it leaves, and what it records if it fails."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ClusterError, Interrupted, Requeued
from cluster.host.batch_job import EndsEarly
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission
from launcher.config.description import parse
from launcher.runs import driving
from launcher.runs import resume as resume_module
from launcher.runs.next_try import answered, end
from launcher.runs.resume import resume
from launcher.watching.status import read_status
from tests.launcher_without_ray import Machine
from tests.specs import bare_job
from tests.unit.test_submit import JOB, Said
from tests.unit.test_taking import Training, planned, submit, take

__all__ = ["planned"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(f"{tmp_path}/runs/digits")


@pytest.fixture
def submission_id(run: RunDirectory) -> str:
    """A submission that an earlier try of its job has taken."""
    submission_id = run.submissions.write(
        Submission(
            number=0, job="digits-0", cluster="slurm:here", description=JOB, code_sha256="0", code_directory=None,
            working_directory=None, user="ann", host="laptop", time=7.0, versions={}, git=None,
        )
    )  # fmt: skip
    run.submissions.mark_taken(submission_id)
    return submission_id


def leaves(run: RunDirectory, **status: Any) -> None:
    """The try before ends with this status."""
    before = RunDirectory(run.url)
    before.take_lease()
    before.write_status({"status": "requeued", "step": 3, "requeued": "on SIGUSR1", "error": None, **status})


def submit_since(run: RunDirectory, submission_id: str) -> None:
    """A person submits the run again."""
    before, status = run.submissions.read(submission_id), run.read_status() or {}
    run.submissions.write(replace(before, number=1, time=8.0, claimed=status["claimed"]))


def test_it_knows_how_long_a_save_and_a_validation_take(run: RunDirectory) -> None:
    leaves(run, seconds=1.0, best=None, time={}, last_saves_s=[9.0, 600.0], validation_s=30.0)
    plan: Any = SimpleNamespace(steps_per_epoch=10)
    state = driving._state_so_far(run, bare_job(), plan, [])
    assert (state.last_saves_s, state.validation_s) == ([9.0, 600.0], 30.0)


class TestOneThatFailsBeforeItDrivesTheRun:
    @pytest.mark.parametrize(
        ("error", "status", "text"),
        [
            (ClusterError("node n1: TOKEN is not set"), "failed", "node n1: TOKEN is not set"),
            (ValueError("no login\nat all"), "failed", "no login at all"),
            (KeyboardInterrupt(), "stopped", None),
            (Interrupted("SIGTERM came before training began"), "stopped", None),
        ],
        ids=["an error", "any exception", "a signal", "a late signal"],
    )
    def test_the_run_does_not_wait_any_more(
        self, run: RunDirectory, submission_id: str, error: BaseException, status: str, text: str | None
    ) -> None:
        leaves(run)
        with pytest.raises(type(error)), answered(run, submission_id):
            raise error
        found = run.read_status() or {}
        assert (found["status"], found["error"], found["requeued"], found["step"]) == (status, text, None, 3)
        assert [event["kind"] for event in run.events().read()] == [status]
        assert bool(found["interrupted"]) == (status == "stopped")
        assert run.submissions.standing(submission_id) == "taken"

    @pytest.mark.parametrize("ends", [EndsEarly(), Requeued("x"), SystemExit(75)], ids=repr)
    def test_it_waits_for_another_one(self, run: RunDirectory, submission_id: str, ends: BaseException) -> None:
        leaves(run)
        with pytest.raises(type(ends)), answered(run, submission_id):
            raise ends
        assert (run.read_status() or {})["status"] == "requeued"

    @pytest.mark.parametrize("status", ["running", "completed", "failed"])
    def test_a_run_that_does_not_wait_stays_as_it_is(self, run: RunDirectory, submission_id: str, status: str) -> None:
        leaves(run, status=status)
        before = run.read_status()
        with pytest.raises(ClusterError), answered(run, submission_id):
            raise ClusterError("x")
        assert run.read_status() == before

    def test_nor_does_one_change_a_run_that_another_submission_has(self, run: RunDirectory, submission_id: str) -> None:
        later = run.submissions.write(run.submissions.read(submission_id), "000001-00000000000001-0badcafe")
        leaves(run)
        with pytest.raises(ClusterError), answered(run, later):
            raise ClusterError("x")
        assert (run.read_status() or {})["status"] == "requeued"
        assert run.submissions.read_failure(later) == "x"

    def test_nor_one_that_was_submitted_since(self, run: RunDirectory, submission_id: str) -> None:
        """A later lease would make that submission count no more."""
        leaves(run)
        submit_since(run, submission_id)
        with pytest.raises(ClusterError), answered(run, submission_id):
            raise ClusterError("x")
        assert read_status(run)["status"] == "submitted"


@pytest.mark.parametrize(
    ("cause", "node", "requeues", "folder"),
    [
        ("gpu_lost", "10.0.0.b", "1", "."), ("connection_lost", "10.0.0.b", "1", "."), ("gpu_lost", None, "1", "."),
        ("gpu_lost", "10.0.0.b", "", "."), ("gpu_lost", "10.0.0.b", "1", "none"),
    ],
)  # fmt: skip
def test_one_whose_dry_run_loses_its_gpu_goes_on_without_that_node(
    run: RunDirectory, submission_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cause: Any, node: str | None, requeues: str, folder: str,
) -> None:  # fmt: skip
    path = tmp_path / folder / "lost"
    monkeypatch.setenv("LAUNCHER_JOB_LOST_NODES", str(path))
    monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", requeues)
    error = ClusterError("the GPU failed", cause=cause)
    error.node = node

    def plan(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(resume_module, "plan_to_resume", plan)
    run.write_description(parse(JOB.format(store=tmp_path), "digits.yaml").text, {})
    goes_on = (cause, node, requeues, folder) == ("gpu_lost", "10.0.0.b", "1", ".")
    expected = Requeued if goes_on else ClusterError
    with pytest.raises(expected):
        resume(run, (), Machine(2), Said(), submission_id=submission_id)
    assert (path.exists(), run.submissions.read_tries(submission_id, 0)) == (goes_on, int(goes_on))
    assert not goes_on or path.read_text() == "10.0.0.b\n"


@pytest.mark.usefixtures("planned")
class TestARunThatWasStopped:
    @pytest.fixture
    def run(self, planned: Any) -> RunDirectory:  # noqa: ARG002
        from crashing_file_system import fresh_faults

        fresh_faults()
        return RunDirectory("crash://runs/digits")

    @pytest.fixture
    def taken(self, run: RunDirectory) -> str:
        submission_id, _ = submit(run, 0)
        take(run, submission_id)
        return submission_id

    def leave(self, run: RunDirectory, taken: str) -> dict[str, Any]:
        return resume(run, (), Machine(2), Said(), submission_id=taken)

    def test_it_is_left_as_it_is(self, run: RunDirectory, taken: str) -> None:
        leaves(run, status="stopped", requeued=None, interrupted=False)
        before = run.read_status()
        document = self.leave(run, taken)
        assert (document["status"], run.read_status()) == ("stopped", before)

    @pytest.mark.parametrize("status", ["requeued", "running"])
    def test_one_that_was_asked_to_stop_meanwhile(
        self, run: RunDirectory, taken: str, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("launcher.runs.takeover.is_driven", lambda *_: False)
        leaves(run, status=status)
        run.request_stop()
        assert self.leave(run, taken)["status"] == "stopped"
        assert ((run.read_status() or {})["status"], run.is_stop_requested()) == ("stopped", False)

    def test_a_request_that_comes_while_it_plans_is_for_its_driver(
        self, run: RunDirectory, taken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leaves(run)
        check: Any = resume_module.check_not_driven_since

        def check_and_ask(*arguments: Any, **named: Any) -> None:
            check(*arguments, **named)
            run.request_stop()

        monkeypatch.setattr(resume_module, "check_not_driven_since", check_and_ask)
        with pytest.raises(Training):
            self.leave(run, taken)
        assert run.is_stop_requested()

    def test_a_signal_to_the_driver_alone_does_not_stop_its_job(self, run: RunDirectory, taken: str) -> None:
        """A preempted job gets one, too."""
        leaves(run, status="stopped", requeued=None, interrupted=True)
        with pytest.raises(Training):
            self.leave(run, taken)

    def test_a_person_goes_on_with_it(self, run: RunDirectory, taken: str) -> None:
        del taken
        leaves(run, status="stopped", requeued=None, interrupted=False)
        run.request_stop()
        with pytest.raises(Training):
            resume(run, (), Machine(2), Said())
        assert not run.is_stop_requested()

    def test_a_submission_that_was_stopped_before_is_not_taken(self, run: RunDirectory) -> None:
        submission_id, _ = submit(run, 0)
        run.submissions.mark_stopped(submission_id)
        with pytest.raises(ClusterError, match="was stopped; nothing is left to do for this job$"):
            self.leave(run, submission_id)
        assert not run.exists()


@pytest.mark.usefixtures("planned")
class TestARunThatHasReachedItsLastStep:
    """Its job ended early in that step. Nothing is left to do, so that it must not wait for another try."""

    @pytest.fixture
    def run(self, planned: Any, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:  # noqa: ARG002
        from crashing_file_system import fresh_faults

        fresh_faults()
        run = RunDirectory("crash://runs/digits")
        monkeypatch.setattr(type(run.checkpoints), "steps", lambda _: [5])
        return run

    @pytest.fixture
    def taken(self, run: RunDirectory) -> str:
        submission_id, _ = submit(run, 0, "train.max_steps=6")
        take(run, submission_id)
        leaves(run, step=5)
        return submission_id

    def go_on(self, run: RunDirectory, submission_id: str | None, *overrides: str) -> dict[str, Any]:
        said = Said()
        with answered(run, submission_id):
            document = resume(run, overrides, Machine(2), said, submission_id=submission_id)
        assert any("has reached train.max_steps=5" in message for message in said.messages)
        return document

    def test_it_is_stopped(self, run: RunDirectory, taken: str) -> None:
        document = self.go_on(run, taken, "train.max_steps=5")
        assert (document["status"], document["requeued"]) == ("stopped", None)
        assert (run.read_status() or {})["status"] == "stopped"

    def test_by_another_submission_too(self, run: RunDirectory, taken: str) -> None:
        submit_since(run, taken)
        newest = run.submissions.newest()
        assert newest is not None
        document = self.go_on(run, newest.id, "train.max_steps=5")
        assert (document["status"], document["requeued"]) == ("stopped", None)
        assert read_status(run)["status"] == (run.read_status() or {})["status"] == "stopped"

    def test_a_signal_to_an_earlier_driver_is_none_to_this_one(self, run: RunDirectory, taken: str) -> None:
        """Else the command would exit as if it were interrupted."""
        del taken
        leaves(run, status="stopped", step=5, requeued=None, interrupted=True)
        assert not self.go_on(run, None, "train.max_steps=5")["interrupted"]

    def test_a_driver_that_comes_while_this_one_plans_keeps_it(
        self, run: RunDirectory, taken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        del taken
        rival, plan = RunDirectory(run.url), resume_module.plan_to_resume

        def plan_and_lose(*arguments: Any, **named: Any) -> Any:
            rival.take_lease()
            return plan(*arguments, **named)

        monkeypatch.setattr(resume_module, "plan_to_resume", plan_and_lose)
        assert self.go_on(run, None, "train.max_steps=5")["status"] == "running"
        rival.check_lease()

    @pytest.mark.parametrize("is_next_try", [True, False])
    def test_one_that_was_submitted_since_waits_for_that_job(
        self, run: RunDirectory, taken: str, is_next_try: bool
    ) -> None:
        submit_since(run, taken)
        document = self.go_on(run, taken if is_next_try else None, "train.max_steps=5")
        assert (document["status"], read_status(run)["status"]) == ("submitted", "submitted")


def test_the_end_of_a_run_is_that_of_a_driver_that_has_just_taken_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves(run)
    status, rival = run.read_status() or {}, RunDirectory(run.url)
    append: Any = type(run.events()).append

    def append_late(*arguments: Any) -> None:
        rival.take_lease()
        append(*arguments)

    monkeypatch.setattr(type(run.events()), "append", append_late)
    end(run, status, "failed", "x")
    assert (rival.read_status() or {})["status"] == "running"


def test_the_end_of_a_run_shows_no_secrets(run: RunDirectory) -> None:
    leaves(run)
    end(run, run.read_status() or {}, "failed", "GET https://host/x?X-Amz-Signature=0badcafe failed")
    told = "GET https://host/x?X-Amz-Signature=*** failed"
    assert ((run.read_status() or {})["error"], run.events().read()[-1]["error"]) == (told, told)
