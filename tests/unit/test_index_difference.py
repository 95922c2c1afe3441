"""What has changed in the data of a run, named."""

import random
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.images.indexing.index import Index, IndexBuilder, Source
from jobs.images.indexing.index_difference import index_difference

Sample = tuple[str, int, str, str]
"""The name of an object, its size and version, and the class of its only sample."""
CLASSES = ("cat", "dog")
FOUR: list[Sample] = [
    ("cat/1.jpg", 10, "a", "cat"), ("cat/2.jpg", 20, "b", "cat"), ("dog/1.jpg", 30, "c", "dog"),
    ("dog/2.jpg", 40, "d", "dog"),
]  # fmt: skip
numbers = count()


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make_index(samples: Sequence[Sample], classes: Sequence[str] = CLASSES) -> Index:
        builder = IndexBuilder(Source("test", "s3://bucket/data"))
        builder.classes = classes
        names, sizes, versions, labels = zip(*samples) if samples else ([], [], [], [])
        builder.add_files(names, sizes, versions, [classes.index(label) for label in labels])
        return builder.write(tmp_path / f"{next(numbers)}")

    return make_index


@pytest.mark.parametrize(
    ("changed", "classes", "text"),
    [
        ([*FOUR, ("dog/3.jpg", 5, "e", "dog")], CLASSES, "1 sample added: dog/3.jpg"),
        (FOUR[1:], CLASSES, "1 sample removed: cat/1.jpg"),
        ([], CLASSES, "4 samples removed: cat/1.jpg, cat/2.jpg, dog/1.jpg, ..."),
        ([("cat/1.jpg", 11, "a", "cat"), *FOUR[1:]], CLASSES, "1 sample changed: cat/1.jpg"),
        ([("cat/1.jpg", 10, "z", "cat"), *FOUR[1:]], CLASSES, "1 sample changed: cat/1.jpg"),
        ([("cat/1.jpg", 10, "a", "dog"), *FOUR[1:]], CLASSES, "1 sample changed: cat/1.jpg"),
        (
            [("cat/0.jpg", 1, "n", "cat"), *FOUR[2:], ("cat/2.jpg", 2, "b", "cat")], CLASSES,
            "1 sample added: cat/0.jpg; 1 sample removed: cat/1.jpg; 1 sample changed: cat/2.jpg",
        ),
        (FOUR, ("ape", "cat", "dog"), "classes added: ape"),
        (FOUR[:2], ("cat",), "2 samples removed: dog/1.jpg, dog/2.jpg; classes removed: dog"),
        ([FOUR[2], FOUR[0], FOUR[1], FOUR[3]], CLASSES, "its samples, classes or splits are in another order"),
        (FOUR, ("dog", "cat"), "its samples, classes or splits are in another order"),
        ([*FOUR, FOUR[0]], CLASSES, "1 sample added: cat/1.jpg"),
        ([*FOUR, ("dog/\udcff.jpg", 5, "e", "dog")], CLASSES, "1 sample added: dog/\\udcff.jpg"),
    ],
)  # fmt: skip
def test_what_is_named(make: Any, changed: list[Sample], classes: Sequence[str], text: str) -> None:
    assert index_difference(make(FOUR), make(changed, classes)) == text


def test_what_is_passed_over_is_no_difference(tmp_path: Path) -> None:
    indexes = []
    for name in ("old", "new"):
        builder = IndexBuilder(Source("test", "s3://bucket/data"))
        builder.classes = CLASSES
        builder.add_files(["a", "b"], [1, 2], ["", ""], [0, 1])
        builder.pass_over("hidden file", name)
        indexes.append(builder.write(tmp_path / name))
    assert indexes[0].digest != indexes[1].digest
    assert index_difference(*indexes) == ""


def container(path: Path, places: Mapping[str, tuple[int, int]], version: str = "a") -> Index:
    """A shard with two samples for each key, of which a table has two lines."""
    builder = IndexBuilder(Source("tar", "s3://bucket/shards"))
    builder.classes = CLASSES
    keys = [key for key in places for _ in range(2)]
    offsets, lengths = zip(*(places[key] for key in keys))
    builder.add_container(
        "0.tar", 100, version, offsets=offsets, lengths=lengths, labels=[number % 2 for number in range(len(keys))],
        keys=keys,
    )  # fmt: skip
    return builder.write(path)


def test_samples_in_containers_that_are_there_twice(tmp_path: Path) -> None:
    old = container(tmp_path / "old", {"a": (0, 10), "b": (10, 10)})
    moved = container(tmp_path / "moved", {"a": (0, 10), "b": (20, 10)})
    assert index_difference(old, moved) == "2 samples changed: 0.tar#b, 0.tar#b"
    again = container(tmp_path / "again", {"a": (0, 10), "b": (10, 10)}, version="b")
    assert index_difference(old, again) == "4 samples changed: 0.tar#a, 0.tar#a, 0.tar#b, ..."


def test_a_container_in_another_folder_is_another_one(tmp_path: Path) -> None:
    """Its samples are drawn alike for a split."""

    def shards(*folders: str) -> Index:
        builder = IndexBuilder(Source("tar", "s3://bucket/shards"))
        builder.classes = CLASSES
        for folder in folders:
            builder.add_container(f"{folder}/0.tar", 1024, "", offsets=[512], lengths=[10], labels=[0], keys=["x"])
        return builder.write(tmp_path / "-".join(folders))

    old = shards("a", "b")
    assert index_difference(old, shards("c", "b")) == "1 sample added: c/0.tar#x; 1 sample removed: a/0.tar#x"
    assert index_difference(old, shards("0", "a", "b")) == "1 sample added: 0/0.tar#x"


def test_numbers_to_predict(tmp_path: Path) -> None:
    def make(name: str, targets: list[list[float]]) -> Index:
        builder = IndexBuilder(Source("table", "s3://bucket/data"))
        builder.add_files(["a", "b", "c"], [1, 2, 3], [""] * 3, np.array(targets))
        return builder.write(tmp_path / name)

    old = make("old", [[1, 2], [3, float("nan")], [5, 6]])
    assert index_difference(old, make("one", [[1, 2], [3, float("nan")], [5, 7]])) == "1 sample changed: c"
    assert index_difference(old, make("more", [[1], [3], [5]])) == "3 samples changed: a, b, c"


def test_it_counts_as_sets_of_names_do(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.images.indexing.index_difference._BLOCK", 100)
    draw = random.Random(0)
    old = {f"{number}.jpg": draw.randrange(3) for number in draw.sample(range(2_000), 1_000)}
    new = {f"{number}.jpg": draw.randrange(3) for number in draw.sample(range(2_000), 1_000)}
    changed = sum(old[name] != new[name] for name in old.keys() & new.keys())
    indexes = [make([(name, size, "", "cat") for name, size in files.items()]) for files in (old, new)]
    parts = index_difference(*indexes).split("; ")
    assert [part.partition(":")[0] for part in parts] == [
        f"{len(new.keys() - old.keys()):,} samples added", f"{len(old.keys() - new.keys()):,} samples removed",
        f"{changed:,} samples changed",
    ]  # fmt: skip
    assert parts[0].partition(": ")[2] == ", ".join([name for name in new if name not in old][:3]) + ", ..."
