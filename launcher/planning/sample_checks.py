"""Checks on the samples of a dataset: that they can be read, stacked and handed over, and are the same every time."""

from typing import Any

from torch.utils.data import default_collate

from cluster.errors import DescriptionError, in_short
from jobs.data.loader import KeyedDataset, single_samples
from jobs.spec import JobSpec
from launcher.planning.same_bits import has_same_bits


def read_samples(dataset: Any, numbers: list[int], key: str, seed: int) -> list[Any]:
    """Read samples as a worker without loader processes does.

    Args:
        dataset: The dataset.
        numbers: The numbers of the samples.
        key: The key of the dataset in the description.
        seed: The run's seed.

    Raises:
        DescriptionError: The dataset raised an exception, or a sample is no pair (input, target).
    """
    keyed = KeyedDataset(dataset, seed)
    samples = []
    for number in numbers:
        try:
            samples.append(keyed[0, number])
        except Exception as error:  # the dataset is the user's own code
            raise DescriptionError(
                f"{key}: sample {number} raised {type(error).__name__}: {in_short(error)}"
            ) from error
        if not (isinstance(samples[-1], (tuple, list)) and len(samples[-1]) == 2):
            raise DescriptionError(
                f"{key}: sample {number} must be a pair (input, target), got {type(samples[-1]).__name__}"
            )
    return samples


def stack(samples: list[Any], key: str) -> Any:
    """Return samples as a batch.

    Raises:
        DescriptionError: They have different shapes or types.
    """
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise DescriptionError(
            f"{key}: samples cannot be stacked to a batch: {in_short(error)}; give all the same shape"
        ) from error


def check_read_again(dataset: Any, samples: list[Any], numbers: list[int], key: str, spec: JobSpec) -> None:
    """Read samples again where a worker reads them, in a loader process if the job has some, and compare.

    Args:
        dataset: The dataset.
        samples: What ``read_samples`` returned.
        numbers: The numbers of the samples.
        key: The key of the dataset in the description.
        spec: The description.

    Raises:
        DescriptionError: A loader process cannot read the dataset, or a sample is another one this time.
    """
    read_again = single_samples(dataset, numbers, seed=spec.seed, loaders=min(1, spec.data.loaders))
    for number, sample in zip(numbers, samples):
        try:
            again = next(read_again)
        except Exception as error:  # pickling and reading call the user's own code
            what = f"raised {type(error).__name__}: {in_short(error)}"
            if not spec.data.loaders:
                raise DescriptionError(f"{key}: sample {number} {what}, when it was read again") from error
            raise DescriptionError(
                f"{key}: handing it to a loader process, or reading it there, {what}; make it picklable (functions of "
                "a module in place of lambdas, files opened in __getitem__), or write data.loaders: 0"
            ) from error
        if spec.train.exact and not has_same_bits(again, default_collate([sample])):
            raise DescriptionError(
                f"{key}: sample {number} differed when it was read again from the same seed: it draws from a generator "
                "of its own, or depends on what was read before; draw from the generators of torch, random and numpy, "
                "which are seeded for every sample, or write train.exact: false"
            )
