"""Compares trees of tensors, such as batches and outputs of models, bit for bit."""

from typing import Any

import torch
from torch import Tensor


def has_same_bits(one: Any, other: Any) -> bool:
    """Return whether two trees of tensors, dicts, lists and plain values are the same; NaN is the same as NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes_of(one), _bytes_of(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(has_same_bits(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(has_same_bits, one, other))
    return bool(one == other)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor. Shapes: any -> uint8 [bytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
