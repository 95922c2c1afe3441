"""Compares trees of tensors, such as batches and outputs of models, bit for bit."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor


def has_same_bits(one: Any, other: Any) -> bool:
    """Return whether two trees of tensors and plain values are the same; NaN is the same as NaN.

    Objects of other types count as the same: nobody knows how to compare them.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.equal(_words_of(one), _words_of(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(has_same_bits(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(has_same_bits, one, other))
    if is_dataclass(one) and type(one) is type(other):
        return has_same_bits(vars(one), vars(other))
    if isinstance(one, (bool, int, float, complex, str, bytes)):
        return bool(one == other) or (one != one and other != other)
    return True


def _words_of(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as integers. Shapes: any -> [elements, or more]."""
    plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    memory = plain.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memory.view({2: torch.int16, 4: torch.int32, 8: torch.int64}.get(memory.element_size(), torch.uint8))
