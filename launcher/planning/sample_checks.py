"""Checks on the samples of a dataset: that workers can read and stack them, and that they are the same every time."""

from collections.abc import Iterator
from typing import Any, Literal

from torch.utils.data import default_collate

from cluster.errors import DescriptionError, LauncherError, TrainingError, in_short, one_line
from jobs.data.loader import SingleSample, single_samples
from jobs.images.decoding import BadSample
from jobs.spec import JobSpec
from launcher.planning.same_bits import has_same_bits

_MOST_READ_AGAIN = 32


def read_samples(dataset: Any, numbers: list[int], key: str, spec: JobSpec) -> dict[int, SingleSample]:
    """Read samples as a worker does, in a loader process if the job has some, and the first of them once more.

    Args:
        dataset: The dataset.
        numbers: The numbers of the samples.
        key: The key of the dataset in the description.
        spec: The description.

    Returns:
        By its number, each sample or, with ``data.on_bad_sample: skip``, the one that replaces it; those that a
        validation leaves out are missing.

    Raises:
        DescriptionError: The dataset cannot be handed to a loader process or raised an exception, a sample is no pair
            (input, target) of what can be stacked, or it differs the second time; or none is left.
        StorageError: The store of the data does not answer.
    """
    found, copies = dict[int, SingleSample](), dict[int, Any]()
    most_again = _MOST_READ_AGAIN if spec.train.exact else 0
    for number, single in zip(numbers, _read(dataset, numbers, key, spec)):
        if single.is_left_out:
            continue
        if not (isinstance(single.sample, (tuple, list)) and len(single.sample) == 2):
            raise DescriptionError(
                f"{key}: sample {single.number} must be a pair (input, target), got {type(single.sample).__name__}"
            )
        found[number] = single
        copy = stack([single.sample], key)  # a copy: the dataset may change its own tensors
        if len(copies) < most_again:
            copies[number] = copy
    if not found:
        raise DescriptionError(f"{key}: the first {len(numbers)} samples that were read are bad; repair the data")
    # In another order: a generator in the dataset would give each sample what it gave another before.
    again = list(copies)[::-1]
    for number, single in zip(again, _read(dataset, again, key, spec, " when it was read again")):
        if single.is_left_out or not has_same_bits(stack([single.sample], key), copies[number]):
            raise DescriptionError(
                f"{key}: sample {found[number].number} differed when it was read again from the same seed: it draws "
                "from a generator of its own, or depends on what was read before; draw from the generators of torch, "
                "random and numpy, which are seeded for every sample, or write train.exact: false"
            )
    return found


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


def _read(dataset: Any, numbers: list[int], key: str, spec: JobSpec, when: str = "") -> Iterator[SingleSample]:
    """Yield samples; ``when`` ends what errors say."""
    split: Literal["train", "val"] = "train" if key == "data.train" else "val"
    loaders, on_bad_sample = min(1, spec.data.loaders), spec.data.on_bad_sample
    try:
        samples = single_samples(
            dataset, numbers, split=split, seed=spec.seed, loaders=loaders, on_bad_sample=on_bad_sample
        )
    except Exception as error:  # pickling runs the user's own code
        raise DescriptionError(
            f"{key}: handing it to a loader process raised {type(error).__name__}: {in_short(error)}; make it "
            "picklable (functions of a module for lambdas, files opened in __getitem__), or write data.loaders: 0"
        ) from error
    for number in numbers:
        try:
            sample = next(samples)
        except TrainingError as error:
            raise DescriptionError(str(error)) from error
        except LauncherError:
            raise
        except BadSample as error:
            raise DescriptionError(one_line(error)) from error
        except Exception as error:  # the dataset is the user's own code
            what = f"{type(error).__name__}: {in_short(error)}"
            raise DescriptionError(f"{key}: sample {number} raised {what}{when}") from error
        yield sample
