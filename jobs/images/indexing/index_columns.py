"""The columns of an index: their names and types, and what must hold of them."""

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

OF_OBJECTS = ("name", "size", "version")
"""Those with a value for each object; the others have one for each sample."""
COLUMNS = (*OF_OBJECTS, "object", "offset", "length", "key", "draw", "label")
TEXTS = ("name", "version", "key")
"""Columns of bytes: the names of files need not be UTF-8."""
DIGITS = 32
"""Of a digest."""


def types_of(*, has_classes: bool) -> "dict[str, pa.DataType]":
    """Returns the type of the values in each column."""
    import pyarrow as pa

    types = dict.fromkeys(COLUMNS, pa.int64()) | dict.fromkeys(TEXTS, pa.large_binary())
    return types | {"draw": pa.uint64(), "label": pa.int64() if has_classes else pa.float32()}


def checked_columns(table: "pa.Table", num_classes: int) -> "dict[str, pa.Array]":
    """Returns the columns of an index, which may come from a store and be anything.

    Raises:
        ValueError: They do not fit together; ``pa.ArrowInvalid`` is one.
    """
    import pyarrow as pa

    types = types_of(has_classes=num_classes > 0)
    if table.num_rows != 1 or table.schema.types != [pa.large_list(types[name]) for name in table.schema.names]:
        raise ValueError("its table is another one")
    table.validate(full=True)
    columns = {name: table.column(name).chunk(0).values for name in COLUMNS}
    lengths = {name: len(column) for name, column in columns.items()}
    num_objects, num = lengths["name"], lengths["object"]
    if any(lengths[name] != (num_objects if name in OF_OBJECTS else num) for name in COLUMNS if name != "label"):
        raise ValueError("its columns differ in length")
    if lengths["label"] != num if num_classes else num and (lengths["label"] % num or not lengths["label"]):
        raise ValueError("its labels are too many or too few")
    if any(column.null_count for column in columns.values()):
        raise ValueError("a value is missing")
    objects, labels = columns["object"].to_numpy(), columns["label"].to_numpy()
    if num and not 0 <= objects.min() <= objects.max() < num_objects:
        raise ValueError("a sample lies in no object")
    if num and num_classes and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError("a label is no class")
    return columns


def draw(name: str) -> int:
    """Returns the first 8 bytes of the SHA-256 of a name, as a number."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8])


def digest_of(text: str, columns: Mapping[str, "pa.Array"]) -> str:
    """Returns a digest of the values; it does not depend on how a version of Arrow lays out a file."""
    sha256 = hashlib.sha256(text.encode())
    for name in COLUMNS:
        column = columns[name]
        sha256.update(f":{name}:{len(column)}:".encode())
        if name not in TEXTS:
            sha256.update(column.to_numpy())
            continue
        _, ends, content = column.buffers()
        ends_N1 = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
        sha256.update(np.diff(ends_N1).tobytes())
        if content is not None:
            sha256.update(memoryview(content)[ends_N1[0] : ends_N1[-1]])
    return sha256.hexdigest()[:DIGITS]
