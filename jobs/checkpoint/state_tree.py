"""A state as JSON and named tensors.

A state is a tree of dicts, lists, tuples, numbers and tensors. JSON has no tuples, no tensors and no keys but strings.
Each of these becomes a list whose first item is a tag; so does a plain list, to tell them apart.
"""

from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from cluster.errors import CheckpointError


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a tree as JSON can hold it, and moves its tensors into ``tensors`` under their paths below ``name``.

    Raises:
        CheckpointError: The tree holds something else, or two tensors get the same name.
    """
    if isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"{name} is the name of two tensors; rename one of their keys")
        tensors[name] = value
        return ["tensor", name, *_memory_order(value)]
    if isinstance(value, Counter):  # MultiStepLR keeps its milestones in one
        return ["counter", sorted(value.items())]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: pack(item, f"{name}.{key}" if name else key, tensors) for key, item in value.items()}
        return [
            "map",
            [
                [key, pack(item, f"{name}.{key}", tensors)]
                for key, item in sorted(value.items(), key=lambda item: repr(item[0]))
            ],
        ]
    if isinstance(value, (list, tuple)):
        tag = "tuple" if isinstance(value, tuple) else "list"
        return [tag, [pack(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"{name}: a {type(value).__name__} cannot be kept in a checkpoint; "
        "keep tensors, numbers, strings, lists and dicts"
    )


def unpack(value: Any, tensors: MutableMapping[str, Tensor]) -> Any:
    """Returns the tree that ``pack`` received, and takes its tensors out of ``tensors``, one by one."""
    if isinstance(value, dict):
        return {key: unpack(item, tensors) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    tag, content, *order = value
    if tag == "tensor":
        return _in_memory_order(tensors.pop(content), order)
    if tag == "counter":
        return Counter(dict(content))
    if tag == "map":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items


# A safetensors file holds a tensor in the order of its dimensions, but the moments of a channels-last parameter have
# another memory order. It must be restored: with another one torch chooses other kernels, which may round differently.


def _memory_order(tensor: Tensor) -> list[int]:
    """Returns the dimensions by falling stride; empty if that is the usual order, or if the memory has gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else []


def _in_memory_order(tensor: Tensor, order: list[int]) -> Tensor:
    """Returns the same values in the memory order that ``_memory_order`` returned."""
    if not order:
        return tensor
    return tensor.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))
