"""A driver takes a run: killed on the way, it leaves a description with its own code; a rival's run it leaves alone."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crashing_file_system import Killed, copy_of_store, fresh_faults, restore

from cluster.errors import ClusterError, Interrupted, Requeued
from cluster.host.batch_job import EndsEarly
from cluster.run.bundle import CodeFile, make_bundle
from cluster.run.lease import SupersededError
from cluster.run.run_directory import RunDirectory
from cluster.run.submissions import SignOfLife, Submission
from cluster.storage.store import Store
from launcher.code.user_code import UserCode, find_code
from launcher.config.description import Description, parse
from launcher.planning.plan import Plan, decide
from launcher.runs import begin as begin_module
from launcher.runs import driving, planning_sign, resumed_plan, takeover
from launcher.runs.begin import begin, plan_only
from launcher.runs.resume import resume
from launcher.watching.status import read_status
from tests.launcher_without_ray import Machine
from tests.processes import wait_until
from tests.schedulers import URL
from tests.unit.test_submit import JOB, TRIED, Said

TEXT = JOB.format(store="crash://runs")
Pair = tuple[str, str | None]
"""A description, and the digest of the code that is used with it."""


class Training(BaseException):
    """The run would be trained now."""


class AtOnce:
    """What ``BackgroundWriter`` does, in the thread that asks for it: a kill there is one of this process."""

    def __init__(self, work: Callable[[], Iterator[None]], *_: Any, **__: Any) -> None:
        self._work = work

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.ask()

    def ask(self) -> None:
        list(self._work())

    def check(self) -> None:
        pass


def plan_with(monkeypatch: pytest.MonkeyPatch, make_plan: Callable[..., Any]) -> None:
    """Has both a run that begins and one that goes on make their plan so."""
    monkeypatch.setattr(begin_module, "make_plan", make_plan)
    monkeypatch.setattr(resumed_plan, "make_plan", make_plan)


@pytest.fixture
def run() -> RunDirectory:
    fresh_faults()
    return RunDirectory("crash://runs/digits")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Pair]:
    """What is planned, the newest last; a plan needs torch and seconds, and no test here trains."""
    pairs: list[Pair] = []

    def make_plan(description: Description, _: str, code: UserCode, *__: Any, may_wait: bool) -> Plan:  # noqa: ARG001
        pairs.append((description.text, code.sha256))
        data = str(description.spec.data.train)
        return decide(description, Store("crash://runs"), replace(TRIED, data_fingerprint=data), None)

    def train(*_: Any) -> None:
        raise Training

    plan_with(monkeypatch, make_plan)
    monkeypatch.setattr(driving, "_open_tracker", train)
    monkeypatch.setattr(planning_sign, "BackgroundWriter", AtOnce)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return pairs


def submit(run: RunDirectory, number: int, *overrides: str) -> tuple[str, Pair]:
    """A submission with code of its own; its id, and what it is to run with."""
    bundle = make_bundle({"mine.py": CodeFile(f"x = {number}\n".encode(), False)})
    run.write_code(bundle.sha256, bundle.data)
    text = parse(TEXT, "digits.yaml", overrides).text
    submission = Submission(
        number=number, job=f"digits-{number}", cluster=URL, description=text, code_sha256=bundle.sha256,
        code_directory=None, working_directory=str(Path.cwd()), user="ann", host="laptop", time=1e9 + number,
        versions={}, git=None,
    )  # fmt: skip
    return run.submissions.write(submission), (text, bundle.sha256)


def take(run: RunDirectory, submission_id: str | None = None) -> None:
    """What a job does for its submission, or a person for none, up to its first worker."""
    with pytest.raises(Training):
        resume(run, (), Machine(2), Said(), take_over=True, submission_id=submission_id)


def stored(run: RunDirectory) -> Pair:
    """What the run directory says."""
    return run.read_job(), find_code(run).sha256


def kills(run: RunDirectory, submission_id: str | None, *overrides: str) -> Iterator[int]:
    """The store as each kill leaves it, before one change after the other that a driver makes before it trains.

    Args:
        run: What is driven.
        submission_id: For which; none: a person changes the run by force.
        overrides: What that person changes.
    """
    content, number, is_killed = copy_of_store(), 0, True
    while is_killed:
        faults = restore(content)
        faults.at = number
        with pytest.raises((Killed, Training)):
            resume(
                RunDirectory(run.url), overrides, Machine(2), Said(), force=bool(overrides), take_over=True,
                submission_id=submission_id,
            )  # fmt: skip
        faults.at, is_killed = None, faults.fired == 1
        yield number
        number += 1
    assert number > 5, "the run is claimed, then described, then the submission is marked"


@pytest.mark.parametrize("who", ["a person", "its job", "the next submission"])
def test_of_a_run_that_has_begun(run, planned, who):
    earlier, before = submit(run, 0)
    take(run, earlier)
    wanted, after = submit(run, 1, "workers.num=1")
    afterwards, last = submit(run, 2, "train.max_steps=5")
    outcomes = set()
    for number in kills(run, wanted):
        pair = stored(run)
        assert pair in (before, after), number
        outcomes.add(pair)
        submission_id = {"a person": None, "its job": wanted, "the next submission": afterwards}[who]
        take(run, submission_id)
        expected = {"a person": pair, "its job": after, "the next submission": last}[who]
        assert (planned[-1], stored(run)) == (expected, expected), number
        assert submission_id is None or run.submissions.standing(submission_id) == "taken"
    assert outcomes == {before, after}


@pytest.mark.parametrize("who", ["a person", "its job", "the next submission"])
def test_of_a_run_that_has_not_begun(run, planned, who):
    """Nothing was trained, so that the next submission may be of other data."""
    wanted, after = submit(run, 0)
    for number in kills(run, wanted):
        if run.exists():
            assert stored(run) == after, number
        elif who == "the next submission":
            afterwards, last = submit(run, 1, "data.train=mine.other")
            take(run, afterwards)
            assert (planned[-1], stored(run)) == (last, last), number
            continue
        take(run, wanted if who == "its job" else None)
        assert (planned[-1], stored(run)) == (after, after), number


def test_of_one_that_a_person_changes_by_force(run, planned):
    """What it began with is told of the description that it has."""
    submission_id, before = submit(run, 0)
    take(run, submission_id)
    for number in kills(run, None, "data.train=mine.other"):
        take(run)  # else it is refused: its data would have changed
        assert planned[-1][1] == before[1], number


@pytest.mark.parametrize("is_early", [True, False])
def test_a_stop_is_for_the_driver_that_has_the_run_when_it_comes(run, planned, monkeypatch, is_early):
    submission_id, pair = submit(run, 0)
    take_lease = RunDirectory.take_lease

    def take_and_be_seen(directory: RunDirectory) -> None:
        take_lease(directory)
        if not is_early:
            run.request_stop()  # the run is running, for all who look

    monkeypatch.setattr(RunDirectory, "take_lease", take_and_be_seen)
    if is_early:
        run.request_stop()
    take(run, submission_id)
    assert (planned[-1], run.is_stop_requested()) == (pair, not is_early)


def test_a_person_is_told_that_the_code_at_hand_is_not_used(run, planned, tmp_path):
    submission_id, pair = submit(run, 0)
    take(run, submission_id)
    said = Said()
    with pytest.raises(Training):
        begin(parse(TEXT, "digits.yaml"), tmp_path / "job", Machine(2), said, take_over=True)
    assert planned[-1] == pair
    assert f"running with the code that was submitted, not with {tmp_path}/job" in said.messages


@pytest.mark.parametrize("has_begun", [True, False])
@pytest.mark.parametrize("take_over", [True, False])
def test_who_takes_a_run_over_waits_for_no_room(run, planned, monkeypatch, tmp_path, take_over, has_begun):  # noqa: ARG001
    """The driver that is to be replaced has it."""
    may_wait, make_plan = list[bool](), begin_module.make_plan

    def plan(*arguments: Any, **options: Any) -> Plan:
        may_wait.append(options["may_wait"])
        return make_plan(*arguments, **options)

    if has_begun:
        take(run, submit(run, 0)[0])
        run.write_status({"status": "stopped", "step": 0})
    plan_with(monkeypatch, plan)
    with pytest.raises(Training):
        begin(parse(TEXT, "digits.yaml"), tmp_path, Machine(2), Said(), take_over=take_over)
    assert may_wait == [not take_over]


@pytest.mark.parametrize("who", ["its job", "a person"])
def test_while_it_plans_a_job_says_elsewhere_what_it_is_at(run, planned, monkeypatch, who):  # noqa: ARG001
    """A person who takes the submission at home says nothing for the job, which lives or not."""
    submission_id, _ = submit(run, 0)
    make_plan, said, signs = begin_module.make_plan, Said(), list[SignOfLife | None]()
    is_job = who == "its job"

    def plan(*arguments: Any, **options: Any) -> Plan:
        arguments[4]("waiting for room")
        wait_until(lambda: not is_job or run.submissions.read_sign(submission_id) is not None)
        signs.append(run.submissions.read_sign(submission_id))
        return make_plan(*arguments, **options)

    plan_with(monkeypatch, plan)
    if not is_job:
        monkeypatch.delattr(planning_sign, "BackgroundWriter")
    with pytest.raises(Training):
        resume(run, (), Machine(2), said, submission_id=submission_id if is_job else None)
    assert [sign and sign.doing for sign in signs] == ["waiting for room" if is_job else None]
    assert "waiting for room" in said.phases
    assert run.submissions.read_sign(submission_id) is None, "it has taken the run"


def test_nor_does_a_plan_alone(planned, monkeypatch, tmp_path):  # noqa: ARG001
    may_wait: list[bool] = []
    plan_with(monkeypatch, lambda *_, **options: may_wait.append(options["may_wait"]))
    plan_only(parse(TEXT, "digits.yaml"), tmp_path, Machine(2), Said())
    assert may_wait == [False]


class TestARunThatSomebodyElseTakesWhileThisProcessPlans:
    """The plan waits for room, for an hour at most."""

    @pytest.fixture
    def meanwhile(self, planned, monkeypatch) -> list[Callable[[], object]]:  # noqa: ARG002  # it plans before this
        """What others do before the plan is made."""
        others: list[Callable[[], object]] = []
        make_plan = begin_module.make_plan

        def plan_late(*arguments: Any, may_wait: bool) -> Plan:
            while others:
                others.pop()()
            return make_plan(*arguments, may_wait=may_wait)

        plan_with(monkeypatch, plan_late)
        return others

    def rival(self, run: RunDirectory, *overrides: str) -> RunDirectory:
        """The run as another process drives it."""
        other = RunDirectory(run.url)
        other.take_lease()
        other.write_description(parse(TEXT, "digits.yaml", overrides).text, {"attempts": [{}]})
        return other

    def is_left_alone(self, drive: Callable[[], object]) -> None:
        with pytest.raises(ClusterError) as caught:
            drive()
        assert "has driven it since this process looked at it; nothing was changed here: look at" in str(caught.value)

    def test_a_job_leaves_it_to_the_person_at_home(self, run, meanwhile):
        submission_id, _ = submit(run, 0, "train.max_steps=5")
        meanwhile.append(lambda: self.rival(run))
        self.is_left_alone(lambda: resume(run, (), Machine(2), Said(), submission_id=submission_id))
        assert run.read_job() == parse(TEXT, "digits.yaml").text
        assert run.submissions.standing(submission_id) == "due"

    def test_a_job_leaves_it_to_one_on_another_cluster(self, run, meanwhile):
        """That has ended, and is of the same description: it may have gone on to other weights."""
        first, _ = submit(run, 0)
        second, _ = submit(run, 1)

        def take_and_end() -> None:
            take(run, first)
            run.write_status({"status": "stopped", "step": 3})

        meanwhile.append(take_and_end)
        self.is_left_alone(lambda: resume(run, (), Machine(2), Said(), submission_id=second))
        assert run.read_status()["status"] == "stopped"

    @pytest.mark.parametrize("take_over", [False, True])
    def test_a_person_at_home_leaves_it_to_a_job(self, run, meanwhile, tmp_path, take_over):
        meanwhile.append(lambda: self.rival(run, "train.max_steps=5"))
        description = parse(TEXT, "digits.yaml")
        self.is_left_alone(lambda: begin(description, tmp_path, Machine(2), Said(), take_over=take_over))
        assert run.read_job() == parse(TEXT, "digits.yaml", ["train.max_steps=5"]).text

    def test_a_driver_that_has_not_described_it_yet(self, run, planned, tmp_path):
        RunDirectory(run.url).take_lease()
        with pytest.raises(ClusterError, match="is running it; stop it with"):
            begin(parse(TEXT, "digits.yaml"), tmp_path, Machine(2), Said())
        assert planned == []

    def test_a_driver_that_seemed_to_be_gone_writes_again(self, run, meanwhile, monkeypatch):
        other = self.rival(run)
        monkeypatch.setattr(takeover, "is_driven", lambda *_: False)
        meanwhile.append(lambda: other.write_status({"status": "running", "step": 4}))
        self.is_left_alone(lambda: resume(run, (), Machine(2), Said()))
        other.check_lease()

    @pytest.mark.parametrize("job", ["7", "8"])
    def test_an_earlier_try_of_the_same_job_may_write_on(self, run, meanwhile, monkeypatch, job):
        """The scheduler has lost its node, and the store has not."""
        submission_id, _ = submit(run, 0)
        monkeypatch.setenv("LAUNCHER_JOB_ID", "7")
        take(run, submission_id)
        other = self.rival(run)
        other.write_status({"status": "running", "step": 3})
        monkeypatch.setenv("LAUNCHER_JOB_ID", job)
        meanwhile.append(lambda: other.write_status({"status": "running", "step": 4}))
        expected = Training if job == "7" else ClusterError
        with pytest.raises(expected):
            resume(run, (), Machine(2), Said(), submission_id=submission_id)
        if job == "7":
            with pytest.raises(SupersededError):
                other.check_lease()

    def test_a_driver_that_is_taken_over_from_may_write_on(self, run, meanwhile):
        other = self.rival(run)
        meanwhile.append(lambda: other.write_status({"status": "running", "step": 4}))
        take(run)
        with pytest.raises(SupersededError):
            other.check_lease()


def test_a_submission_that_is_withdrawn_while_its_job_plans(
    run: RunDirectory, planned: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its submitter has found that somebody else was faster."""
    submission_id, pair = submit(run, 0)
    make_plan: Any = begin_module.make_plan

    def make_plan_and_withdraw(*args: Any, **named: Any) -> Plan:
        run.submissions.withdraw(submission_id)
        return make_plan(*args, **named)

    plan_with(monkeypatch, make_plan_and_withdraw)
    with pytest.raises(ClusterError, match="was withdrawn; nothing is left to do for this job$"):
        resume(run, (), Machine(2), Said(), submission_id=submission_id)
    assert (planned, run.read_status(), run.exists()) == ([pair], None, False)


class TestBatchJob:
    """A job that has to end before it has the run, and starts again."""

    @pytest.fixture(autouse=True)
    def _handlers_are_put_back(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGUSR1)
        yield
        signal.signal(signal.SIGUSR1, before)

    def test_one_that_ends_early_while_it_plans_takes_the_run_in_its_next_try(self, run, planned, monkeypatch):
        submission_id, wanted = submit(run, 0)

        def end_early(*_: Any, **__: Any) -> Plan:
            raise EndsEarly

        with monkeypatch.context() as while_planning:
            plan_with(while_planning, end_early)
            with pytest.raises(EndsEarly), run.submissions.answered(submission_id):
                resume(run, (), Machine(2), Said(), submission_id=submission_id)
        assert not run.exists()
        told = read_status(run)
        assert (told["status"], told["waits_for"]) == ("submitted", None)
        for _ in range(2):  # the next try takes the submission, and the one after that goes on with it
            take(run, submission_id)
            assert (stored(run), planned[-1], run.submissions.standing(submission_id)) == (wanted, wanted, "taken")

    @pytest.mark.parametrize(
        ("numbers", "requeues", "error"),
        [
            ((signal.SIGUSR1,), "1", Requeued),
            ((signal.SIGUSR1,), "", Interrupted),
            ((signal.SIGTERM,), "1", Interrupted),
            ((signal.SIGUSR1, signal.SIGTERM), "1", Interrupted),
            ((signal.SIGTERM, signal.SIGUSR1), "1", Interrupted),
        ],
    )
    def test_a_signal_that_comes_while_ray_starts(self, monkeypatch, numbers, requeues, error):
        class Starting(Machine):
            def started(self) -> AbstractContextManager[None]:
                for number in numbers:
                    signal.raise_signal(number)
                return super().started()

        monkeypatch.setenv("LAUNCHER_JOB_REQUEUES", requeues)
        with (
            pytest.raises(error, match=f"{numbers[0].name} came before training began; nothing was changed"),
            driving.ready_to_drive(Starting(2), Said()),
        ):
            raise AssertionError("nothing is driven")
