"""The training loop.

A step is S forward and backward passes, one per shard, wherever the shards live; the gradients meet in
one sum, and every worker takes the same optimizer step. Validation, checkpoints and the wish to stop fall
on the same steps for everybody, because they follow from the step number and from reports all have heard.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import TrainingError
from jobs.loader import seed_draws, training_batches, validation_batches
from jobs.optimizers import set_trainable
from jobs.order import draw_key
from jobs.parts import Parts
from jobs.pulse import Pulse, StepReport
from jobs.spec import JobSpec
from jobs.team import Team
from jobs.validation import evaluate


@dataclass(slots=True)
class Progress:
    """How far the run is: with the parts, its whole state."""

    step: int = 0
    """Optimizer steps completed."""
    best_metric: float | None = None
    best_step: int | None = None


class Loop:
    """Trains from a state to the end of the run, a limit, or a wish to stop.

    Collective: every rank constructs and runs it.
    """

    def __init__(
        self,
        spec: JobSpec,
        parts: Parts,
        progress: Progress,
        team: Team,
        *,
        metrics: Mapping[str, float],
        on_row: Callable[[dict[str, float]], None],
        save: Callable[[dict[str, float]], None],
        stop_wanted: Callable[[], bool],
    ) -> None:
        """Only assigns.

        Args:
            spec: The description.
            parts: Model, optimizer and the rest, at the state of ``progress``.
            progress: Where to go on.
            team: The workers and the way to exchange gradients.
            metrics: The newest metrics at that state.
            on_row: Takes a row of metrics; the same on every rank.
            save: Saves a checkpoint of this moment, given the newest metrics.
            stop_wanted: Whether this worker was asked to stop; all stop when any was.
        """
        self.spec = spec
        self.parts = parts
        self.progress = progress
        self.team = team
        self.on_row = on_row
        self.save = save
        self.stop_wanted = stop_wanted
        self.end = min(parts.steps.total_steps, spec.train.max_steps or parts.steps.total_steps)
        self.stopping = False
        self.metrics = dict(metrics)
        self.pulse = Pulse(team.blocks, team.cpu_group)

    def run(self) -> None:
        """Trains; on return the last checkpoint has been handed to ``save``."""
        progress, steps = self.progress, self.parts.steps
        self._set_trainable()
        for micro_batches in self._batches():
            if steps.ends_epoch(progress.step):
                self._set_trainable()
            tallies, denominator = self._gradients(micro_batches)
            rates = self._optimizer_step()
            progress.step += 1
            arrived = self.pulse.push(progress.step, tallies, denominator, stop=self.stop_wanted(), note=rates)
            for report in arrived:
                self._log(report)
            if self._is_due():
                self._pause()
            if self.stopping:
                break

    def _gradients(self, micro_batches: list[Any]) -> tuple[Tensor, float]:
        """Forward and backward over this worker's shards; afterwards ``.grad`` is the global batch's."""
        spec, team, loss = self.spec, self.team, self.parts.loss
        tallies = []
        denominator = self._weighed_denominator(micro_batches)
        buffers = list(self.parts.model.buffers())
        # Every shard starts from the buffers of the step's start, and shard 0's are everyone's at its end.
        several = len(team.block) > 1 and bool(buffers)
        at_start = [buffer.clone() for buffer in buffers] if several else []
        of_first: list[Tensor] = []
        for shard, (inputs, target) in zip(team.block, micro_batches):
            is_last = shard == team.block[-1]
            seed_draws(draw_key("step", spec.seed, self.progress.step, shard), team.device)
            with nullcontext() if is_last else self.replica.no_sync():
                with self._autocast():
                    output = self.replica(self._in_memory_order(inputs))
                    numerator, own_denominator = loss.numerator(output, target)
                if denominator is None:
                    denominator = loss.denominator(own_denominator, spec.train.shards)
                (numerator * (team.gradient_scale / denominator)).backward()
            tallies.append(loss.tally(output, target, numerator))
            if several:
                of_first = of_first or [buffer.clone() for buffer in buffers]
                torch._foreach_copy_(buffers, at_start)
            if not is_last:
                team.set_aside_gradients(shard, self.trained)
        team.step_done()
        if several:
            torch._foreach_copy_(buffers, of_first)
        team.share_buffers(buffers)
        assert denominator is not None
        return torch.stack(tallies), denominator

    def _optimizer_step(self) -> list[float]:
        """Clips, steps, averages, advances the schedule; the learning rates that were used."""
        parts, train = self.parts, self.spec.train
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, train.clip_norm)
        rates = [float(group["lr"]) for group in parts.optimizer.param_groups]
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        if parts.ema is not None:
            parts.ema.update_parameters(parts.model)
        parts.schedule.step_done()
        return rates

    def _is_due(self) -> bool:
        """Whether this step ends an epoch or the run, or has a checkpoint, or the run is stopping."""
        step, every = self.progress.step, self.spec.checkpoint.every_steps
        return (
            self.stopping
            or step == self.end
            or self.parts.steps.ends_epoch(step)
            or (every is not None and step % every == 0)
        )

    def _pause(self) -> None:
        """Lets every report arrive, validates if it is time, and saves if it is time."""
        step, every = self.progress.step, self.spec.checkpoint.every_steps
        ends_epoch = self.parts.steps.ends_epoch(step)
        *earlier, newest = self.pulse.drain()
        for report in earlier:
            self._log(report)
        measured = self._validate() if ends_epoch and self._validates_now() else {}
        self._log(newest, measured)
        improved = self._note_best(measured)
        if ends_epoch:
            self.parts.schedule.epoch_done(measured)
        on_schedule = ends_epoch if every is None else step % every == 0
        if on_schedule or improved or self.stopping or step == self.end:
            self.save(self.metrics)

    def _validates_now(self) -> bool:
        epoch = self.progress.step // self.parts.steps.steps_per_epoch
        return self.parts.val_set is not None and (
            epoch % (self.spec.train.validate_every_epochs or 1) == 0 or epoch == self.spec.train.epochs
        )

    def _validate(self) -> dict[str, float]:
        spec, parts, team = self.spec, self.parts, self.team
        batches = validation_batches(
            parts.val_set, batch_size=spec.train.micro_batch, seed=spec.seed, rank=team.rank,
            world_size=team.world_size, loaders=spec.data.loaders, device=team.device,
        )  # fmt: skip
        model = parts.model if parts.ema is None else parts.ema.module
        with self._autocast():
            return evaluate(model, parts.loss, ((self._in_memory_order(x), y) for x, y in batches), team)

    def _log(self, report: StepReport, measured: Mapping[str, float] | None = None) -> None:
        """Makes a row of a step's report. Nothing in it depends on the clock, so rows repeat exactly."""
        self.stopping |= report.stop
        if not math.isfinite(report.loss):
            raise TrainingError(
                f"step {report.step}: train/loss is not finite; lower optimizer.lr, set train.clip_norm, or look at "
                "the data of that step; resume goes on from the newest checkpoint"
            )
        if self.parts.loss.ignores_unsaid(report.counted, report.denominator):
            raise TrainingError(
                f"step {report.step}: some targets are the loss's ignore_index, and the mean is taken over all; "
                "write loss.ignore_index in the description to take it over the others"
            )
        row = {
            "step": report.step,
            "epoch": self.parts.steps.epoch_of(report.step - 1),
            "samples": report.step * self.spec.train.global_batch,
            "train/loss": report.loss,
        }
        if report.counted:
            row["train/accuracy"] = report.correct / report.counted
        row |= {f"lr/{number}": rate for number, rate in enumerate(report.note)} | dict(measured or {})
        self.metrics = {name: value for name, value in (self.metrics | row).items() if "/" in name}
        if measured or report.step % self.spec.train.log_every_steps == 0 or report.step == self.end:
            self.on_row(row)

    def _note_best(self, measured: Mapping[str, float]) -> bool:
        best, progress = self.spec.checkpoint.best, self.progress
        if best is None or best.metric not in measured:
            return False
        value = measured[best.metric]
        sign = 1 if best.mode == "max" else -1
        if progress.best_metric is not None and sign * value <= sign * progress.best_metric:
            return False
        progress.best_metric, progress.best_step = value, progress.step
        return True

    def _set_trainable(self) -> None:
        """At the start, and at an epoch that unfreezes parameters: tells DDP which gradients to wait for."""
        epoch = self.parts.steps.epoch_of(self.progress.step)
        if set_trainable(self.parts.model, self.parts.groups, epoch) or not hasattr(self, "replica"):
            self.replica = self.team.replicate(self.parts.model)
            self.trained = [parameter for parameter in self.parts.model.parameters() if parameter.requires_grad]

    def _batches(self) -> Any:
        return training_batches(
            self.parts.train_set, steps=self.parts.steps, seed=self.spec.seed, block=self.team.block,
            start=self.progress.step, end=self.end, loaders=self.spec.data.loaders, device=self.team.device,
        )  # fmt: skip

    def _weighed_denominator(self, micro_batches: list[Any]) -> float | None:
        """The denominator of the global batch if the targets decide it: the shards' weights, exchanged at once."""
        loss = self.parts.loss
        if not loss.weighs_targets:
            return None
        weight = self.team.sum_over_shards([loss.target_weight(target) for _, target in micro_batches])
        if weight == 0:
            raise TrainingError(f"step {self.progress.step + 1}: every target of the global batch is ignored")
        return weight

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.spec.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.team.device.type, torch.bfloat16)

    def _in_memory_order(self, inputs: Any) -> Any:
        if self.spec.train.channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs
