"""A file of tensors is read as safetensors reads it, in any pieces, and everything else is refused."""

import json
import random
from typing import Any

import pytest
import safetensors.torch
import torch

from jobs.checkpoint.file_content import DTYPES, HeaderError, file_of, header_size, open_file

NAME = "model.safetensors"
TENSORS = {
    "wide": torch.arange(24, dtype=torch.float64).view(2, 3, 4),
    "odd": torch.arange(7, dtype=torch.uint8),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(1.5),
    "none": torch.empty(0, 3, dtype=torch.int16),
    "mask": torch.tensor([True, False, True]),
}


def a_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def holds(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and found[name].equal(tensor)
        for name, tensor in TENSORS.items()
    )


def test_what_safetensors_writes_is_read() -> None:
    data = safetensors.torch.save(TENSORS, {"format": "pt"})
    assert holds(file_of(NAME, data).take())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_read_as_safetensors_reads_it(dtype: torch.dtype) -> None:
    data = safetensors.torch.save({"a": torch.arange(24, dtype=torch.uint8).view(dtype)})
    expected, found = safetensors.torch.load(data)["a"], file_of(NAME, data).take()["a"]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.view(torch.uint8).equal(expected.view(torch.uint8))


def test_a_file_is_written_in_any_pieces_and_order() -> None:
    data = safetensors.torch.save(TENSORS)
    draws = random.Random(0)
    for _ in range(50):
        cuts = sorted({0, len(data), *draws.choices(range(len(data)), k=5)})
        pieces = list(zip(cuts, cuts[1:]))
        draws.shuffle(pieces)
        content = open_file(NAME, len(data), data[: header_size(data)])
        for begin, end in pieces:
            content.write(begin, data[begin:end])
        for begin, end in pieces:
            written = b"".join(bytes(piece.tolist()) for piece in content.slices(range(begin, end)))
            assert written == data[begin:end]
        assert holds(content.take())


def test_each_tensor_has_memory_of_its_own_at_an_aligned_place() -> None:
    """Else it would keep the others alive, and kernels may round otherwise at other places."""
    found = file_of(NAME, safetensors.torch.save(TENSORS)).take()
    for tensor in found.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % 64 == 0


def test_a_file_without_tensors_is_its_text() -> None:
    content = file_of("training.json", b'{"a": 1}')
    assert content.text() == b'{"a": 1}'
    assert content.take() == {}


def test_a_file_keeps_no_tensor_that_was_taken() -> None:
    content = file_of(NAME, safetensors.torch.save(TENSORS))
    content.take()
    assert sum(piece.numel() for piece in content.slices(range(10**6))) == content.head.numel()


BAD = {
    "nothing": b"",
    "half a length": b"\x00\x00",
    "a length beyond the file": a_file({}, length=100),
    "a length beyond memory": b"\xff" * 8 + b"{}",
    "no JSON": a_file(b"{"),
    "no UTF-8": a_file(b'{"\xff": 1}'),
    "nested": a_file(b"[" * 100_000),
    "no object": a_file([1]),
    "a name twice": a_file(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'),
    "a key twice": a_file(b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
    "no fields": a_file({"a": 3}),
    "a field less": a_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a field more": a_file({"a": {**entry(), "more": 1}}, bytes(8)),
    "an unknown type": a_file({"a": entry("F33")}, bytes(8)),
    "a type that is no text": a_file({"a": entry(["F32"])}, bytes(8)),
    "a negative length": a_file({"a": entry(shape=[-2])}, bytes(8)),
    "a fraction": a_file({"a": entry(shape=[2.0])}, bytes(8)),
    "a length that is no number": a_file({"a": entry("U8", [True], [0, 1])}, bytes(1)),
    "three offsets": a_file({"a": entry(offsets=[0, 4, 8])}, bytes(8)),
    "offsets the wrong way": a_file({"a": entry(offsets=[8, 0])}, bytes(8)),
    "another size than the shape's": a_file({"a": entry(shape=[3])}, bytes(8)),
    "too large to count": a_file({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}),
    "beyond the end": a_file({"a": entry()}, bytes(7)),
    "bytes left over": a_file({"a": entry()}, bytes(9)),
    "a gap": a_file({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "an overlap": a_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "bytes of two tensors": a_file({"a": entry(), "b": entry()}, bytes(8)),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_a_bad_header_is_refused(data: bytes) -> None:
    with pytest.raises(HeaderError) as caught:
        file_of(NAME, data)
    assert "\n" not in str(caught.value)
