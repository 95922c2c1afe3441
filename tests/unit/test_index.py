"""The file of an index: what it gives back, and that nothing in it is trusted."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.images.indexing.index import Index, IndexBuilder, Source


def made(path: Path, *, targets: int = 0) -> Index:
    builder = IndexBuilder(Source("test", "s3://bucket/data", {"key": [1]}))
    builder.classes = () if targets else ("cat", "dog")
    labels = np.ones((2, targets)) if targets else [0, 1]
    builder.add_files(["cat/1 %#.jpg", "dog/\udc80.jpg"], [11, -1], ["", '"etag"'], labels)
    builder.add_container(
        "shard.tar", 4096, "v", offsets=[512, 2048], lengths=[10, 20], labels=labels, keys=["one", "two"]
    )
    builder.pass_over("hidden file", ".x")
    builder.pass_over("hidden file", ".a")
    assert builder.num_samples == 4
    return builder.write(path)


def test_it_gives_back_what_was_added(tmp_path: Path) -> None:
    made(tmp_path / "index")
    index = pickle.loads(pickle.dumps(Index(tmp_path / "index")))  # noqa: S301  # as loader processes get it

    assert (len(index), index.num_objects, index.classes) == (4, 3, ("cat", "dog"))
    assert index.labels.tolist() == [0, 1, 0, 1]
    assert [str(index.place(number)) for number in range(4)] == [
        "cat/1 %#.jpg", "dog/\udc80.jpg", "shard.tar#one", "shard.tar#two",
    ]  # fmt: skip
    place = index.place(3)
    assert (place.object, place.size, place.offset, place.length, place.key) == ("shard.tar", 4096, 2048, 20, "two")
    assert (index.place(0).size, index.place(0).length, index.place(1).size) == (11, -1, -1)
    assert index.passed_over == {"hidden file": (2, ".a")}
    assert index.source == Source("test", "s3://bucket/data", {"key": [1]})
    assert index.check()


def test_numbers_to_predict_keep_their_shape(tmp_path: Path) -> None:
    index = made(tmp_path / "index", targets=3)
    assert (index.labels.shape, index.labels.dtype) == ((4, 3), np.float32)


def test_the_digest_is_of_all_that_is_in_it(tmp_path: Path) -> None:
    first, again = made(tmp_path / "first"), made(tmp_path / "again")
    builder = IndexBuilder(first.source)
    builder.classes = first.classes
    builder.add_files(["cat/1 %#.jpg"], [11], [""], [0])

    assert first.digest == again.digest
    assert builder.write(tmp_path / "other").digest != first.digest


def changed(table: pa.Table, name: str, values: Any, kind: Any = None) -> pa.Table:
    """The table with other values in a column, in its one row."""
    number = table.schema.get_field_index(name)
    column = pa.array([values], pa.large_list(kind) if kind else table.schema.field(name).type)
    return table.set_column(number, name, column)


def described(table: pa.Table, **others: Any) -> pa.Table:
    metadata = dict(table.schema.metadata)
    metadata[b"index"] = json.dumps({**json.loads(metadata[b"index"]), **others}).encode()
    return table.replace_schema_metadata(metadata)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda table: table.replace_schema_metadata({}), "b'index'"),
        (lambda table: described(table, version=99), "version 99, not 2"),
        (lambda table: described(table, classes=["cat"]), "a label is no class"),
        (lambda table: described(table, classes=[]), "its table is another one"),
        (lambda table: described(table, passed_over=[1]), "'list' object has no attribute"),
        (lambda table: table.drop_columns(["draw"]), "draw"),
        (lambda table: table.slice(0, 0), "its table is another one"),
        (lambda table: changed(table, "offset", [1, 2, 3, 4], pa.int32()), "its table is another one"),
        (lambda table: changed(table, "object", [0, 1, 2, 3]), "a sample lies in no object"),
        (lambda table: changed(table, "object", [0, 1, -1, 2]), "a sample lies in no object"),
        (lambda table: changed(table, "object", [0, 1, 2, None]), "a value is missing"),
        (lambda table: changed(table, "size", [1, 2]), "its columns differ in length"),
        (lambda table: changed(table, "label", [0, 1, 0]), "its labels are too many or too few"),
        (lambda table: changed(table, "label", [0, 1, 0, 2]), "a label is no class"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    tmp_path: Path, spoil: Callable[[pa.Table], pa.Table], what: str
) -> None:
    """It may come from a store that others can write to."""
    path = made(tmp_path / "index").path
    table = spoil(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
    with pa.OSFile(str(tmp_path / "spoilt"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)

    with pytest.raises(FileNotFoundError):
        Index(tmp_path / "missing")
    with pytest.raises(ValueError, match=f"spoilt: is no index of data: .*{what}.*; remove it$"):
        Index(tmp_path / "spoilt")


def test_damaged_bytes_end_no_process(tmp_path: Path) -> None:
    """Lengths and offsets in it lead nowhere else: opening it, or checking its digest, says that it is damaged."""
    content = made(tmp_path / "index").path.read_bytes()
    random = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), 3):
            damaged[at] = random.integers(0, 256)
        path = tmp_path / f"damaged-{number}"
        path.write_bytes(damaged)
        try:
            index = Index(path)
        except ValueError:
            continue
        if index.check():
            assert [str(index.place(each)) for each in range(len(index))]


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    for number, content in enumerate([b"", b"ARROW1", b"ARROW1\0\0" + bytes(1000) + b"ARROW1"]):
        path = tmp_path / str(number)
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no index of data"):
            Index(path)
