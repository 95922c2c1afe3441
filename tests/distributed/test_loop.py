"""What the loop does between plain steps: scales, clips, skips, validates, and ends early; alike for any workers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.data.loader import seed_host_draws
from jobs.sampling import StepPlan, draw_key
from jobs.spec import CheckpointSpec, DataSpec, EarlyStopSpec, JobSpec, LossSpec, OptimizerSpec, Target
from tests.distributed.small_job import CLASSES, SAMPLES, STEPS_PER_EPOCH, Images, Net, full_job, images, plain_job
from tests.distributed.team_process import Outcome, newest_state, run_job, run_processes, train_job


class BadImages(Images):
    """Images, one of which cannot be read."""

    def __init__(self, length: int, bad: int) -> None:
        super().__init__(length)
        self._bad = bad

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if number == self._bad:
            raise OSError(f"sample {number} is bad")
        return super().__getitem__(number)


def assert_same(outcome: Outcome, other: Outcome) -> None:
    assert (outcome.rows, outcome.digests, outcome.events) == (other.rows, other.digests, other.events)


def test_float16_gives_the_same_bits_and_keeps_its_scale(undisturbed: Outcome, tmp_path: Path) -> None:
    alone, together = (
        run_job(full_job(tmp_path, f"run-{workers}", precision="fp16", epochs=1), workers) for workers in (1, 3)
    )
    assert_same(together, alone)
    losses, losses_in_float32 = ([row["train/loss"] for row in run.rows[:4]] for run in (alone, undisturbed))
    assert losses == pytest.approx(losses_in_float32, rel=0.01)  # float16 holds 3 digits

    first = run_job(full_job(tmp_path, "cut", precision="fp16", epochs=1, max_steps=2), world_size=2)
    second = run_job(full_job(tmp_path, "cut", precision="fp16", epochs=1), world_size=1)
    assert first.rows + second.rows == alone.rows
    assert second.digest == alone.digest
    assert newest_state(full_job(tmp_path, "cut"))["scaler"]["_growth_tracker"] == STEPS_PER_EPOCH


def test_float16_passes_over_a_step_whose_gradients_overflow(tmp_path: Path) -> None:
    """The loss is finite, and 65536 times its gradient is more than float16 holds: the scale is halved."""
    job = plain_job(tmp_path, "run", precision="fp16", epochs=1, max_steps=1)
    loss = Target("CrossEntropyLoss", {"weight": [1000.0] * CLASSES, "reduction": "sum"})
    job = replace(job, loss=LossSpec(factory=loss))
    run_job(job, world_size=2)

    state = newest_state(job)
    assert state["scaler"]["scale"] == 32768.0
    initial = initial_net(job)
    assert all(torch.equal(state["model"][name], parameter) for name, parameter in initial.named_parameters())


def test_a_step_that_is_not_finite_is_skipped_as_if_it_had_not_been(tmp_path: Path) -> None:
    """A NaN in one sample of one shard: weights, momentum and buffers stay, and the next step goes on."""
    job = plain_job(tmp_path, "run", epochs=1, on_nonfinite="skip")
    broken = int(StepPlan(SAMPLES, 12, 4, 1).samples(job.seed, batch=2, shard=3)[1])
    job = replace(job, data=images(broken=broken), checkpoint=CheckpointSpec(every_steps=1, keep=9))
    alone, together = (run_job(replace(job, name=f"run-{workers}"), workers) for workers in (1, 3))

    assert_same(together, alone)
    assert alone.events == [("step_skipped", 3)]
    assert [row.get("skipped") for row in alone.rows] == [None, None, 1, None]
    assert ["train/loss" in row for row in alone.rows] == [True, True, False, True]
    assert alone.digests[3] == alone.digests[2] != alone.digests[4]


@pytest.mark.parametrize("args", [{}, {"ignore_index": 0}], ids=["plain", "weighed targets"])
def test_a_sample_that_cannot_be_read_ends_the_run_in_the_step_that_needs_it(
    args: dict[str, int], tmp_path: Path
) -> None:
    """It is read while the step before runs, of which a checkpoint is written."""
    job = plain_job(tmp_path, "run", epochs=1)
    bad = int(StepPlan(SAMPLES, 12, 4, 1).samples(job.seed, batch=2, shard=3)[1])
    job = replace(
        job,
        data=DataSpec(train=Target(f"{__name__}.BadImages", {"length": SAMPLES, "bad": bad})),
        loss=LossSpec(factory=Target("CrossEntropyLoss", args)),
        checkpoint=CheckpointSpec(every_steps=1, keep=9),
    )
    outcome = run_processes(train_job, job, 2)

    assert f"sample {bad} is bad" in outcome.failures[1]
    assert "is bad" not in outcome.failures[0]
    assert ([row["step"] for row in outcome.rows], sorted(outcome.digests)) == ([1, 2], [1, 2])


def test_a_run_ends_when_a_metric_no_longer_improves(tmp_path: Path) -> None:
    """The loss falls and is wanted to rise: the first of the validations, every other step, stays the best."""
    rule = EarlyStopSpec(metric="val/loss", mode="max", patience=2)
    alone, together = (
        run_job(full_job(tmp_path, f"run-{workers}", validate_every_steps=2, early_stop=rule), workers)
        for workers in (1, 3)
    )

    assert_same(together, alone)
    assert [row["step"] for row in alone.rows if "val/loss" in row] == [2, 4, 6]
    assert alone.events == [("early_stop", 6)]
    assert (alone.rows[-1]["step"], max(alone.digests)) == (6, 6)

    job = full_job(tmp_path, "cut", validate_every_steps=2, early_stop=rule)
    first = run_job(replace(job, train=replace(job.train, max_steps=5)), world_size=2)
    second = run_job(job, world_size=1)
    third = run_job(job, world_size=1)
    assert first.rows + second.rows == alone.rows
    assert second.digest == alone.digest
    assert (third.started, third.rows, set(third.results.values())) == (6, [], {alone.digest})


def test_gradients_are_clipped_by_value(tmp_path: Path) -> None:
    job = plain_job(tmp_path, "run", epochs=1, max_steps=1, clip_value=1e-3)
    job = replace(job, optimizer=OptimizerSpec(factory=Target("SGD", {"lr": 1.0})))
    run_job(job, world_size=2)

    trained = newest_state(job)["model"]
    steps = [(trained[name] - parameter).abs().max() for name, parameter in initial_net(job).named_parameters()]
    torch.testing.assert_close(max(steps), torch.tensor(1e-3), rtol=1e-3, atol=0)  # float32 of weights near 1


def initial_net(spec: JobSpec) -> Net:
    seed_host_draws(draw_key("model", spec.seed))
    return Net(**spec.model.args)
