"""The next try of a batch job: what it goes on with, what it leaves, and what it records if it fails."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import ClusterError, DescriptionError, Interrupted, Requeued, StorageError
from cluster.host.batch_job import EndsEarly
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import Submission
from cluster.storage.store import Store
from launcher.config.description import parse
from launcher.runs import driving, next_try
from launcher.runs import resume as resume_module
from launcher.runs.next_try import answered, bounded_tries, end
from launcher.runs.resume import resume
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
    assert (path.exists(), run.submissions.read_tries(submission_id)) == (goes_on, int(goes_on))
    assert not goes_on or path.read_text() == "10.0.0.b\n"


class TestTriesWithoutProgress:
    @pytest.fixture
    def tried(self, run: RunDirectory, submission_id: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", str(int(time.time()) + 300))
        steps = [0]
        monkeypatch.setattr(next_try, "_newest_step", lambda _: steps[0])

        def tried(why: str | BaseException, *, advances: bool = False) -> None:
            def drive() -> dict[str, Any]:
                steps[0] += advances
                if isinstance(why, BaseException):
                    raise why
                return {"status": "requeued", "requeued": why}

            bounded_tries(run, submission_id, drive)

        return tried

    WHYS = ("on SIGUSR1", "at the time limit of its job", "to go on without node 10.0.0.b")

    @pytest.mark.parametrize("last", WHYS)
    def test_the_third_one_in_a_row_is_the_last(self, tried: Callable[..., None], last: str) -> None:
        for why in self.WHYS[:2]:
            tried(why)
        with pytest.raises(ClusterError) as caught:
            tried(last)
        assert "3 tries of its batch job in a row ended without a newer checkpoint" in str(caught.value)
        assert f"this one {last}; there is none yet; " in str(caught.value)
        assert ("launcher logs" in str(caught.value)) == ("without node" in last)
        tried(last)  # a person has started it again

    @pytest.mark.parametrize("early", [EndsEarly(), Requeued("SIGUSR1 came before training began")], ids=repr)
    def test_one_that_plans_counts_too(self, tried: Callable[..., None], early: BaseException) -> None:
        for _ in range(2):
            with pytest.raises(type(early)):
                tried(early)
        with pytest.raises(ClusterError, match="this one on SIGUSR1 before training began; "):
            tried(early)

    def test_a_newer_checkpoint_clears_the_count(self, tried: Callable[..., None]) -> None:
        for advances in (False, False, True, False, False):
            tried("at the time limit of its job", advances=advances)
        with pytest.raises(ClusterError, match="; the newest is of step 1; "):
            tried("at the time limit of its job")

    def test_a_preempted_one_says_nothing_of_the_run(
        self, tried: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for limit in ("", str(int(time.time()) + 3600)):
            monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", limit)
            for _ in range(5):
                tried("on SIGUSR1")
                with pytest.raises(EndsEarly):
                    tried(EndsEarly())
        for _ in range(2):
            tried("to go on without node 10.0.0.b")
        with pytest.raises(ClusterError):
            tried("to go on without node 10.0.0.b")

    def test_one_that_ends_in_another_way_is_not_counted(self, run: RunDirectory, submission_id: str) -> None:
        def refuse() -> dict[str, Any]:
            raise DescriptionError("x")

        for _ in range(5):
            bounded_tries(run, submission_id, lambda: {"status": "stopped", "requeued": None})
            with pytest.raises(DescriptionError):
                bounded_tries(run, submission_id, refuse)
        assert run.submissions.read_tries(submission_id) == 0

    @pytest.mark.parametrize("status", ["completed", "requeued"])
    def test_a_store_that_is_away_afterwards_does_not_change_how_one_ends(
        self, run: RunDirectory, submission_id: str, monkeypatch: pytest.MonkeyPatch, status: str
    ) -> None:
        def fail(*_: Any) -> None:
            raise StorageError("the store is away")

        def goes_away() -> None:
            for name in ("exists", "names", "read", "write"):
                monkeypatch.setattr(Store, name, fail)

        def drive() -> dict[str, Any]:
            goes_away()
            return {"status": status, "requeued": "on SIGUSR1"}

        def end_early() -> dict[str, Any]:
            goes_away()
            raise EndsEarly

        with monkeypatch.context() as monkeypatch:
            assert bounded_tries(run, submission_id, drive)["status"] == status
        with monkeypatch.context() as monkeypatch, pytest.raises(EndsEarly):
            bounded_tries(run, submission_id, end_early)


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

    def test_one_that_has_reached_its_last_step(self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its job ended early in the last step; nothing is left to do, so that it must not wait for another try."""
        submission_id, _ = submit(run, 0, "train.max_steps=5")
        take(run, submission_id)
        leaves(run, step=5)
        monkeypatch.setattr(type(run.checkpoints), "steps", lambda _: [5])
        said = Said()
        document = resume(run, (), Machine(2), said, submission_id=submission_id)
        assert (document["status"], document["requeued"]) == ("stopped", None)
        assert (run.read_status() or {})["status"] == "stopped"
        assert any("has reached train.max_steps=5" in message for message in said.messages)

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
