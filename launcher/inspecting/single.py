"""Single samples of the first epoch, and what is said of one that is bad."""

from typing import Any

from cluster.errors import one_line
from jobs.data.loader import single_samples
from jobs.images.decoding import BadSample
from jobs.images.labelled_images import Split
from jobs.spec import JobSpec


def read_sample(dataset: Any, number: int, split: Split, spec: JobSpec) -> Any:
    """Return a sample of the first epoch, transformed; of a bad one, the ``BadSample`` that its dataset raised.

    Random transforms draw as in training, also for a sample of ``data.val``, for which validation draws otherwise.

    Raises:
        Exception: Anything else that the dataset raises.
    """
    try:
        return next(single_samples(dataset, [number], split=split, seed=spec.seed, loaders=0)).sample
    except BadSample as error:  # the loader's own, which says what ``data.on_bad_sample`` would do, or the dataset's
        return error.__cause__ if isinstance(error.__cause__, BadSample) else error


def bad_sample(number: int, error: BadSample) -> dict[str, str]:
    """Return the document of a bad sample of a dataset."""
    return {"url": error.url or f"sample {number}", "problem": one_line(error.problem)}
