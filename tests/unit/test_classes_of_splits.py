"""A class must have one number in ``data.train`` and ``data.val``; what to do if it has two depends on the formats."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from cluster.errors import DescriptionError
from jobs.data import image_folder, image_table, parquet_images, tar_shards
from jobs.images.indexed_images import IndexedImages
from jobs.images.splits import check_same_classes
from tests.tables import png, write_parquet

pytestmark = pytest.mark.usefixtures("own_indexes")


def folder(place: Path, labels: Sequence[str], **options) -> IndexedImages:
    for label in labels:
        (place / label).mkdir(parents=True, exist_ok=True)
        (place / label / "a.png").write_bytes(png(0))
    return image_folder(place, **options)


def table(place: Path, labels: Sequence[str], **options) -> IndexedImages:
    place.mkdir(exist_ok=True)
    (place / "a.csv").write_text("\n".join(["path,label", *[f"a.png,{labels[0]}", f"b.png,{labels[1]}"]]))
    return image_table(place / "a.csv", **options)


def parquet(place: Path, labels: Sequence[str], **options) -> IndexedImages:
    return parquet_images(write_parquet(place / "a.parquet", [png(0), png(1)], label=labels), **options)


def named_in_its_schema(place: Path, labels: Sequence[str], **options) -> IndexedImages:
    place.mkdir(exist_ok=True)
    features = {"label": {"names": labels, "_type": "ClassLabel"}}
    rows = pa.table({"image": [png(0), png(1)], "label": [0, 1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(rows.replace_schema_metadata(metadata), place / "a.parquet")
    return parquet_images(place / "a.parquet", **options)


def shard(place: Path, labels: Sequence[str], **options) -> IndexedImages:
    place.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(place / "a.tar")) as writer:
        for number, label in enumerate(labels):
            writer.write({"__key__": str(number), "png": png(number), "json": {"kind": label}})
    return tar_shards(str(place), label="kind", **options)


Make = Callable[..., IndexedImages]
WITH_CLASSES = [table, parquet, named_in_its_schema, shard]


def refused(train: IndexedImages, val: IndexedImages) -> str:
    with pytest.raises(DescriptionError) as caught:
        check_same_classes(train, val)
    return str(caught.value)


@pytest.mark.parametrize("make", WITH_CLASSES)
def test_formats_with_classes_are_given_them(tmp_path: Path, make: Make) -> None:
    """A label would mean one class in training, and another one in a validation."""
    labels = {"train": ["cat", "dog"], "val": ["dog", "emu"]}

    def made(**options) -> list[IndexedImages]:
        return [make(tmp_path / split, own, **options) for split, own in labels.items()]

    assert refused(*made()) == (
        "data.val: class 0 is 'dog', but 'cat' in data.train; write the same classes in both: classes: [...]"
    )
    train, val = made(classes=["cat", "dog", "emu"])
    check_same_classes(train, val)
    assert (train.targets.tolist(), val.targets.tolist()) == ([0, 1], [1, 2])


def test_classes_that_are_numbers_are_given_their_number(tmp_path: Path) -> None:
    train, val = (table(tmp_path / split, own) for split, own in (("train", "01"), ("val", "02")))
    assert refused(train, val) == (
        "data.val: class 2 is '2', but none in data.train; write their number in both: classes: 3"
    )
    check_same_classes(val, train)
    check_same_classes(table(tmp_path / "train", "01", classes=3), table(tmp_path / "val", "02", classes=3))


def test_class_folders_of_two_roots_come_into_one(tmp_path: Path) -> None:
    train, val = folder(tmp_path / "train", ["ant", "cat", "dog"]), folder(tmp_path / "val", ["ant", "dog"])
    assert refused(train, val) == (
        "data.val: class 1 is 'dog', but 'cat' in data.train; give both one root that holds these folders as train/ "
        "and val/, with split: train and split: val, or name what is no class in exclude"
    )
    check_same_classes(image_folder(tmp_path, "train"), image_folder(tmp_path, "val"))
    check_same_classes(image_folder(tmp_path / "train", exclude=["cat"]), val)


@pytest.mark.parametrize("make", WITH_CLASSES)
def test_beside_folders_the_other_format_is_given_their_names(tmp_path: Path, make: Make) -> None:
    folders, other = folder(tmp_path / "folders", ["cat", "dog"]), make(tmp_path / "other", ["cat", "emu"])
    assert refused(folders, other).endswith("; write the names of the folders in data.val: classes: [...]")
    assert refused(other, folders).endswith("; write the names of the folders in data.train: classes: [...]")
    check_same_classes(make(tmp_path / "other", ["cat", "emu"], classes=["cat", "dog", "emu"]), folders)


def test_the_same_are_accepted_also_without_the_last(tmp_path: Path) -> None:
    classes = ["cat", "dog", "emu"]
    train = table(tmp_path / "train", ["cat", "dog"], classes=classes)
    check_same_classes(train, table(tmp_path / "val", ["cat", "dog"]))
    check_same_classes(train, None)
