"""The memory that a worker needs, from what the dry run has measured of one with a single shard.

It follows by arithmetic, without torch.
"""

import math
from dataclasses import dataclass

from jobs.shard_blocks import num_partial_sums, shard_blocks
from jobs.spec import JobSpec

_BUCKETS_IN_FLIGHT = 4
"""Buckets that a worker exchanges at a time."""
_BUCKET_MB = 25.0
"""The size of DDP's buckets if ``train.bucket_mb`` is not given, or less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """What the dry run has measured, in bytes."""

    weights: int
    buffers: int
    """Of the model and the loss, and the copies of their first values."""
    gradients: int
    """Of all parameters that train at the end."""
    aligned: int
    """Copies of gradients at aligned addresses, if every gradient needs one."""
    optimizer: int
    average: int
    """Of the model that ``train.ema_decay`` keeps."""
    checkpoint: int
    """Of its files."""
    activations: int | None
    """What forward and backward of a micro-batch take beside all this. None: not measured, as on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The memory of a worker in bytes, with the fewest workers that the job trains with."""

    num_workers: int
    """That number of workers."""
    weights: int
    buffers: int
    gradients: int
    """DDP's buckets."""
    aligned: int
    """Copies of gradients at aligned addresses, at most."""
    optimizer: int
    average: int
    set_aside: int
    """Gradients of the worker's other shards."""
    exchange: int
    """What the exchange of gradients takes. In the first step DDP has one bucket of all gradients, and in the second
    one it allocates others."""
    activations: int | None
    """What forward and backward of a micro-batch take. None: not measured, as on a CPU."""
    total: int
    """All of the above: of the GPU if the worker has one, else of the host."""
    copy: int
    """The copy of the worker's share of a checkpoint, always of the host. Up to two more wait if the store is slow."""
    restore: int
    """What a worker takes while it restores a checkpoint: weights, buffers and average, and the checkpoint once."""


def plan_memory(state: StateBytes, spec: JobSpec, copy_slack: int) -> MemoryPlan:
    """Return the memory of the worker that needs most.

    Args:
        state: What the dry run has measured.
        spec: The description.
        copy_slack: Bytes of a copy beyond a share of a checkpoint.
    """
    num_workers, shards = spec.workers.least, spec.train.shards
    blocks = shard_blocks(shards, [num_workers])
    most_sums = max(num_partial_sums(block.start, block.stop, shards) for block in blocks)
    if spec.train.exact:
        num_sets = max(_sets_set_aside(block, shards) for block in blocks)
    else:
        num_sets = min(1, max(map(len, blocks)) - 1)
    set_aside, exchange = num_sets * state.gradients, state.gradients
    if spec.train.exact and num_workers > 1:
        bucket = min(state.gradients, round((spec.train.bucket_mb or _BUCKET_MB) * 2**20))
        received = most_sums * (num_workers - 1) / num_workers
        first_step = (most_sums - 1 + received) * state.gradients
        exchange = math.ceil(max(exchange, first_step, _BUCKETS_IN_FLIGHT * received * bucket))
    lasting = state.weights + state.buffers + state.average
    training = state.gradients + state.aligned + set_aside + exchange
    return MemoryPlan(
        num_workers=num_workers,
        weights=state.weights,
        buffers=state.buffers,
        gradients=state.gradients,
        aligned=state.aligned,
        optimizer=state.optimizer,
        average=state.average,
        set_aside=set_aside,
        exchange=exchange,
        activations=state.activations,
        total=lasting + state.optimizer + training + (state.activations or 0),
        copy=math.ceil(state.checkpoint / num_workers) + copy_slack,
        restore=lasting + state.checkpoint,
    )


def _sets_set_aside(block: range, shards: int) -> int:
    """Return how many sets of gradients a worker holds at most beside DDP's buckets.

    They are the partial sums of the shards before, and the gradients of a shard that is not the last.
    """
    later = [num_partial_sums(block.start, shard, shards) + (shard != block[-1]) for shard in block[1:]]
    return max([*later, min(1, len(block) - 1)])
