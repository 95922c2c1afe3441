"""The files of a checkpoint in memory: one byte range on disk, each tensor in an allocation of its own here.

A safetensors file begins with its header, which names the type, the shape and the bytes of each tensor. So a reader of
the header can allocate all tensors and then write the rest of the file into them, in pieces and in any order. No piece
of the file outlives its writing, and a tensor is aligned as one that torch computes: kernels may round otherwise where
it is not. Nothing is unpickled.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from cluster.errors import one_line

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
"""The names of types in safetensors."""
_TYPES = {name: dtype for dtype, name in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors library has it."""
_PIECE_BYTES = 2**20
"""Written at a time, from a copy: torch takes no memory that is read-only."""
CPU = torch.device("cpu")
_SUFFIX = ".safetensors"

Place = Callable[[str, tuple[int, ...]], torch.device]
"""Where to put a tensor, by its name and shape."""


class HeaderError(ValueError):
    """What is wrong with the header of a safetensors file."""


def on_cpu(_: str, __: tuple[int, ...]) -> torch.device:
    """Puts every tensor on the CPU."""
    return CPU


class FileContent:
    """The content of one file, to be written in pieces.

    Attributes:
        head: The bytes before the tensors: the header, or all bytes of a file without tensors. uint8 [bytes], on the
            CPU.
        tensors: The tensors by name; without values until they are written.
    """

    def __init__(self, head: Tensor, tensors: Mapping[str, tuple[int, Tensor]]) -> None:
        """``tensors``: by name, with the offset of each in the file, ascending; they follow ``head`` without gaps."""
        self.head = head
        self.tensors = {name: tensor for name, (_, tensor) in tensors.items()}
        filled = [(begin, tensor) for begin, tensor in tensors.values() if tensor.numel()]
        self._begins = [0, *(begin for begin, _ in filled)]
        self._memory = [head, *(tensor.view(-1).view(torch.uint8) for _, tensor in filled)]

    def slices(self, wanted: range) -> Iterator[Tensor]:
        """Yields the memory of a range of the file's bytes, in order. Shapes: uint8 [bytes of a slice] each."""
        for number in range(max(0, bisect_right(self._begins, wanted.start) - 1), len(self._begins)):
            begin, memory = self._begins[number], self._memory[number]
            if begin >= wanted.stop:
                return
            part = memory[max(0, wanted.start - begin) : max(0, wanted.stop - begin)]
            if part.numel():
                yield part

    def write(self, begin: int, data: bytes | memoryview) -> None:
        """Writes bytes of the file from ``begin`` on."""
        for start in range(0, len(data), _PIECE_BYTES):
            piece = torch.frombuffer(bytearray(data[start : start + _PIECE_BYTES]), dtype=torch.uint8)
            place = range(begin + start, begin + start + piece.numel())
            slices = list(self.slices(place))
            for target, values in zip(slices, piece.split([target.numel() for target in slices])):
                target.copy_(values)

    def take(self) -> dict[str, Tensor]:
        """Returns the tensors, and keeps none of them."""
        tensors, self.tensors = self.tensors, {}
        del self._begins[1:], self._memory[1:]
        return tensors

    def text(self) -> bytes:
        """Returns the bytes of a file without tensors."""
        return bytes(memory_of(self.head))


def file_of(name: str, data: bytes) -> FileContent:
    """Returns the content of a whole file, on the CPU.

    Raises:
        HeaderError: It is named as a safetensors file, and is none.
    """
    head = data[: header_size(data)] if has_header(name) else b""
    content = open_file(name, len(data), head)
    content.write(0, data)
    return content


def open_file(name: str, size: int, head: bytes, place: Place = on_cpu) -> FileContent:
    """Allocates the content of a file.

    Args:
        name: The file's name.
        size: The bytes of the file.
        head: The first ``header_size`` bytes of a safetensors file.
        place: The device of each tensor.

    Raises:
        HeaderError: The header is not one of a safetensors file of this size.
    """
    if not has_header(name):
        return FileContent(torch.empty(size, dtype=torch.uint8), {})
    if not header_size(head) == len(head) <= _LENGTH_BYTES + _MAX_HEADER_BYTES:
        raise HeaderError("the file ends before its header, or that is too large")
    entries = _entries(head[_LENGTH_BYTES:], size - len(head))
    return FileContent(
        torch.empty(len(head), dtype=torch.uint8),
        {
            tensor: (len(head) + begin, torch.empty(shape, dtype=dtype, device=place(tensor, shape)))
            for tensor, (dtype, shape, begin) in entries.items()
        },
    )


def has_header(name: str) -> bool:
    """Returns whether a file of this name is a safetensors file."""
    return name.endswith(_SUFFIX)


def header_size(start: bytes) -> int:
    """Returns how many bytes of a safetensors file its header takes, as far as its first bytes tell.

    Args:
        start: The first bytes of the file; with fewer than 8, the result is 8. A header that is too large counts as a
            byte larger than one may be.
    """
    if len(start) < _LENGTH_BYTES:
        return _LENGTH_BYTES
    return _LENGTH_BYTES + min(int.from_bytes(start[:_LENGTH_BYTES], "little"), _MAX_HEADER_BYTES + 1)


def memory_of(buffer: Tensor) -> memoryview:
    """Returns a writable view of a tensor's memory. Shapes: buffer uint8 [bytes], on the CPU."""
    return memoryview(cast(Any, buffer.numpy()))


_Entry = tuple[torch.dtype, tuple[int, ...], int]


def _entries(header: bytes, size: int) -> dict[str, _Entry]:
    """Returns type, shape and offset of each tensor, by ascending offset.

    Args:
        header: The JSON text of a header.
        size: The bytes of all tensors.

    Raises:
        HeaderError: The text is no header, or its tensors do not cover the bytes without gaps and overlaps.
    """
    try:
        fields = json.loads(header.decode(), object_pairs_hook=_unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is no JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise HeaderError("the header is no JSON object")
    fields.pop("__metadata__", None)
    entries = {name: _entry(name, field) for name, field in fields.items()}
    found = dict[str, _Entry]()
    covered = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != covered:
            raise HeaderError(f"tensor {name} begins at byte {begin}, and the one before ends at {covered}")
        found[name] = (dtype, shape, begin)
        covered = end
    if covered != size:
        raise HeaderError(f"the tensors have {covered} bytes, and the file has {size} for them")
    return found


def _entry(name: str, field: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {name} needs dtype, shape and data_offsets")
    shape, offsets, dtype = field["shape"], field["data_offsets"], field["dtype"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise HeaderError(f"tensor {name} has an unknown type")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f"the shape and data_offsets of tensor {name} must be whole numbers from 0")
    begin, end = offsets
    if math.prod(shape) * _TYPES[dtype].itemsize != end - begin:
        raise HeaderError(f"tensor {name} of {dtype} {shape} does not have the {end - begin} bytes of its data_offsets")
    if math.prod(max(1, length) for length in shape) >= 2**63:  # torch cannot count the steps of an empty tensor either
        raise HeaderError(f"tensor {name} is too large")
    return _TYPES[dtype], tuple(shape), begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise HeaderError("the header has a key twice")
    return fields
