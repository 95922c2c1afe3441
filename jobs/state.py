"""What a checkpoint holds, as files that load without unpickling, and the digest of a state.

A state is a tree of dicts, lists, numbers and tensors. The tensors go into safetensors files and the
tree, with a name in place of each tensor, into JSON. Sampler, augmentation and dropout need no place in
it: they follow from ``step``.
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cluster.errors import CheckpointError

MODEL_FILE = "model.safetensors"
"""Weights and buffers under their names in the model, for anybody to load."""
TENSORS_FILE = "training.safetensors"
"""Every other tensor: optimizer moments, averaged weights."""
TREE_FILE = "training.json"
"""Everything else: step, hyperparameters, schedule, the best metric so far."""


def to_host(tree: Any) -> Any:
    """A copy of a state that later steps cannot change: tensors on the CPU, contiguous, their own."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tree, Mapping) and not isinstance(tree, Counter):
        return {key: to_host(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([to_host(value) for value in tree])
    return copy.copy(tree)


def encode(state: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a state: ``state["model"]`` is the model's state dict, the rest may have any keys.

    Raises:
        CheckpointError: The state holds something that is no tensor, number, string, list or dict.
    """
    model, tensors = _model_tensors(state), dict[str, Tensor]()
    tree = _pack({key: value for key, value in state.items() if key != "model"}, "", tensors)
    return {
        MODEL_FILE: safetensors.torch.save(model),
        TENSORS_FILE: safetensors.torch.save(tensors),
        TREE_FILE: json.dumps(tree, sort_keys=True, indent=1).encode(),
    }


def decode(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The state that ``encode`` made files of.

    Raises:
        CheckpointError: A file is missing or is not what it should be.
    """
    missing = sorted({MODEL_FILE, TENSORS_FILE, TREE_FILE} - files.keys())
    if missing:
        raise CheckpointError(f"the checkpoint has no {missing[0]}; use an earlier one")
    try:
        tensors = safetensors.torch.load(files[TENSORS_FILE])
        state = _unpack(json.loads(files[TREE_FILE]), tensors)
        return {"model": safetensors.torch.load(files[MODEL_FILE]), **state}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint cannot be decoded: {error}; use an earlier one") from error


def _model_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state["model"].items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"model: {name} is a {type(value).__name__} and no tensor; keep it as a buffer")
    return {name: tensor.contiguous() for name, tensor in state["model"].items()}


def size_in_bytes(state: Mapping[str, Any]) -> int:
    """The bytes of all tensors in a state, which is about the size of its checkpoint.

    Raises:
        CheckpointError: The state holds something that a checkpoint cannot.
    """
    _model_tensors(state)
    tensors: dict[str, Tensor] = {}
    _pack(state, "", tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over model weights and buffers, optimizer and schedule, whatever else the state holds.

    Returns:
        64 hexadecimal digits; equal states have equal digests, on any machine of the same byte order.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack({key: state[key] for key in ("model", "optimizer", "scheduler")}, "", tensors)
    sha256 = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha256.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        if tensor.numel():
            sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


# JSON has no tuples, no keys but strings and no tensors: each of these becomes a list with a tag, and so
# does a plain list, to tell them apart.


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"{name} is the name of two tensors; rename one of their keys")
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, Counter):  # MultiStepLR keeps its milestones in one
        return ["counter", sorted(value.items())]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, f"{name}.{key}" if name else key, tensors) for key, item in value.items()}
        return ["map", [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in sorted(value.items(), key=repr)]]
    if isinstance(value, (list, tuple)):
        tag = "tuple" if isinstance(value, tuple) else "list"
        return [tag, [_pack(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"{name}: a {type(value).__name__} cannot be kept in a checkpoint; "
        "keep tensors, numbers, strings, lists and dicts"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    tag, content = value
    if tag == "tensor":
        return tensors[content]
    if tag == "counter":
        return Counter(dict(content))
    if tag == "map":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items
