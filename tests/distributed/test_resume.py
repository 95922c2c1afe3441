"""A run that was cut into pieces, on different workers, equals the one that was not."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.run.manifest import FileEntry
from jobs.spec import CheckpointSpec, Target
from tests.distributed.small_job import STEPS, STEPS_PER_EPOCH, UNFROZEN_FROM_STEP, full_job
from tests.distributed.team_process import Outcome, run_directory, run_job, run_processes, train_job


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        pytest.param(UNFROZEN_FROM_STEP - 1, 2, 3, id="before the unfreezing"),
        pytest.param(UNFROZEN_FROM_STEP, 3, 2, id="at the unfreezing"),
        pytest.param(UNFROZEN_FROM_STEP + 3, 4, 1, id="after the unfreezing"),
    ],
)
def test_a_limit_and_a_resume_with_other_workers_change_nothing(
    undisturbed: Outcome, tmp_path: Path, step: int, before: int, after: int
) -> None:
    first = run_job(full_job(tmp_path, "run", max_steps=step), world_size=before)
    second = run_job(full_job(tmp_path, "run"), world_size=after)

    assert (max(first.digests), second.started) == (step, step)
    assert first.rows + second.rows == undisturbed.rows
    assert second.digest == undisturbed.digest


def test_a_limit_leaves_no_row_that_a_run_without_it_has_not(undisturbed: Outcome, tmp_path: Path) -> None:
    first = run_job(full_job(tmp_path, "run", log_every_steps=5, max_steps=3), world_size=1)
    second = run_job(full_job(tmp_path, "run", log_every_steps=5), world_size=2)

    assert first.rows == []
    assert second.rows == [row for row in undisturbed.rows if row["step"] in (4, 5, 8, 10, 12)], "epochs have 4 steps"


def test_a_wish_to_stop_is_heard_by_all_at_one_step_and_changes_nothing(undisturbed: Outcome, tmp_path: Path) -> None:
    job = replace(full_job(tmp_path, "run"), checkpoint=CheckpointSpec())
    first = run_job(job, world_size=3, stop_after=2)
    second = run_job(job, world_size=2)

    stopped_at = first.rows[-1]["step"]
    assert 2 < stopped_at < STEPS
    assert stopped_at % STEPS_PER_EPOCH, "the stop is in mid-epoch"
    assert (max(first.digests), second.started) == (stopped_at, stopped_at)
    assert first.rows + second.rows == undisturbed.rows
    assert second.digest == undisturbed.digest


def test_a_run_resumes_from_the_checkpoint_before_a_corrupt_one(undisturbed: Outcome, tmp_path: Path) -> None:
    job = full_job(tmp_path, "run")
    first = run_job(full_job(tmp_path, "run", max_steps=8), world_size=2)
    checkpoints = run_directory(job).checkpoints
    part = checkpoints.manifest(8).part(("model.safetensors", 0))
    weights = Path(run_directory(job).url, "checkpoints", part.object)
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])

    second = run_job(job, world_size=3)

    assert (second.fell_back, second.started) == ([8], 6)
    assert first.rows[:6] + second.rows == undisturbed.rows
    assert second.digest == undisturbed.digest


def test_a_checkpoint_in_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    """Its bytes are those that were written. If an older launcher went back, the run would lose what is trained."""
    job = full_job(tmp_path, "run")
    run_job(full_job(tmp_path, "run", max_steps=6), world_size=2)
    checkpoints = run_directory(job).checkpoints
    manifest = checkpoints.manifest(6)
    name = "optimizer.safetensors"
    other = FileEntry((checkpoints.write_part(6, (name, 0), b"\xff" * 50),))
    checkpoints.commit(replace(manifest, files={**manifest.files, name: other}))

    outcome = run_processes(train_job, job, world_size=2)

    assert outcome.fell_back == []
    assert [text.partition(":")[0] for text in outcome.failures.values()] == ["the checkpoint cannot be decoded"] * 2


def test_a_completed_run_is_not_trained_again(tmp_path: Path) -> None:
    job = full_job(tmp_path, "run", epochs=1)
    first, second = run_job(job, world_size=2), run_job(job, world_size=2)

    assert (second.started, second.rows, second.digests) == (STEPS_PER_EPOCH, [], {})
    assert set(second.results.values()) == {first.digest}


def test_a_changed_rate_holds_from_the_resume_on(undisturbed: Outcome, tmp_path: Path) -> None:
    """As forced by hand: moments stay, rates are the new description's, as its schedule has them by then."""
    run_job(full_job(tmp_path, "run", max_steps=6), world_size=2)
    job = full_job(tmp_path, "run")
    optimizer = replace(job.optimizer, factory=Target("SGD", {**job.optimizer.factory.args, "lr": 0.2}))
    second = run_job(replace(job, optimizer=optimizer), world_size=2)

    assert [(row["lr/0"], row["lr/1"]) for row in second.rows] == [(0.05, 0.1)] * 4 + [(0.025, 0.05)] * 2
    assert [row["lr/0"] for row in undisturbed.rows[6:]] == [0.025] * 4 + [0.0125] * 2
    assert second.rows[0]["train/loss"] == undisturbed.rows[6]["train/loss"], "the weights are the checkpoint's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factory": Target("Adam", {"lr": 0.1})}, "optimizer._target_ changed"),
        ({"groups": ()}, "the parameters of optimizer.groups changed"),
    ],
    ids=["optimizer", "groups"],
)
def test_another_optimizer_cannot_go_on(tmp_path: Path, change: dict[str, object], message: str) -> None:
    run_job(full_job(tmp_path, "run", max_steps=3), world_size=1)
    job = full_job(tmp_path, "run")
    outcome = run_processes(train_job, replace(job, optimizer=replace(job.optimizer, **change)), world_size=1)

    assert f"checkpoints/step-00000003: does not fit the job: {message}" in outcome.failures[0]
