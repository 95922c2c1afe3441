"""The files of a checkpoint, which load without unpickling.

A state is a tree of dicts, lists, numbers and tensors. The tensors are stored in safetensors files, the tree in JSON
with a name in place of each tensor. Sampler, augmentation and dropout have no state: they follow from ``step``.

All files of a state are laid out one after the other in one range of bytes. So copying any part of that range yields
the bytes of the files; nothing is serialised afterwards.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.errors import CheckpointError, one_line
from jobs.checkpoint.file_content import CPU, DTYPES, FileContent, HeaderError, Place, file_of
from jobs.checkpoint.state_tree import pack, unpack

MODEL_FILE = "model.safetensors"
"""Weights and buffers, by their names in the model."""
EMA_FILE = "ema.safetensors"
"""Averaged weights; absent if the job keeps none."""
WEIGHTS_FILES = {"model": MODEL_FILE, "ema": EMA_FILE}
"""The file with each kind of weights."""
_OPTIMIZER_FILE = "optimizer.safetensors"
_MOMENTS_PREFIX = "optimizer.state."
"""Of the names of tensors that torch's optimizers keep for each parameter."""
STATE_FILES = (MODEL_FILE, _OPTIMIZER_FILE, "optimizer.json")
"""The files that the manifest's ``state_sha256`` covers: model, optimizer and schedule."""
TRAINING_FILES = ("training.safetensors", "training.json")
"""All other state; ``buffers`` in it are those that forward has changed and no state dict holds."""

PART_BYTES = 4 * 2**20
"""The most bytes in one part of a file."""
_OWN_PART_BYTES = 2**18
"""A tensor of this many bytes or more has parts of its own, so that it need not be uploaded again when only its
neighbours change."""
_ALIGNMENT = 64
_AVERAGE_PREFIX = "module."
"""The prefix that ``AveragedModel`` adds to the model's names."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a state, laid out in one range of bytes.

    Attributes:
        files: The parts of each file, in order, as ranges of the layout's bytes.
        size: The length of the layout in bytes.
        offsets: Where each of ``contents`` begins, ascending.
        contents: Literal bytes, or the live tensor whose bytes belong there.
    """

    files: Mapping[str, tuple[range, ...]]
    size: int
    offsets: list[int]
    contents: list[bytes | Tensor]

    def copy_to(self, buffer: Tensor, wanted: range) -> None:
        """Copies a range of the layout's bytes; copies from a GPU may still be running when this returns.

        Args:
            buffer: uint8 [at least len(wanted)], on the CPU.
            wanted: The range to copy.
        """
        first = bisect_right(self.offsets, wanted.start) - 1
        for number in range(max(0, first), bisect_left(self.offsets, wanted.stop)):
            offset, content = self.offsets[number], self.contents[number]
            data = bytes_of(content)
            begin, end = max(wanted.start, offset), min(wanted.stop, offset + data.numel())
            if begin < end:
                target = buffer[begin - wanted.start : end - wanted.start]
                target.copy_(data[begin - offset : end - offset], non_blocking=True)


def lay_out(state: Mapping[str, Any]) -> Layout:
    """Lays out the files of a state. Equal states have equal files.

    Args:
        state: ``model`` and ``ema`` are state dicts of tensors; other keys may have any names and trees.

    Raises:
        CheckpointError: The state holds something other than tensors, numbers, strings, lists and dicts.
    """
    writer = _Writer()
    for name, file in (("model", MODEL_FILE), ("ema", EMA_FILE)):
        if state.get(name) is not None:
            writer.add_tensors(file, _only_tensors(name, state[name]))
    rest = {key: value for key, value in state.items() if key not in ("model", "ema")}
    optimizer = {key: rest.pop(key) for key in ("optimizer", "scheduler") if key in rest}
    for stem, group in (("optimizer", optimizer), ("training", rest)):
        tensors: dict[str, Tensor] = {}
        tree = pack(group, "", tensors)
        if tensors:
            writer.add_tensors(f"{stem}.safetensors", tensors)
        writer.add_literal(f"{stem}.json", json.dumps(tree, sort_keys=True, indent=1).encode())
    return writer.layout()


def place_of(file: str, device: torch.device) -> Place:
    """Returns where a worker with this device needs the tensors of a file when it restores them.

    Weights, averages and moments go to the device. Everything else stays on the CPU: the counters that optimizers keep
    beside their moments must be there, and torch leaves them where they are loaded.
    """

    def place(name: str, shape: tuple[int, ...]) -> torch.device:
        is_moment = file == _OPTIMIZER_FILE and name.startswith(_MOMENTS_PREFIX) and shape != ()
        return device if is_moment or file in (MODEL_FILE, EMA_FILE) else CPU

    return place


def decode(files: Mapping[str, FileContent]) -> dict[str, Any]:
    """Returns the state that ``lay_out`` received; it takes the tensors from the files.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    for name in (MODEL_FILE, "optimizer.json", "training.json"):
        if name not in files:
            raise CheckpointError(f"the checkpoint has no {name}; use an earlier one")
    with _decoding():
        state: dict[str, Any] = {"model": files[MODEL_FILE].take(), "ema": None}
        if EMA_FILE in files:
            state["ema"] = files[EMA_FILE].take()
        for stem in ("optimizer", "training"):
            state |= _decode_tree(files, stem)
    return state


def decode_weights(data: bytes, which: Literal["model", "ema"]) -> dict[str, Tensor]:
    """Returns the weights in one of ``WEIGHTS_FILES``, by their names in the model, on the CPU.

    Raises:
        CheckpointError: ``data`` is not a whole safetensors file.
    """
    try:
        tensors = file_of(WEIGHTS_FILES[which], data).take()
    except HeaderError as error:
        raise CheckpointError(f"is no whole safetensors file, {one_line(error)}; restore it") from error
    if which == "model":
        return tensors
    named = tensors.items()
    return {name.removeprefix(_AVERAGE_PREFIX): tensor for name, tensor in named if name.startswith(_AVERAGE_PREFIX)}


def decode_buffers(files: Mapping[str, bytes]) -> dict[str, dict[str, Tensor | None]]:
    """Returns the buffers in ``TRAINING_FILES``, by root and name, on the CPU.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    with _decoding():
        contents = {name: file_of(name, files[name]) for name in TRAINING_FILES if name in files}
        buffers: dict[str, dict[str, Tensor | None]] = _decode_tree(contents, "training").get("buffers", {})
    return buffers


def decode_error(error: Exception) -> CheckpointError:
    """Returns the error for a checkpoint whose bytes are those that were written, and cannot be decoded."""
    return CheckpointError(f"the checkpoint cannot be decoded: {one_line(error)}; use an earlier one")


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise decode_error(error) from error


def _decode_tree(files: Mapping[str, FileContent], stem: str) -> dict[str, Any]:
    tensors = files[f"{stem}.safetensors"].take() if f"{stem}.safetensors" in files else {}
    tree: dict[str, Any] = unpack(json.loads(files[f"{stem}.json"].text()), tensors)
    return tree


class _Writer:
    """Lays out files one after the other, each at an aligned offset."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[range, ...]] = {}
        self._offsets: list[int] = []
        self._contents: list[bytes | Tensor] = []
        self._size = 0

    def add_literal(self, file: str, data: bytes) -> None:
        """Adds a file with these bytes."""
        begin = self._size
        self._put(data, len(data))
        self._close(file, _cut(begin, [(begin, self._size)]))

    def add_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Adds a safetensors file: the length of the header, the header as JSON, and the tensors without gaps.

        Source: https://github.com/huggingface/safetensors, "Format".
        """
        # Sort the widest types first, so that every tensor is aligned, as the format requires.
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
        spans = [(begin, self._size)]
        for name in names:
            tensor, before = tensors[name], self._size
            if tensor.numel():
                self._put(tensor, tensor.numel() * tensor.element_size())
            spans.append((before, self._size))
        self._close(file, _cut(begin, spans))

    def layout(self) -> Layout:
        """Returns the layout of the files added so far."""
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


def _cut(begin: int, spans: list[tuple[int, int]]) -> tuple[range, ...]:
    """Cuts a file into parts: a large tensor has parts of its own, small neighbours share one.

    Args:
        begin: Where the file begins in the layout.
        spans: Where its header and each of its tensors begin and end.
    """
    cuts = [begin]
    for start, stop in spans:
        is_large = stop - start >= _OWN_PART_BYTES
        if start > cuts[-1] and (is_large or stop - cuts[-1] > PART_BYTES):
            cuts.append(start)
        while stop - cuts[-1] > PART_BYTES:
            cuts.append(cuts[-1] + PART_BYTES)
        if is_large and stop > cuts[-1]:
            cuts.append(stop)
    end = spans[-1][1]
    if end > cuts[-1]:
        cuts.append(end)
    return tuple(range(start, stop) for start, stop in zip(cuts, cuts[1:]))


def bytes_of(content: bytes | Tensor) -> Tensor:
    """Returns the bytes as uint8 [bytes]; a view of the tensor's memory where it is contiguous."""
    if isinstance(content, bytes):
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return content.detach().contiguous().reshape(-1).view(torch.uint8)


def _only_tensors(key: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key}: {name} is a {type(value).__name__} and no tensor; keep it as a buffer")
    return dict(state_dict)


def _type_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name}: a tensor of {tensor.dtype} cannot be kept in a checkpoint; convert it")
    return DTYPES[tensor.dtype]
