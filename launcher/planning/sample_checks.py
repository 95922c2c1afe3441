"""Checks on the samples of a dataset: that workers can read and stack them, and that they are the same every time."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import default_collate

from cluster.errors import DescriptionError, in_short
from jobs.data.loader import single_samples
from jobs.spec import JobSpec
from jobs.training.failure_causes import message_of
from launcher.planning.same_bits import has_same_bits

_MOST_READ_AGAIN = 32


def read_samples(dataset: Any, numbers: list[int], key: str, spec: JobSpec) -> list[Any]:
    """Read samples as a worker does, in a loader process if the job has some, and the first of them once more.

    Args:
        dataset: The dataset.
        numbers: The numbers of the samples.
        key: The key of the dataset in the description.
        spec: The description.

    Raises:
        DescriptionError: The dataset cannot be handed to a loader process or raised an exception, a sample is no pair
            (input, target) of what can be stacked, or it differs the second time.
    """
    samples, copies = [], dict[int, Any]()
    most_again = _MOST_READ_AGAIN if spec.train.exact else 0
    for number, sample in zip(numbers, _read(dataset, numbers, key, spec)):
        if not (isinstance(sample, (tuple, list)) and len(sample) == 2):
            raise DescriptionError(
                f"{key}: sample {number} must be a pair (input, target), got {type(sample).__name__}"
            )
        samples.append(sample)
        copy = stack([sample], key)  # a copy: the dataset may change its own tensors
        if len(copies) < most_again:
            copies[number] = copy
    # In another order: a generator in the dataset would give each sample what it gave another before.
    again = list(copies)[::-1]
    for number, sample in zip(again, _read(dataset, again, key, spec, " when it was read again")):
        if not has_same_bits(stack([sample], key), copies[number]):
            raise DescriptionError(
                f"{key}: sample {number} differed when it was read again from the same seed: it draws from a generator "
                "of its own, or depends on what was read before; draw from the generators of torch, random and numpy, "
                "which are seeded for every sample, or write train.exact: false"
            )
    return samples


def stack(samples: list[Any], key: str) -> Any:
    """Return samples as a batch.

    Raises:
        DescriptionError: They have different shapes, or types that cannot be stacked.
    """
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise DescriptionError(
            f"{key}: samples cannot be stacked to a batch: {in_short(error)}; give all the same shape"
        ) from error


def _read(dataset: Any, numbers: list[int], key: str, spec: JobSpec, when: str = "") -> Iterator[Any]:
    """Yield samples; ``when`` ends what errors say."""
    loaders = min(1, spec.data.loaders)
    try:
        samples = single_samples(dataset, numbers, seed=spec.seed, loaders=loaders)
    except Exception as error:  # pickling runs the user's own code
        raise DescriptionError(
            f"{key}: handing it to a loader process raised {type(error).__name__}: {in_short(error)}; make it "
            "picklable (functions of a module for lambdas, files opened in __getitem__), or write data.loaders: 0"
        ) from error
    for number in numbers:
        try:
            sample = next(samples)
        except Exception as error:  # the dataset is the user's own code
            text = message_of(error) if loaders else in_short(error)  # without the traceback of the loader process
            raise DescriptionError(f"{key}: sample {number} raised {type(error).__name__}: {text}{when}") from error
        yield sample
