"""The training loop.

Steps follow each other; between them, at steps that all workers agree on, it validates, saves, and may end.
Everything that happens falls on the same step for everybody, because it follows from the step number and from
reports that all have heard.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cluster.errors import TrainingError, listed
from cluster.process.messages import Doing, MatrixMeasured, StepEvent
from jobs.build.components import Components
from jobs.checkpoint.loop_state import LoopState
from jobs.data.loader import training_batches, validation_batches
from jobs.parallel.step_report import StepReport, StepReports
from jobs.parallel.worker_team import Team
from jobs.spec import JobSpec
from jobs.training.evaluation import evaluate
from jobs.training.step import TrainingStep


class Loop:
    """Trains from a state to the end of the run, a limit, or a wish to stop.

    Collective: every rank constructs and runs it.
    """

    def __init__(
        self,
        spec: JobSpec,
        parts: Components,
        progress: LoopState,
        team: Team,
        *,
        metrics: Mapping[str, float],
        log: Callable[[Mapping[str, float]], None],
        tell: Callable[[StepEvent | MatrixMeasured], None],
        save: Callable[..., None],
        stop_wanted: Callable[[], bool],
        mark: Callable[[Doing, int], None] = lambda *_: None,
        tend: Callable[[], None] = lambda: None,
    ) -> None:
        """Only assigns.

        Args:
            spec: The description.
            parts: Model, optimizer and the rest, at the state of ``progress``.
            progress: Where to go on.
            team: The workers and the way to exchange gradients.
            metrics: The newest metrics at that state.
            log: Takes the rows of the metrics; the same on every rank.
            tell: Takes what else is to be known outside; the same on every rank.
            save: Saves this worker's share of a checkpoint of this moment, given the newest metrics and ``is_needed``:
                whether it is more than one in a series.
            stop_wanted: Whether this worker was asked to stop; all stop when any was.
            mark: Takes what this worker does from now on, and the steps completed, for whoever watches it.
            tend: Sees to earlier saves; called after every step.
        """
        self.spec = spec
        self.parts = parts
        self.progress = progress
        self.team = team
        self.log = log
        self.tell = tell
        self.save = save
        self.stop_wanted = stop_wanted
        self.mark = mark
        self.tend = tend
        self.end = min(parts.steps.total_steps, spec.train.max_steps or parts.steps.total_steps)
        self.stopping = False
        self.metrics = dict(metrics)
        self.pulse = StepReports(team.blocks, team.cpu_group)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.progress.ended_early or self.progress.step >= self.parts.steps.total_steps

    def run(self) -> None:
        """Trains; on return the last checkpoint has been handed to ``save``."""
        if self.is_complete or self.progress.step >= self.end:
            return
        training = TrainingStep(self.spec, self.parts, self.team, self.mark)
        for micro_batches in self._batches():
            outcome = training.take(self.progress.step, micro_batches)
            self.progress.step += 1
            for report in self.pulse.push(self.progress.step, outcome, stop=self.stop_wanted()):
                self._log(report)
            if self._is_due():
                self._pause()
            self.tend()
            if self.stopping or self.progress.ended_early:
                break
            self.mark("data", self.progress.step)

    def _is_due(self) -> bool:
        """Whether this step ends an epoch or the run, has a validation or a checkpoint, or the run is stopping."""
        step, every = self.progress.step, self.spec.checkpoint.every_steps
        return (
            self.stopping
            or step == self.end
            or self.parts.steps.ends_epoch(step)
            or self._validates_at(step)
            or (every is not None and step % every == 0)
        )

    def _pause(self) -> None:
        """Lets every report arrive, validates if it is time, and saves if it is time."""
        step, every = self.progress.step, self.spec.checkpoint.every_steps
        ends_epoch = self.parts.steps.ends_epoch(step)
        *earlier, newest = self.pulse.drain()
        for report in earlier:
            self._log(report)
        measured = self._validate() if self._validates_at(step) else {}
        row = self._log(newest, measured)
        watched = measured | ({name: row[name] for name in row if name.startswith("train/")} if ends_epoch else {})
        improved = self._note_best(watched)
        self.parts.schedule.measured(watched, ends_epoch=ends_epoch)
        self._note_stall(watched)
        on_schedule = ends_epoch if every is None else step % every == 0
        is_needed = improved or self.stopping or self.progress.ended_early or step == self.end
        if on_schedule or is_needed:
            self.mark("storage", step)
            self.save(self.metrics, is_needed=is_needed)

    def _validates_at(self, step: int) -> bool:
        steps, train = self.parts.steps, self.spec.train
        if self.parts.val_set is None:
            return False
        if step == steps.total_steps:
            return True
        if train.validate_every_steps is not None:
            return step % train.validate_every_steps == 0
        return step % (steps.steps_per_epoch * (train.validate_every_epochs or 1)) == 0

    def _validate(self) -> dict[str, float]:
        """Measures, and tells of matrices, which are in no row."""
        self.mark("validation", self.progress.step)
        spec, parts, team = self.spec, self.parts, self.team
        batches = validation_batches(
            parts.val_set, batch_size=spec.train.micro_batch, seed=spec.seed, rank=team.rank,
            world_size=team.world_size, loaders=spec.data.loaders, device=team.device,
        )  # fmt: skip
        with parts.autocast():
            measured = evaluate(
                parts.validated_model,
                parts.loss,
                parts.metrics,
                self._marked(batches),
                team,
                spec.seed,
            )
        for name, matrix in measured.matrices.items():
            self.tell(MatrixMeasured(name=name, step=self.progress.step, classes=matrix.classes, values=matrix.values))
        return measured.numbers

    def _marked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Validation batches, each of which is progress."""
        for inputs, target in batches:
            self.mark("validation", self.progress.step)
            yield self.parts.in_memory_order(inputs), target

    def _log(self, report: StepReport, measured: Mapping[str, float] | None = None) -> dict[str, float]:
        """Makes a row of a step's report. Nothing in it depends on the clock, so rows repeat exactly."""
        self.stopping |= report.stop
        if self.parts.loss.ignores_unsaid(report.counted, report.denominator):
            raise TrainingError(
                f"step {report.step}: some targets are the loss's ignore_index, and the mean is taken over all; "
                "write loss.ignore_index in the description to take it over the others"
            )
        row: dict[str, float] = {
            "step": report.step,
            "epoch": self.parts.steps.epoch_of(report.step - 1),
            "samples": report.step * self.spec.train.global_batch,
        }
        if math.isfinite(report.loss):
            row["train/loss"] = report.loss
        if report.outcome.skipped:
            row["skipped"] = 1
            self.tell(StepEvent(kind="step_skipped", step=report.step, reason=self._why_not_finite(report)[0]))
        elif not math.isfinite(report.loss):
            reason, detail = self._why_not_finite(report)
            raise TrainingError(
                f"step {report.step}: {reason}; lower optimizer.lr, set train.clip_norm, look at these samples, or "
                "write train.on_nonfinite: skip",
                detail,
            )
        if report.counted:
            row["train/accuracy"] = report.correct / report.counted
        row |= {f"lr/{number}": rate for number, rate in enumerate(report.outcome.rates)} | dict(measured or {})
        self.metrics = {name: value for name, value in (self.metrics | row).items() if "/" in name}
        if (
            measured
            or report.outcome.skipped
            or report.step % self.spec.train.log_every_steps == 0
            or report.step == self.parts.steps.total_steps
        ):
            self.log(row)
        return row

    def _why_not_finite(self, report: StepReport) -> tuple[str, str]:
        """What was not finite in a step and whose samples those are: in a line, and in full."""
        if not report.broken_shards:
            return "the gradient is not finite, though the loss is", ""
        samples = [
            int(number)
            for shard in report.broken_shards
            for number in self.parts.steps.samples(self.spec.seed, report.step - 1, shard)
        ]
        shards = ", ".join(map(str, report.broken_shards))
        return (
            f"the loss is {report.loss}, in shard {shards}: samples {listed(samples)} of data.train",
            f"samples of data.train in the shards whose loss is not finite: {samples}\n",
        )

    def _note_best(self, watched: Mapping[str, float]) -> bool:
        best, progress = self.spec.checkpoint.best, self.progress
        if best is None or best.metric not in watched:
            return False
        if not _is_better(watched[best.metric], progress.best_metric, best.mode):
            return False
        progress.best_metric, progress.best_step = watched[best.metric], progress.step
        return True

    def _note_stall(self, watched: Mapping[str, float]) -> None:
        """Counts measurements without an improvement; so many in a row complete the run."""
        rule, progress = self.spec.train.early_stop, self.progress
        if rule is None or rule.metric not in watched:
            return
        if _is_better(watched[rule.metric], progress.watched_metric, rule.mode, rule.min_delta):
            progress.watched_metric, progress.num_stalled = watched[rule.metric], 0
            return
        progress.num_stalled += 1
        if progress.num_stalled >= rule.patience and progress.step < self.parts.steps.total_steps:
            progress.ended_early = True
            reason = f"{rule.metric} has not improved on {progress.watched_metric:.6g} for {rule.patience} measurements"
            self.tell(StepEvent(kind="early_stop", step=progress.step, reason=reason))

    def _batches(self) -> Any:
        return training_batches(
            self.parts.train_set, steps=self.parts.steps, seed=self.spec.seed, block=self.team.block,
            start=self.progress.step, end=self.end, loaders=self.spec.data.loaders, device=self.team.device,
        )  # fmt: skip


def _is_better(value: float, best: float | None, mode: str, by: float = 0.0) -> bool:
    """Whether a metric improves on the best so far by more than ``by``; one that is not a number does not."""
    if math.isnan(value):
        return False
    return best is None or (value > best + by if mode == "max" else value < best - by)
