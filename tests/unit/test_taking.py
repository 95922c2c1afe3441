"""A driver is killed while it takes a run for a submission: whoever comes next has a description and its own code."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crashing_file_system import Killed, copy_of_store, fresh_faults, restore

from cluster.bundle import CodeFile, make_bundle
from cluster.run_directory import RunDirectory
from cluster.storage import Store
from cluster.submissions import Submission
from launcher import runs
from launcher.description import Description, parse
from launcher.plan import Plan, decide
from launcher.runs import resume
from launcher.user_code import UserCode, find_code
from tests.launcher_without_ray import Machine
from tests.schedulers import URL
from tests.unit.test_submit import JOB, TRIED, Said

TEXT = JOB.format(store="crash://runs")
Pair = tuple[str, str | None]
"""A description, and the digest of the code that is used with it."""


class Training(BaseException):
    """The run would be trained now."""


@pytest.fixture
def run() -> RunDirectory:
    fresh_faults()
    return RunDirectory("crash://runs/digits")


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Pair]:
    """What is planned, the newest last; a plan needs torch and seconds, and no test here trains."""
    pairs: list[Pair] = []

    def make_plan(description: Description, _: str, code: UserCode, *__: Any) -> Plan:
        pairs.append((description.text, code.sha256))
        data = str(description.spec.data.train)
        return decide(description, Store("crash://runs"), replace(TRIED, data_fingerprint=data), None)

    def train(*_: Any) -> None:
        raise Training

    monkeypatch.setattr(runs, "make_plan", make_plan)
    monkeypatch.setattr(runs, "_open_tracker", train)
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
