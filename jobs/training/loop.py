"""The training loop.

The loop takes one step after the other. At steps that follow from the description it pauses: it validates, saves a
checkpoint, or ends. All workers pause and end at the same steps, because these depend on the step number and on reports
that every rank has received.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cluster.process.data_messages import SampleSkipped
from cluster.process.messages import Doing, MatrixMeasured, StepEvent
from jobs.checkpoint.loop_state import LoopState
from jobs.components.build import Components
from jobs.data.device_copies import copied_ahead
from jobs.data.loader import LoadedBatch, training_batches, validation_batches
from jobs.parallel.step_report import StepReport, StepReports
from jobs.parallel.worker_team import Team
from jobs.spec import JobSpec
from jobs.stream_readers import stream_readers
from jobs.training.evaluation import evaluate
from jobs.training.improvement import note_best, note_stall
from jobs.training.metric_row import check_finite, check_ignored_targets, make_row, why_not_finite
from jobs.training.step import TrainingStep
from jobs.training.step_batches import StepBatch, step_batches


class Loop:
    """Trains from a state until the run is complete, a limit is reached or a stop is asked for.

    Collective: every rank constructs it and runs it.
    """

    def __init__(
        self,
        spec: JobSpec,
        components: Components,
        state: LoopState,
        team: Team,
        *,
        metrics: Mapping[str, float],
        log: Callable[[Mapping[str, float]], None],
        tell: Callable[[StepEvent | MatrixMeasured], None],
        save: Callable[..., None],
        stop_wanted: Callable[[], bool],
        mark: Callable[[Doing, int], None] = lambda *_: None,
        after_step: Callable[[], None] = lambda: None,
        tell_own: Callable[[SampleSkipped], None] = lambda _: None,
    ) -> None:
        """Only assigns.

        Args:
            spec: The description.
            components: Model, optimizer and the rest, as they are after ``state.step`` steps.
            state: Where to go on; the loop advances it.
            team: The workers, and how they exchange gradients.
            metrics: The newest metrics at ``state``.
            log: Receives each row of the metrics; the rows are the same on every rank.
            tell: Receives events and matrices for the driver; they are the same on every rank.
            save: Saves this worker's share of a checkpoint of the current state. Arguments: the newest metrics, and
                ``is_needed``, which is False for a checkpoint that may be skipped while the store is slow.
            stop_wanted: Returns whether this worker was asked to stop; all workers stop if any was.
            mark: Records what this process does from now on, and the number of completed steps.
            after_step: Called after every step.
            tell_own: Receives what only this rank can tell the driver.
        """
        self.spec = spec
        self.components = components
        self.state = state
        self.team = team
        self.log = log
        self.tell = tell
        self.tell_own = tell_own
        self.save = save
        self.stop_wanted = stop_wanted
        self.mark = mark
        self.after_step = after_step
        self.steps = components.steps
        self.end = min(self.steps.total_steps, spec.train.max_steps or self.steps.total_steps)
        self.stopping = False
        self.metrics = dict(metrics)
        self.reports = StepReports(team.blocks, team.gather_later)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.state.ended_early or self.state.step >= self.steps.total_steps

    def run(self) -> None:
        """Trains; has handed the last checkpoint to ``save`` when it returns.

        Raises:
            TrainingError: A loss is not finite, or targets are ignored that the description does not mention.
        """
        if self.is_complete or self.state.step >= self.end:
            return
        training = TrainingStep(self.spec, self.components, self.team, self.mark)
        for batch in self._batches():
            for skipped in batch.skipped:
                self.tell_own(skipped)
            outcome = training.take(self.state.step, batch)
            self.state.step += 1
            for report in self.reports.push(self.state.step, outcome, stop=self.stop_wanted()):
                self._record(report)
            if self._is_pause():
                self._pause()
            self.after_step()
            if self.stopping or self.state.ended_early:
                break
            self.mark("data", self.state.step)

    def _pause(self) -> None:
        """Waits for the reports of all steps, validates and saves if it is time to."""
        step = self.state.step
        ends_epoch = self.steps.ends_epoch(step)
        *earlier, newest = self.reports.drain()
        for report in earlier:
            self._record(report)
        validated = self._validate() if self._is_validation() else {}
        row = self._record(newest, validated)

        of_epoch = {name: row[name] for name in row if name.startswith("train/")} if ends_epoch else {}
        watched = validated | of_epoch
        improved = note_best(self.spec.checkpoint.best, self.state, watched)
        self.components.schedule.measured(watched, ends_epoch=ends_epoch)
        self._stop_early_if_stalled(watched)

        is_needed = improved or self.stopping or self.state.ended_early or step == self.end
        if is_needed or self._is_scheduled_save():
            self.mark("storage", step)
            self.save(self.metrics, is_needed=is_needed)

    def _is_pause(self) -> bool:
        """Returns whether something besides training happens at this step."""
        return (
            self.stopping
            or self.state.step == self.end
            or self.steps.ends_epoch(self.state.step)
            or self._is_validation()
            or self._is_scheduled_save()
        )

    def _is_validation(self) -> bool:
        step, train = self.state.step, self.spec.train
        if self.components.val_set is None:
            return False
        if step == self.steps.total_steps:
            return True
        if train.validate_every_steps is not None:
            return step % train.validate_every_steps == 0
        return step % (self.steps.steps_per_epoch * (train.validate_every_epochs or 1)) == 0

    def _is_scheduled_save(self) -> bool:
        step, every = self.state.step, self.spec.checkpoint.every_steps
        return self.steps.ends_epoch(step) if every is None else step % every == 0

    def _validate(self) -> dict[str, float]:
        """Returns the numbers of a validation; sends matrices to the driver, because no row holds them."""
        spec, components, team = self.spec, self.components, self.team
        self.mark("validation", self.state.step)
        batches = validation_batches(
            components.val_set, batch_size=spec.train.micro_batch, seed=spec.seed, rank=team.rank,
            world_size=team.world_size, loaders=spec.data.loaders, device=team.device,
            weigh=components.loss.target_weights(), on_bad_sample=spec.data.on_bad_sample,
        )  # fmt: skip
        model, loss, metrics = components.validated_model, components.loss, components.metrics
        with components.autocast():
            measured = evaluate(model, loss, metrics, self._prepared(batches), team, spec.seed)
        for name, matrix in measured.matrices.items():
            self.tell(MatrixMeasured(name=name, step=self.state.step, classes=matrix.classes, values=matrix.values))
        return measured.numbers

    def _prepared(self, batches: Iterable[LoadedBatch]) -> Iterator[LoadedBatch]:
        """Yields validation batches on the device; marks each, so that a long validation does not count as hung."""
        for batch in copied_ahead(batches, self.team.device):
            self.mark("validation", self.state.step)
            for skipped in batch.skipped:
                self.tell_own(skipped)
            yield batch._replace(inputs=self.components.in_memory_order(batch.inputs))

    def _record(self, report: StepReport, validated: Mapping[str, float] | None = None) -> dict[str, float]:
        """Checks a step's report, logs its row if the row is due, and returns the row."""
        self.stopping |= report.stop
        check_ignored_targets(report, self.components.loss)
        if report.outcome.skipped:
            reason, _ = why_not_finite(report, self.spec.seed, self.steps)
            self.tell(StepEvent(kind="step_skipped", step=report.step, reason=reason))
        else:
            check_finite(report, self.spec.seed, self.steps)
        row = make_row(report, self.spec, self.steps, validated)
        self.metrics = {name: value for name, value in (self.metrics | row).items() if "/" in name}
        if (
            validated
            or report.outcome.skipped
            or report.step % self.spec.train.log_every_steps == 0
            or report.step == self.steps.total_steps
        ):
            self.log(row)
        return row

    def _stop_early_if_stalled(self, watched: Mapping[str, float]) -> None:
        reason = note_stall(self.spec.train.early_stop, self.state, watched)
        if reason is not None and self.state.step < self.steps.total_steps:
            self.state.ended_early = True
            self.tell(StepEvent(kind="early_stop", step=self.state.step, reason=reason))

    def _train_set(self) -> Any:
        """Returns the training dataset; one that can read blocks of neighbours is told to, if they come in blocks."""
        dataset, shuffle = self.components.train_set, self.spec.data.shuffle
        if shuffle is None or not hasattr(dataset, "in_blocks"):
            return dataset
        own = stream_readers(len(self.team.block), shuffle.streams, self.spec.data.loaders)
        return dataset.in_blocks(shuffle.block, shuffle.kept_samples * own.streams)

    def _batches(self) -> Iterator[StepBatch]:
        weigh, start = self.components.loss.target_weights(), self.state.step
        loaded = training_batches(
            self._train_set(), steps=self.steps, seed=self.spec.seed, block=self.team.block,
            start=start, end=self.end, loaders=self.spec.data.loaders, device=self.team.device, weigh=weigh,
            on_bad_sample=self.spec.data.on_bad_sample,
        )  # fmt: skip
        return step_batches(loaded, num_steps=self.end - start, are_weighed=weigh is not None, team=self.team)
