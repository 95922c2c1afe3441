"""The loader: from a dataset to micro-batches in the memory of this host, through torch's DataLoader.

It receives the keys of all samples of the rest of the run, in order, so it never pauses between epochs. It seeds the
random generators before every sample, by the key of that sample.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from cluster.errors import text_of
from cluster.process import loader_processes
from jobs.sampling import StepPlan, draw_key

SampleKey = tuple[int, int]
"""(epoch, sample number): a sample's random draws depend on these and the run's seed."""


class LoadedBatch(NamedTuple):
    """A micro-batch; a named tuple, so that torch pins its tensors and sends it between processes."""

    inputs: Any
    target: Any
    weight: float | None = None
    """What ``weigh`` returned for the targets; None if there was no ``weigh``."""


Weigh = Callable[[Any], float]
"""Returns a number for the targets of a batch, in the process that loads it, and so before they are on a GPU."""


class KeyedDataset(Dataset[Any]):
    """A map-style dataset whose random transforms are functions of (seed, epoch, sample)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, number = key
        seed_host_draws(draw_key("sample", self._seed, epoch, number))
        try:
            return self._dataset[number]
        except Exception as error:  # the user's own code
            # torch sends the class of a loader's exception, and waits without end if that cannot be pickled.
            if get_worker_info() is None or type(error).__module__ == "builtins":
                raise
            raise RuntimeError(f"{type(error).__name__}: {text_of(error)}") from error


def seed_host_draws(key: int) -> None:
    """Seeds torch's CPU generator, Python's and numpy's."""
    # torch.manual_seed would also queue a seed for every CUDA device, with a stack trace, on each call.
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


def seed_draws(key: int, device: torch.device) -> None:
    """Seeds all generators that a forward pass on ``device`` draws from."""
    seed_host_draws(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)


def training_batches(
    dataset: Any,
    *,
    steps: StepPlan,
    seed: int,
    block: range,
    start: int,
    end: int,
    loaders: int,
    device: torch.device,
    weigh: Weigh | None = None,
) -> Iterator[LoadedBatch]:
    """Returns an iterator over the micro-batches of one worker: step by step, shard by shard.

    Args:
        dataset: The map-style training dataset.
        steps: How steps lie in epochs.
        seed: The run's seed.
        block: The shards of this worker.
        start: The number of steps completed.
        end: The number of steps after which to end.
        loaders: The number of loader processes; 0 loads in this process.
        device: Where the batches will be copied to; for a GPU, their memory is pinned.
        weigh: Weighs the targets of each batch.
    """
    keys = _TrainingKeys(steps, seed, block, start, end)
    return iter(_data_loader(KeyedDataset(dataset, seed), keys, loaders, device, _CollatePair(weigh)))


def validation_batches(
    dataset: Any,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    loaders: int,
    device: torch.device,
    weigh: Weigh | None = None,
) -> Iterator[LoadedBatch]:
    """Returns an iterator over the validation batches of one worker: those numbered rank, rank + W, rank + 2W, ...

    The batches are the same for any number W of workers; the last batch may be smaller than ``batch_size``.
    """
    keys = [
        [(0, number) for number in range(first, min(first + batch_size, len(dataset)))]
        for first in range(rank * batch_size, len(dataset), world_size * batch_size)
    ]
    keyed = KeyedDataset(dataset, draw_key("validation", seed))
    return iter(_data_loader(keyed, keys, loaders, device, _CollatePair(weigh)))


def single_samples(dataset: Any, numbers: Sequence[int], *, seed: int, loaders: int) -> Iterator[Any]:
    """Hands the dataset to ``loaders`` processes; returns an iterator over samples of epoch 0, not collated.

    Raises:
        Exception: The dataset cannot be pickled, and there are loader processes.
    """
    keys = [[(0, number)] for number in numbers]
    return iter(_data_loader(KeyedDataset(dataset, seed), keys, loaders, torch.device("cpu"), collate=_only))


def shape_of(part: Any) -> str:
    """Returns the shape and type of a part of a batch or of an output, for error messages."""
    return f"{list(part.shape)} {part.dtype}" if isinstance(part, torch.Tensor) else type(part).__name__


class _TrainingKeys:
    """A batch sampler that yields the sample keys of a worker's micro-batches: step by step, shard by shard."""

    def __init__(self, steps: StepPlan, seed: int, block: range, start: int, end: int) -> None:
        self._steps, self._seed, self._block, self._start, self._end = steps, seed, block, start, end

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in range(self._start, self._end):
            epoch = self._steps.epoch_of(batch)
            for shard in self._block:
                yield [(epoch, number) for number in self._steps.samples(self._seed, batch, shard).tolist()]


@dataclass(frozen=True, slots=True)
class _CollatePair:
    """Stacks samples, which are pairs (input, target), and weighs the targets; loader processes receive it."""

    weigh: Weigh | None

    def __call__(self, samples: list[Any]) -> LoadedBatch:
        inputs, target = default_collate(samples)
        return LoadedBatch(inputs, target, None if self.weigh is None else self.weigh(target))


def _only(samples: list[Any]) -> Any:
    (sample,) = samples
    if get_worker_info() is not None:
        default_collate([sample])  # what cannot be stacked may be what no process can send, and torch would wait for it
    return sample


def _data_loader(
    dataset: KeyedDataset,
    keys: _TrainingKeys | Sequence[Sequence[SampleKey]],
    loaders: int,
    device: torch.device,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        collate_fn=collate,
        batch_sampler=keys,  # type: ignore[arg-type]  # torch declares a Sampler, but uses any iterable
        num_workers=loaders,
        # Forking a worker would break the threads it has by now; its fork server has none, and has torch imported.
        multiprocessing_context=loader_processes.CONTEXT if loaders else None,
        pin_memory=device.type == "cuda",
    )
