"""One optimizer step of one worker: the gradient of the global batch, then the same update on every worker.

A step runs one forward and one backward pass per shard, on whichever workers hold the shards, and sums their gradients
once. ``jobs/training/loop.py`` decides what happens between steps.
"""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import TrainingError
from cluster.process.messages import Doing
from jobs.components.buffers import Snapshot
from jobs.components.build import Components
from jobs.components.optimizers import set_trainable
from jobs.data.loader import seed_draws
from jobs.parallel.step_report import StepOutcome
from jobs.parallel.worker_team import Team
from jobs.sampling import draw_key
from jobs.spec import JobSpec
from jobs.training.aligned_gradients import AlignedGradients, needs_aligned
from jobs.training.step_batches import StepBatch


class TrainingStep:
    """Takes optimizer steps.

    Collective: every rank constructs it and takes every step.
    """

    def __init__(self, spec: JobSpec, components: Components, team: Team, mark: Callable[[Doing, int], None]) -> None:
        """``mark``: records what this process does from now on, and the number of completed steps."""
        self._spec = spec
        self._components = components
        self._team = team
        self._mark = mark
        self._buffers = components.buffers
        self._aligned = AlignedGradients() if needs_aligned(spec.train, components.optimizer) else None
        self._thaw_steps = {group.from_step for group in components.groups}
        self._replica: DistributedDataParallel | None = None
        self._trained: list[nn.Parameter] = []

    def take(self, step: int, batch: StepBatch) -> StepOutcome:
        """Runs one optimizer step; on a GPU it only enqueues it.

        The CPU waits for the GPU in a step with ``on_nonfinite: skip``, and once if a gradient scaler must tell an
        optimizer that is not fused whether to step.

        Args:
            step: The number of steps completed before this one.
            batch: The batch of this step.

        Raises:
            TrainingError: Every target of the global batch is ignored, or a buffer has got another shape or type.

        Collective: every rank.
        """
        self._mark("forward", step)
        if self._replica is None or step in self._thaw_steps:
            self._set_trainable(step)
        # Every shard starts from the buffers as they are now; all workers end the step with those of shard 0.
        may_skip = self._spec.train.on_nonfinite == "skip"
        buffers_at_start = self._buffers.take(with_values=len(self._team.block) > 1 or may_skip)

        tallies, denominator = self._compute_gradients(step, batch, buffers_at_start)
        skipped = may_skip and not self._is_finite(tallies)
        rates = tuple(float(group["lr"]) for group in self._components.optimizer.param_groups)
        if skipped:
            self._buffers.put(buffers_at_start)
        else:
            self._update_weights(step)
        self._components.optimizer.zero_grad(set_to_none=True)
        self._components.schedule.step_done()
        return StepOutcome(tallies, denominator, rates, skipped)

    def _compute_gradients(self, step: int, batch: StepBatch, buffers_at_start: Snapshot) -> tuple[Tensor, float]:
        """Runs forward and backward on this worker's shards; leaves the gradient of the global batch in ``.grad``.

        Returns:
            The tally of each shard of this worker, and what the loss of the global batch was divided by.

        Raises:
            TrainingError: Every target of the global batch is ignored, or a buffer has got another shape or type.

        Shapes: tallies float64 [shards of this worker, 3], on the worker's device.
        """
        spec, team, components = self._spec, self._team, self._components
        loss, replica = components.loss, self._replica
        assert replica is not None, "take() makes it"
        tallies = []
        denominator = None if batch.weight is None else batch.weight()
        if denominator == 0:
            raise TrainingError(f"step {step + 1}: every target of the global batch is ignored")
        buffers_of_first: Snapshot | None = None
        for shard, (inputs, target, *_) in zip(team.block, batch.micro_batches):
            is_first, is_last = shard == team.block[0], shard == team.block[-1]
            if not is_first:
                self._buffers.put(buffers_at_start)
            seed_draws(draw_key("step", spec.seed, step, shard), team.device)
            with nullcontext() if is_last else replica.no_sync():  # workers exchange gradients once, in the last pass
                with components.autocast():
                    output = replica(components.in_memory_order(inputs))
                    numerator, own_denominator = loss.numerator(output, target)
                if denominator is None:
                    denominator = loss.denominator(own_denominator, spec.train.shards)
                if is_last:
                    self._mark("backward", step)
                mean = numerator * (1.0 / denominator)
                (mean if components.scaler is None else components.scaler.scale(mean)).backward()
            if is_last:
                team.step_done()
            else:
                team.set_aside_gradients(shard, self._trained)
            tallies.append(loss.tally(output, target, numerator))
            misfit = self._buffers.misfit(buffers_at_start)
            if misfit is not None:
                raise TrainingError(f"step {step + 1}: {misfit}")
            if is_first:
                buffers_of_first = self._buffers.take(with_values=not is_last)
        assert buffers_of_first is not None, "a worker has at least one shard"
        assert denominator is not None, "a worker has at least one shard"
        self._buffers.put(buffers_of_first)
        team.share_buffers(buffers_of_first.tensors)
        return torch.stack(tallies), denominator

    def _update_weights(self, step: int) -> None:
        """Clips the gradient, updates the weights and their moving average.

        An optimizer may draw random numbers: the generators are seeded by ``step``, the same on every rank.

        A gradient scaler skips the update if the gradient overflowed, and lowers its scale.
        """
        components, train = self._components, self._spec.train
        if self._aligned is not None:
            self._aligned.align(self._trained)
        if components.scaler is not None:
            components.scaler.unscale_(components.optimizer)
        if train.clip_norm is not None:
            clip_norm(self._trained, train.clip_norm)
        if train.clip_value is not None:
            nn.utils.clip_grad_value_(self._trained, train.clip_value)
        seed_draws(draw_key("update", self._spec.seed, step), self._team.device)
        if components.scaler is None:
            components.optimizer.step()
        else:
            components.scaler.step(components.optimizer)
            components.scaler.update()
        if components.ema is not None:
            components.ema.update_parameters(components.model)

    def _is_finite(self, tallies: Tensor) -> bool:
        """Returns whether the loss and the gradient of the global batch are finite; the same on every rank.

        Waits for the GPU and for the other ranks.

        Shapes: tallies float64 [shards of this worker, 3].

        Collective: every rank.
        """
        if self._components.scaler is None:
            gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients, math.inf)
        else:  # the scaler itself skips a gradient that overflows
            norm = tallies.new_zeros(())
        *losses, largest = torch.cat([tallies[:, 0], norm.double().reshape(1)]).tolist()  # waits for the GPU
        loss = self._team.sum_over_shards(losses)()
        return math.isfinite(loss) and math.isfinite(largest)

    def _set_trainable(self, step: int) -> None:
        """Freezes and unfreezes parameters for ``step``.

        On a change it wraps the model again, so that DDP waits for the gradients of the trained parameters alone.
        """
        components = self._components
        if set_trainable(components.model, components.groups, step) or self._replica is None:
            if self._replica is not None:  # free its buckets before there are new ones
                self._replica = None
                gc.collect()  # the first one may be in a cycle: DDP imports modules in __init__, which keep its frame
                if self._spec.train.compile:
                    torch._dynamo.reset()  # torch 2.11 goes on with the graph in which they are frozen
            self._replica = self._team.replicate(components.model)
            self._trained = [parameter for parameter in components.model.parameters() if parameter.requires_grad]


def clip_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scales gradients down to ``max_norm``, as ``clip_grad_norm_`` does, with the norm of narrow types in float32.

    In float16 a norm above 65,504 is infinite, and the gradient would be scaled to 0.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if all(gradient.dtype.itemsize >= 4 for gradient in gradients):
        norm = nn.utils.get_total_norm(gradients)
    else:
        norms = [torch.linalg.vector_norm(each, dtype=_at_least_float32(each.dtype)).float() for each in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
