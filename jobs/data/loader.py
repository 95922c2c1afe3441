"""The loader: from a dataset to micro-batches in the memory of this host, through torch's DataLoader.

It receives the keys of all samples of the rest of the run, in order, so it never pauses between epochs. It seeds the
random generators before every sample, by the key of that sample. A bad sample is replaced, or left out, by its key
alone, so the batches are the same for any number of workers and loader processes.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from cluster.errors import TrainingError, one_line
from cluster.process import loader_processes
from cluster.process.data_messages import SampleSkipped
from jobs.data.loader_errors import LoadFailure, failure_of
from jobs.data.store_reports import LoaderStart
from jobs.images.decoding import BadSample
from jobs.sampling import StepPlan, draw_key, permute

SampleKey = tuple[int, int]
"""(epoch, sample number): a sample's random draws depend on these and the run's seed."""

OnBadSample = Literal["error", "skip"]
"""What to do about a ``BadSample``, see ``data.on_bad_sample``."""

_MOST_REPLACEMENTS = 100
"""So many samples in a row that are bad are no accident."""


class LoadedBatch(NamedTuple):
    """A micro-batch; a named tuple, so that torch pins its tensors and sends it between processes."""

    inputs: Any
    target: Any
    weight: float | None = None
    """What ``weigh`` returned for the targets; None if there was no ``weigh``."""
    skipped: tuple[SampleSkipped, ...] = ()
    """The bad samples that others replace, or that are left out."""
    is_empty: bool = False
    """All its samples are left out; ``inputs``, ``target`` and ``weight`` are None. Only a validation batch can be."""


class SingleSample(NamedTuple):
    """A sample, not collated."""

    number: int
    """Its number; another than was asked for if it replaces a bad sample."""
    sample: Any
    skipped: tuple[SampleSkipped, ...] = ()
    """The bad samples that it replaces, or that is left out."""
    is_left_out: bool = False
    """It is bad, and a validation goes on without it; ``sample`` is None."""


Weigh = Callable[[Any], float]
"""Returns a number for the targets of a batch, in the process that loads it, and so before they are on a GPU."""


class KeyedDataset:
    """A map-style dataset whose random transforms are functions of (seed, epoch, sample).

    If the dataset can read encoded samples together, as ``jobs.images.indexed_images`` can, it does so for all samples
    of a micro-batch.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._can_fetch = all(callable(getattr(dataset, name, None)) for name in ("fetch", "fetch_alone", "decoded"))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        (content,) = self.fetch([key[1]])
        return self.sample(key, key[1], content)

    def fetch(self, numbers: Sequence[int]) -> Sequence[Any]:
        """Returns what ``sample`` needs of each of these samples."""
        return self._dataset.fetch(numbers) if self._can_fetch else [None] * len(numbers)

    def fetch_alone(self, number: int) -> Any:
        """Returns what ``sample`` needs of a sample whose turn has not come."""
        return self._dataset.fetch_alone(number) if self._can_fetch else None

    def sample(self, key: SampleKey, number: int, content: Any) -> Any:
        """Returns sample ``number``, with the random draws of ``key``.

        Raises:
            BadSample: It is bad.
        """
        seed_host_draws(draw_key("sample", self._seed, *key))
        return self._dataset.decoded(number, content) if self._can_fetch else self._dataset[number]

    def replacement(self, key: SampleKey, tried: int) -> int:
        """Returns the number of the sample to try in place of a bad one, after ``tried`` others that are bad too.

        They come in the order of a permutation of all others; ``tried`` must be smaller than their number.
        """
        place = np.array([tried], dtype=np.uint64)
        other = int(permute(place, len(self) - 1, draw_key("replacement", self._seed, *key))[0])
        return other + (other >= key[1])


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
    on_bad_sample: OnBadSample = "error",
) -> Iterator[LoadedBatch]:
    """Returns an iterator over the micro-batches of one worker: step by step, shard by shard.

    With ``skip``, a bad sample is replaced by one that its key chooses, with the random draws of the bad one's key.

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
        on_bad_sample: What to do about a ``BadSample``.

    Raises:
        Exception: While iterating: the dataset raised it, or a ``BadSample`` that is not skipped. From a loader process
            it has its type if that is one of Python's or of the launcher's, and a note with its traceback.
        TrainingError: While iterating: a bad sample and all that were tried in its place are bad.
    """
    keys = _TrainingKeys(steps, seed, block, start, end)
    batches = _Batches(KeyedDataset(dataset, seed), "train", on_bad_sample, _Collate(weigh))
    return _loaded(batches, keys, loaders, device)


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
    on_bad_sample: OnBadSample = "error",
) -> Iterator[LoadedBatch]:
    """Returns an iterator over the validation batches of one worker: those numbered rank, rank + W, rank + 2W, ...

    The batches are the same for any number W of workers; the last batch may be smaller than ``batch_size``. With
    ``skip``, bad samples are left out of their batch, which may become empty.

    Raises:
        Exception: While iterating, see ``training_batches``.
    """
    keys = (
        [(0, number) for number in range(first, min(first + batch_size, len(dataset)))]
        for first in range(rank * batch_size, len(dataset), world_size * batch_size)
    )
    keyed = KeyedDataset(dataset, draw_key("validation", seed))
    return _loaded(_Batches(keyed, "val", on_bad_sample, _Collate(weigh)), keys, loaders, device)


def single_samples(
    dataset: Any,
    numbers: Sequence[int],
    *,
    split: Literal["train", "val"],
    seed: int,
    loaders: int,
    on_bad_sample: OnBadSample = "error",
) -> Iterator[SingleSample]:
    """Hands the dataset to ``loaders`` processes; returns an iterator over samples of epoch 0, not collated.

    Raises:
        Exception: The dataset cannot be pickled, and there are loader processes; or while iterating, see
            ``training_batches``.
    """
    keys = ([(0, number)] for number in numbers)
    batches = _Batches(KeyedDataset(dataset, seed), split, on_bad_sample, _only)
    return _loaded(batches, keys, loaders, torch.device("cpu"))


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
class _ReadSamples:
    """The samples of a batch, before they are collated."""

    numbers: list[int]
    samples: list[Any]
    skipped: tuple[SampleSkipped, ...]


@dataclass(frozen=True, slots=True)
class _Collate:
    """Stacks samples, which are pairs (input, target), and weighs the targets; loader processes receive it."""

    weigh: Weigh | None

    def __call__(self, read: _ReadSamples) -> LoadedBatch:
        if not read.samples:
            return LoadedBatch(None, None, skipped=read.skipped, is_empty=True)
        inputs, target = default_collate(read.samples)
        return LoadedBatch(inputs, target, None if self.weigh is None else self.weigh(target), read.skipped)


def _only(read: _ReadSamples) -> SingleSample:
    if not read.samples:
        return SingleSample(read.skipped[0].number, None, read.skipped, is_left_out=True)
    (number,), (sample,) = read.numbers, read.samples
    if get_worker_info() is not None:
        default_collate([sample])  # what cannot be stacked may be what no process can send, and torch would wait for it
    return SingleSample(number, sample, read.skipped)


class _Batches(Dataset[Any]):
    """What torch's loader reads: its items are whole batches, or why there is none; its keys are lists of sample keys.

    Nothing raises, because of what torch makes of an exception in a loader process.
    """

    def __init__(
        self,
        samples: KeyedDataset,
        split: Literal["train", "val"],
        on_bad_sample: OnBadSample,
        collate: Callable[[_ReadSamples], Any],
    ) -> None:
        self._samples = samples
        self._split = split
        self._skips = on_bad_sample == "skip"
        self._collate = collate

    def __getitem__(self, keys: Sequence[SampleKey]) -> Any:
        try:
            return self._collate(self._read(keys))
        except Exception as error:  # the user's own code
            return failure_of(error)

    def _read(self, keys: Sequence[SampleKey]) -> _ReadSamples:
        numbers, samples, skipped = list[int](), list[Any](), list[SampleSkipped]()
        for key, content in zip(keys, self._samples.fetch([number for _, number in keys])):
            number, tried = key[1], 0
            while True:
                try:
                    samples.append(self._samples.sample(key, number, content))
                    numbers.append(number)
                    break
                except BadSample as error:
                    if not self._skips:
                        raise self._refused(number, error) from error
                    skipped.append(SampleSkipped(self._split, key[0], number, one_line(error)))
                if self._split == "val":
                    break
                if tried == min(_MOST_REPLACEMENTS, len(self._samples) - 1):
                    raise self._exhausted(key, tried, skipped[-1])
                number = self._samples.replacement(key, tried)
                content = self._samples.fetch_alone(number)
                tried += 1
        return _ReadSamples(numbers, samples, tuple(skipped))

    def _refused(self, number: int, error: BadSample) -> BadSample:
        passes = "replaces it by another one" if self._split == "train" else "leaves it out"
        what = f"data.{self._split}: sample {number}: {one_line(error)}"
        return BadSample(f"{what}; or data.on_bad_sample: skip {passes}")

    def _exhausted(self, key: SampleKey, tried: int, last: SampleSkipped) -> TrainingError:
        others = f", and so are {tried} others, tried in its place" if tried else ", and there is no other one"
        what = f"data.{self._split}: sample {key[1]} is bad{others}"
        return TrainingError(f"{what}; the last: {last.reason}; repair the data")


def _loaded(batches: _Batches, keys: Iterable[list[SampleKey]], loaders: int, device: torch.device) -> Iterator[Any]:
    """Hands the dataset to its loader processes; returns an iterator over its batches, which raises what they could not
    be read for."""
    loader = DataLoader(
        batches,
        batch_size=None,  # a key is a whole batch
        sampler=keys,
        collate_fn=_unchanged,
        num_workers=loaders,
        worker_init_fn=LoaderStart(),
        # Forking a worker would break the threads it has by now; its fork server has none, and has torch imported.
        multiprocessing_context=loader_processes.CONTEXT if loaders else None,
        pin_memory=device.type == "cuda",
    )
    return _raising(iter(loader))


def _unchanged(batch: Any) -> Any:
    return batch


def _raising(loaded: Iterator[Any]) -> Iterator[Any]:
    for batch in loaded:
        if isinstance(batch, LoadFailure):
            raise batch.error
        yield batch
