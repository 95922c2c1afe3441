"""The metrics row of a step, and the errors that a step's report can reveal.

A row depends on the description and the step number, never on the clock: a step that is computed twice makes the same
row twice.
"""

import math
from collections.abc import Mapping

from cluster.errors import TrainingError, listed
from jobs.components.losses import GlobalLoss
from jobs.parallel.step_report import StepReport
from jobs.sampling import StepPlan
from jobs.spec import JobSpec


def make_row(
    report: StepReport, spec: JobSpec, steps: StepPlan, validated: Mapping[str, float] | None
) -> dict[str, float]:
    """Returns the row of a step; a loss that is not finite is left out, so that the row is JSON.

    Args:
        report: What all workers reported of the step.
        spec: The description.
        steps: How steps lie in epochs.
        validated: The numbers of the validation at this step, if there was one.
    """
    row: dict[str, float] = {
        "step": report.step,
        "epoch": steps.epoch_of(report.step - 1),
        "samples": report.step * spec.train.global_batch,
    }
    if math.isfinite(report.loss):
        row["train/loss"] = report.loss
    if report.outcome.skipped:
        row["skipped"] = 1
    if report.counted:
        row["train/accuracy"] = report.correct / report.counted
    return row | {f"lr/{number}": rate for number, rate in enumerate(report.outcome.rates)} | dict(validated or {})


def check_ignored_targets(report: StepReport, loss: GlobalLoss) -> None:
    """Refuses targets that the loss ignores by torch's default alone.

    Raises:
        TrainingError: There are such targets.
    """
    if loss.ignores_unsaid(report.counted, report.denominator):
        raise TrainingError(
            f"step {report.step}: some targets are the loss's ignore_index, and the mean is taken over all; "
            "write loss.ignore_index in the description to take it over the others"
        )


def check_finite(report: StepReport, seed: int, steps: StepPlan) -> None:
    """Refuses a loss that is NaN or infinite.

    Raises:
        TrainingError: The loss is not finite; the message names the samples.
    """
    if not math.isfinite(report.loss):
        reason, detail = why_not_finite(report, seed, steps)
        raise TrainingError(
            f"step {report.step}: {reason}; lower optimizer.lr, set train.clip_norm, look at these samples, or "
            "write train.on_nonfinite: skip",
            detail,
        )


def why_not_finite(report: StepReport, seed: int, steps: StepPlan) -> tuple[str, str]:
    """Returns what was not finite in a step and in which samples: in one line with a few of them, and with all."""
    if not report.broken_shards:
        return "the gradient is not finite, though the loss is", ""
    samples = [int(number) for shard in report.broken_shards for number in steps.samples(seed, report.step - 1, shard)]
    shards = ", ".join(map(str, report.broken_shards))
    return (
        f"the loss is {report.loss}, in shard {shards}: samples {listed(samples)} of data.train",
        f"samples of data.train in the shards whose loss is not finite: {samples}\n",
    )
