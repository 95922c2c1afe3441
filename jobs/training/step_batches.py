"""The batches of a worker's steps. Each is fetched while the step before runs, so that no step waits for its weight.

The weight of a global batch comes from the loaders of all workers. Its gather begins as soon as a batch is fetched, and
has a whole step to end.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from cluster.process.data_messages import SampleSkipped
from jobs.data.device_copies import copied_ahead
from jobs.data.loader import LoadedBatch
from jobs.parallel.worker_team import Team


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a worker needs of the batch of one step."""

    micro_batches: Iterable[LoadedBatch]
    """One for each of this worker's shards, in shard order, on its device; to be read once."""
    weight: Callable[[], float] | None = None
    """Returns the weight of the global batch's targets; the same on every rank, and may wait for them. None: the loss
    weighs no targets."""
    skipped: Sequence[SampleSkipped] = ()
    """The bad samples that others replace in this worker's micro-batches."""


def step_batches(
    loaded: Iterator[LoadedBatch], *, num_steps: int, are_weighed: bool, team: Team
) -> Iterator[StepBatch]:
    """Yields the batch of each step, and has fetched the next one by then.

    Args:
        loaded: The micro-batches of this worker, step by step, shard by shard.
        num_steps: The number of steps that they are for.
        are_weighed: Whether the loss weighs targets.
        team: The workers.

    Raises:
        Exception: The loader failed, in the step that the batch is for; the steps before it are complete.

    Collective: every rank, at the same steps.
    """
    ahead = deque[_Fetched]()
    uncopied = deque[list[LoadedBatch]]()

    def fetch() -> None:
        fetched = _fetch(loaded, are_weighed, team)
        ahead.append(fetched)
        uncopied.append(fetched.batches)

    def micro_batches() -> Iterator[LoadedBatch]:
        while uncopied:
            yield from uncopied.popleft()

    copies = copied_ahead(micro_batches(), team.device)
    fetch()
    for number in range(num_steps):
        fetched = ahead.popleft()
        if fetched.failure is not None:
            raise fetched.failure
        if number + 1 < num_steps:
            fetch()
        skipped = [each for batch in fetched.batches for each in batch.skipped]
        yield StepBatch(islice(copies, len(team.block)), fetched.weight, skipped)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """The batch of a step, or why there is none."""

    batches: list[LoadedBatch]
    weight: Callable[[], float] | None
    failure: Exception | None = None


def _fetch(loaded: Iterator[LoadedBatch], are_weighed: bool, team: Team) -> _Fetched:
    """Fetches the batch of a step and begins the sum of its weights.

    If the loader fails, the others must not wait for this rank's weights before the step that misses them, so it sends
    NaN.

    Collective: every rank.
    """
    failure = None
    try:
        batches = list(islice(loaded, len(team.block)))
        weights = [batch.weight for batch in batches if batch.weight is not None]
    except Exception as error:  # the user's own dataset; it is raised in the step that needs the batch
        batches, weights, failure = [], [math.nan], error
    return _Fetched(batches, team.sum_over_shards(weights) if are_weighed else None, failure)
