"""Messages about the data from training processes to the driver; ``messages`` has the others."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SampleSkipped:
    """A sample is bad: another one replaces it, or the validation leaves it out. The rank that has read it sends it,
    every time it meets it."""

    split: Literal["train", "val"]
    """The dataset."""
    epoch: int
    """The epoch in which it was read; 0 for a validation."""
    number: int
    """Its number in the dataset."""
    reason: str
    """What is wrong with it, in one line that names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataDelayed:
    """A store of data does not answer; the worker, or a loader process of it, waits and retries its reads."""

    reason: str
    """The store's URL and what it answers, in one line."""
