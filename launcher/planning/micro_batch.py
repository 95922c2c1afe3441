"""One real micro-batch, and the targets of the dataset that it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.components.build import listed_targets


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples of a dataset, as model and loss get them."""

    key: str
    """The key of the dataset in the description."""
    dataset: Any
    numbers: list[int]
    """The numbers of the samples in the dataset."""
    inputs: Any
    """The inputs of the samples, stacked, on the device."""
    target: Any
    """Their targets, stacked, on the device."""
    output: Any = None
    """The model's output for ``inputs``; None until it is computed."""


def all_targets(batch: MicroBatch) -> tuple[Tensor, Sequence[int]]:
    """Return the targets to check, and the numbers of their samples.

    They are all targets of the dataset if it lists them and the list agrees with the batch, else those of the batch.

    Shapes: targets [samples, ...].
    """
    listed = listed_targets(batch.dataset)
    if listed is not None and listed.dim() and len(listed) == len(batch.dataset):
        of_batch = listed[batch.numbers].to(batch.target)
        if torch.equal(of_batch, batch.target):  # no transform lies between
            return listed, range(len(listed))
    return batch.target, batch.numbers


def first_of(chosen: Tensor, targets: Tensor, numbers: Sequence[int]) -> tuple[int, float]:
    """Return the sample number and the value of the first chosen target.

    Shapes: chosen (bool) and targets [samples, ...].
    """
    place = tuple(chosen.nonzero()[0])
    return numbers[int(place[0])], targets[place].item()
