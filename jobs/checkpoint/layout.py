"""What a checkpoint holds, as files that load without unpickling.

A state is a tree of dicts, lists, numbers and tensors. The tensors go into safetensors files and the
tree, with a name in place of each tensor, into JSON. Sampler, augmentation and dropout need no place in
it: they follow from ``step``.

All files of a state are laid out one after the other in one stretch of bytes, so that a copy of any part of it is
plain copying, and is the file: nothing is serialised afterwards.
"""

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.errors import CheckpointError, one_line

MODEL_FILE = "model.safetensors"
"""Weights and buffers under their names in the model."""
EMA_FILE = "ema.safetensors"
"""Averaged weights, if there are any."""
WEIGHTS_FILES = {"model": MODEL_FILE, "ema": EMA_FILE}
STATE_FILES = (MODEL_FILE, "optimizer.safetensors", "optimizer.json")
"""The files that ``state_sha256`` is taken of: model, optimizer and schedule."""

PART_BYTES = 4 * 2**20
"""The most that a part of a file has."""
_OWN_PART_BYTES = 2**18
"""A tensor of so many bytes begins a part, so that it is told to be unchanged whatever its neighbours do."""
_ALIGNMENT = 64
_OF_AVERAGE = "module."
"""What ``AveragedModel`` puts before the model's own names."""

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The names that safetensors has for types."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a state in one stretch of bytes, of which every stretch between two of its cuts can be copied.

    Attributes:
        files: The parts of each file, in order, as ranges of the stretch.
        size: Bytes.
        offsets, contents: What lies where, ascending: literal bytes, or a tensor's. The tensors are the live ones.
    """

    files: Mapping[str, tuple[range, ...]]
    size: int
    offsets: list[int]
    contents: list[bytes | Tensor]

    def copy_to(self, buffer: Tensor, wanted: range) -> None:
        """Copies a range of the stretch; from a GPU the copies may still be under way when this returns.

        Args:
            buffer: uint8 [at least the length of the range], on the CPU.
            wanted: Which bytes.
        """
        first = bisect_right(self.offsets, wanted.start) - 1
        for number in range(max(0, first), bisect_left(self.offsets, wanted.stop)):
            offset, content = self.offsets[number], self.contents[number]
            data = _bytes_of(content)
            begin, end = max(wanted.start, offset), min(wanted.stop, offset + data.numel())
            if begin < end:
                target = buffer[begin - wanted.start : end - wanted.start]
                target.copy_(data[begin - offset : end - offset], non_blocking=True)


def lay_out(state: Mapping[str, Any]) -> Layout:
    """The files of a state: ``state["model"]`` and ``state["ema"]`` are state dicts, the rest may have any keys.

    Equal states have equal files.

    Raises:
        CheckpointError: The state holds something that is no tensor, number, string, list or dict.
    """
    writer = _Writer()
    for name, file in (("model", MODEL_FILE), ("ema", EMA_FILE)):
        if state.get(name) is not None:
            writer.add_tensors(file, _only_tensors(name, state[name]))
    rest = {key: value for key, value in state.items() if key not in ("model", "ema")}
    optimizer = {key: rest.pop(key) for key in ("optimizer", "scheduler") if key in rest}
    for stem, group in (("optimizer", optimizer), ("training", rest)):
        tensors: dict[str, Tensor] = {}
        tree = _pack(group, "", tensors)
        if tensors:
            writer.add_tensors(f"{stem}.safetensors", tensors)
        writer.add_literal(f"{stem}.json", json.dumps(tree, sort_keys=True, indent=1).encode())
    return writer.layout()


def decode(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The state that ``lay_out`` made files of.

    Raises:
        CheckpointError: A file is missing or is not what it should be.
    """
    for name in (MODEL_FILE, "optimizer.json", "training.json"):
        if name not in files:
            raise CheckpointError(f"the checkpoint has no {name}; use an earlier one")
    try:
        state: dict[str, Any] = {"model": safetensors.torch.load(files[MODEL_FILE]), "ema": None}
        if EMA_FILE in files:
            state["ema"] = safetensors.torch.load(files[EMA_FILE])
        for stem in ("optimizer", "training"):
            tensors = files.get(f"{stem}.safetensors")
            tree = json.loads(files[f"{stem}.json"])
            state |= _unpack(tree, {} if tensors is None else safetensors.torch.load(tensors))
        return state
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint cannot be decoded: {error}; use an earlier one") from error


def decode_weights(data: bytes, which: Literal["model", "ema"]) -> dict[str, Tensor]:
    """The weights in one of ``WEIGHTS_FILES``, by their names in the model.

    Raises:
        CheckpointError: It is no safetensors file.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"is no whole safetensors file, {one_line(error)}; restore it") from error
    if which == "model":
        return tensors
    named = tensors.items()
    return {name.removeprefix(_OF_AVERAGE): tensor for name, tensor in named if name.startswith(_OF_AVERAGE)}


def memory_of(buffer: Tensor) -> memoryview:
    """The memory of a tensor uint8 [bytes] on the CPU, which may be written to."""
    return memoryview(cast(Any, buffer.numpy()))


class _Writer:
    """Puts files one after the other, each at an aligned offset."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[range, ...]] = {}
        self._offsets: list[int] = []
        self._contents: list[bytes | Tensor] = []
        self._size = 0

    def add_literal(self, file: str, data: bytes) -> None:
        begin = self._size
        self._put(data, len(data))
        self._close(file, _cut(begin, [(begin, self._size)]))

    def add_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """A safetensors file: the length of the header, the header as JSON, and the tensors without gaps.

        Source: the format's description in the safetensors repository.
        """
        # The widest types first, so that every tensor is aligned, as the format wants it.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header, end = {}, 0
        for name in names:
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _type_name(name, tensor), "shape": list(tensor.shape), "data_offsets": [begin, end],
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        begin = self._size
        self._put(len(text).to_bytes(8, "little") + text, 8 + len(text))
        stretches = [(begin, self._size)]
        for name in names:
            tensor, before = tensors[name], self._size
            if tensor.numel():
                self._put(tensor, tensor.numel() * tensor.element_size())
            stretches.append((before, self._size))
        self._close(file, _cut(begin, stretches))

    def layout(self) -> Layout:
        return Layout(self._files, self._size, self._offsets, self._contents)

    def _put(self, content: bytes | Tensor, size: int) -> None:
        self._offsets.append(self._size)
        self._contents.append(content)
        self._size += size

    def _close(self, file: str, parts: tuple[range, ...]) -> None:
        self._files[file] = parts
        gap = -self._size % _ALIGNMENT
        if gap:
            self._put(bytes(gap), gap)


def _cut(begin: int, stretches: list[tuple[int, int]]) -> tuple[range, ...]:
    """The parts of a file: tensors that are large have their own, small neighbours share one."""
    cuts = [begin]
    for start, stop in stretches:
        is_large = stop - start >= _OWN_PART_BYTES
        if start > cuts[-1] and (is_large or stop - cuts[-1] > PART_BYTES):
            cuts.append(start)
        while stop - cuts[-1] > PART_BYTES:
            cuts.append(cuts[-1] + PART_BYTES)
        if is_large and stop > cuts[-1]:
            cuts.append(stop)
    end = stretches[-1][1]
    if end > cuts[-1]:
        cuts.append(end)
    return tuple(range(start, stop) for start, stop in zip(cuts, cuts[1:]))


def _bytes_of(content: bytes | Tensor) -> Tensor:
    """As uint8 [bytes]; the tensor's own memory where it is contiguous."""
    if isinstance(content, bytes):
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return content.detach().contiguous().reshape(-1).view(torch.uint8)


def _only_tensors(key: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key}: {name} is a {type(value).__name__} and no tensor; keep it as a buffer")
    return dict(state_dict)


def _type_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{name}: a tensor of {tensor.dtype} cannot be kept in a checkpoint; convert it")
    return _DTYPES[tensor.dtype]


# A file holds a tensor in the order of its dimensions. The moments of a parameter in channels-last order lie otherwise,
# and where they do not lie as they did, torch takes other kernels for the next update, which may round otherwise.


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest; none where that is their order, or has gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else []


def _laid_out(tensor: Tensor, order: list[int]) -> Tensor:
    if not order:
        return tensor
    return tensor.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))


# JSON has no tuples, no keys but strings and no tensors: each of these becomes a list with a tag, and so
# does a plain list, to tell them apart.


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if name in tensors:
            raise CheckpointError(f"{name} is the name of two tensors; rename one of their keys")
        tensors[name] = value
        return ["tensor", name, *_memory_order(value)]
    if isinstance(value, Counter):  # MultiStepLR keeps its milestones in one
        return ["counter", sorted(value.items())]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, f"{name}.{key}" if name else key, tensors) for key, item in value.items()}
        return [
            "map",
            [
                [key, _pack(item, f"{name}.{key}", tensors)]
                for key, item in sorted(value.items(), key=lambda item: repr(item[0]))
            ],
        ]
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
    tag, content, *order = value
    if tag == "tensor":
        return _laid_out(tensors[content], order)
    if tag == "counter":
        return Counter(dict(content))
    if tag == "map":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items
