"""Ends other than the last step: a stalled metric, a loss that is no number, a request from outside, a time limit."""

import tempfile
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, checkpointed, events, launcher


@pytest.mark.slow
def test_a_run_that_stalls_is_complete(tmp_path: Path) -> None:
    """The second validation is not better by as much as is asked for."""
    rule = "train.early_stop={metric: val/loss, mode: min, patience: 1, min_delta: 100}"
    ended = launcher("run", JOBS / "digits.yaml", rule, "tracking.mode=disabled", "--json", cwd=tmp_path)

    assert ended.exit_code == 0, ended.stderr
    assert (ended.document["status"], ended.document["step"]) == ("completed", 44)
    (event,) = events(tmp_path / "runs/digits", "early_stop")
    assert event["step"] == 44
    assert "early stop: val/loss has not improved on" in ended.stderr

    again = launcher("resume", "runs/digits", "--json", cwd=tmp_path)
    assert (again.exit_code, again.document["step"], again.document["attempts"]) == (0, 44, 1)


def test_a_loss_that_is_no_number_ends_the_run_with_its_samples_and_the_newest_checkpoint(tmp_path: Path) -> None:
    overrides = ("optimizer.lr=1e30", "checkpoint.every_steps=1", "tracking.mode=disabled")
    ended = launcher("run", JOBS / "digits.yaml", *overrides, "--json", cwd=tmp_path)

    assert ended.exit_code == 1, ended.stderr
    error = ended.document["error"]
    assert "\n" not in error
    assert "the loss is nan, in shard 0, 1, 2, 3: samples " in error
    assert error.endswith("; the newest checkpoint is of step 1")
    assert ended.document["status"] == "failed"


def test_a_run_is_stopped_from_elsewhere(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "runs/digits", tmp_path / "elsewhere"
    elsewhere.mkdir()
    overrides = ("train.epochs=1000", "checkpoint.every_steps=10", "tracking.mode=disabled", "--json")
    running = Running(["run", JOBS / "digits.yaml", *overrides], tmp_path)
    running.wait_until(checkpointed(run, 10))
    asked = launcher("stop", run, "--json", cwd=elsewhere)
    ended = running.wait()

    assert (asked.exit_code, asked.document["status"]) == (0, "stopped"), asked.stderr
    assert (ended.exit_code, ended.document["status"]) == (0, "stopped"), ended.stderr
    assert checkpointed(run, ended.document["step"])(), "it saves before it stops"
    (event,) = events(run, "stop_requested")
    assert event["reason"] == "stopping as asked by launcher stop"
    again = launcher("stop", run, "--json", cwd=elsewhere)
    assert (again.exit_code, again.document["step"]) == (0, ended.document["step"]), "it is left as it is"
    assert not (run / "stop.json").exists()


def test_a_run_stops_at_its_time_limit(tmp_path: Path) -> None:
    """The limit passes before the workers train: the first report of a step ends it."""
    overrides = ("train.epochs=100", "train.max_seconds=0.001", "tracking.mode=disabled")
    ended = launcher("run", JOBS / "digits.yaml", *overrides, "--json", cwd=tmp_path)

    assert (ended.exit_code, ended.document["status"]) == (0, "stopped"), ended.stderr
    assert 0 < ended.document["step"] < 220, "a tenth of the run"
    assert checkpointed(tmp_path / "runs/digits", ended.document["step"])()
    assert "stopping at train.max_seconds=0.001:" in ended.stderr


@pytest.mark.slow
def test_a_run_whose_ray_does_not_start_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that exists, whether it is resumed or branched from, stays as it was."""
    run = tmp_path / "runs/digits"
    overrides = ("train.max_steps=3", "tracking.mode=disabled", "--json")
    begun = launcher("run", JOBS / "digits.yaml", *overrides, cwd=tmp_path)
    assert begun.exit_code == 0, begun.stderr
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    folder = tempfile.mkdtemp()  # a shorter path than a test's own folder has
    (Path(folder) / "ray").touch()
    monkeypatch.setenv("RAY_TMPDIR", folder)
    for command in (
        ("run", JOBS / "digits.yaml", "name=other", *overrides),
        ("resume", run, "train.max_steps=6", "--json"),
        ("resume", run, "train.max_steps=6", "--as", "branch", "--json"),
    ):
        ended = launcher(*command, cwd=tmp_path, on_ray=True)
        assert ended.exit_code == 5, ended.stderr
        assert ended.document["status"] == "failed"
        assert ended.document["error"].startswith("Ray did not start on this machine: ")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits"]
