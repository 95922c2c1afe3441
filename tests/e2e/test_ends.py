"""Ends other than the last step: a metric that no longer improves, and a loss that is no number."""

from pathlib import Path

from tests.e2e.command import JOBS, events, launcher


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
