"""One optimizer step of a worker: the gradient of the global batch, then the same update on every worker.

A step is S forward and backward passes, one per shard, wherever the shards live; the gradients meet in
one sum. What is done between steps is the loop's business.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import TrainingError
from cluster.process.messages import Doing
from jobs.build.components import Components
from jobs.build.optimizers import set_trainable
from jobs.data.loader import seed_draws
from jobs.parallel.step_report import StepOutcome
from jobs.parallel.worker_team import Team
from jobs.sampling import draw_key
from jobs.spec import JobSpec


class TrainingStep:
    """Takes steps with the parts of a run.

    Collective: every rank constructs it and takes every step.
    """

    def __init__(self, spec: JobSpec, parts: Components, team: Team, mark: Callable[[Doing, int], None]) -> None:
        """``mark``: takes what this worker does from now on, and the steps completed."""
        self._spec = spec
        self._parts = parts
        self._team = team
        self._mark = mark
        self._buffers = list(parts.model.buffers())
        self._thaws = {group.from_step for group in parts.groups}
        self._replica: DistributedDataParallel | None = None
        self._trained: list[nn.Parameter] = []

    def take(self, step: int, micro_batches: Sequence[Any]) -> StepOutcome:
        """Step number ``step``, counted from 0, on one micro-batch for each of this worker's shards."""
        self._mark("forward", step)
        if self._replica is None or step in self._thaws:
            self._set_trainable(step)
        # Every shard starts from the buffers of the step's start, and shard 0's are everyone's at its end.
        may_skip = self._spec.train.on_nonfinite == "skip"
        keeps_buffers = bool(self._buffers) and (len(self._team.block) > 1 or may_skip)
        buffers_at_start = [buffer.clone() for buffer in self._buffers] if keeps_buffers else []
        tallies, denominator = self._gradients(step, micro_batches, buffers_at_start)
        skipped = may_skip and not self._is_finite(tallies)
        rates = tuple(float(group["lr"]) for group in self._parts.optimizer.param_groups)
        if not skipped:
            self._update()
        elif keeps_buffers:
            torch._foreach_copy_(self._buffers, buffers_at_start)
        self._parts.optimizer.zero_grad(set_to_none=True)
        self._parts.schedule.step_done()
        return StepOutcome(tallies, denominator, rates, skipped)

    def _gradients(
        self, step: int, micro_batches: Sequence[Any], buffers_at_start: list[Tensor]
    ) -> tuple[Tensor, float]:
        """Forward and backward over this worker's shards; afterwards ``.grad`` is the global batch's."""
        spec, team, parts = self._spec, self._team, self._parts
        loss, replica = parts.loss, self._replica
        assert replica is not None
        tallies = []
        denominator = self._weighed_denominator(step, micro_batches)
        buffers_of_first: list[Tensor] = []
        for shard, (inputs, target) in zip(team.block, micro_batches):
            is_first, is_last = shard == team.block[0], shard == team.block[-1]
            if not is_first and buffers_at_start:
                torch._foreach_copy_(self._buffers, buffers_at_start)
            seed_draws(draw_key("step", spec.seed, step, shard), team.device)
            with nullcontext() if is_last else replica.no_sync():
                with parts.autocast():
                    output = replica(parts.in_memory_order(inputs))
                    numerator, own_denominator = loss.numerator(output, target)
                if denominator is None:
                    denominator = loss.denominator(own_denominator, spec.train.shards)
                if is_last:
                    self._mark("backward", step)
                mean = numerator * (1.0 / denominator)
                (mean if parts.scaler is None else parts.scaler.scale(mean)).backward()
            if is_last:
                team.step_done()
            else:
                team.set_aside_gradients(shard, self._trained)
            tallies.append(loss.tally(output, target, numerator))
            if is_first and not is_last:
                buffers_of_first = [buffer.clone() for buffer in self._buffers]
        if buffers_of_first:
            torch._foreach_copy_(self._buffers, buffers_of_first)
        team.share_buffers(self._buffers)
        assert denominator is not None
        return torch.stack(tallies), denominator

    def _update(self) -> None:
        """Clips, steps and averages; with a scaler, a step whose gradients overflowed only lowers its scale."""
        parts, train = self._parts, self._spec.train
        if parts.scaler is not None:
            parts.scaler.unscale_(parts.optimizer)
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, train.clip_norm)
        if train.clip_value is not None:
            nn.utils.clip_grad_value_(self._trained, train.clip_value)
        if parts.scaler is None:
            parts.optimizer.step()
        else:
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
        if parts.ema is not None:
            parts.ema.update_parameters(parts.model)

    def _is_finite(self, tallies: Tensor) -> bool:
        """Whether loss and gradient are finite; every worker sees the same numbers. Waits for all of them."""
        if not math.isfinite(self._team.sum_over_shards(list(tallies[:, 0]))):
            return False
        if self._parts.scaler is not None:
            return True  # gradients that overflow are the scaler's to skip
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        return math.isfinite(nn.utils.get_total_norm(gradients, math.inf).item())

    def _set_trainable(self, step: int) -> None:
        """At the start, and at a step that unfreezes parameters: tells DDP which gradients to wait for."""
        if set_trainable(self._parts.model, self._parts.groups, step) or self._replica is None:
            self._replica = self._team.replicate(self._parts.model)
            self._trained = [parameter for parameter in self._parts.model.parameters() if parameter.requires_grad]

    def _weighed_denominator(self, step: int, micro_batches: Sequence[Any]) -> float | None:
        """The denominator of the global batch if the targets decide it: the shards' weights, exchanged at once."""
        loss = self._parts.loss
        if not loss.weighs_targets:
            return None
        weight = self._team.sum_over_shards([loss.target_weight(target) for _, target in micro_batches])
        if weight == 0:
            raise TrainingError(f"step {step + 1}: every target of the global batch is ignored")
        return weight
