import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import StorageError
from cluster.storage.store import ByteRange, Store
from jobs.components.targets import Builder
from jobs.data import BadSample, parquet_images
from jobs.images.indexed_images import IndexedImages
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from jobs.images.tables import row_groups
from jobs.images.tables.row_groups import ReadRowGroups
from jobs.spec import Target
from tests.stores import S3Server
from tests.tables import error_of, noise, number_of, numbers_of, png, shade, write_parquet

pytestmark = pytest.mark.usefixtures("own_indexes")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory):
    """Hugging Face's ``datasets``, away from the network and the home of the user."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield pytest.importorskip("datasets")


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[ByteRange]:
    """The ranges that are asked of stores, from now on."""
    asked: list[ByteRange] = []
    read = Store.read_ranges

    def read_ranges(self: Store, ranges):
        asked.extend(ranges)
        return read(self, ranges)

    monkeypatch.setattr(Store, "read_ranges", read_ranges)
    return asked


def reopened(build: Callable[[], IndexedImages]) -> IndexedImages:
    """The dataset that a process makes that knows nothing of earlier ones."""
    use_index_files(IndexFiles())
    return build()


class TestWhatDatasetsWrites:
    @pytest.fixture
    def features(self, hf):
        return hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["zebra", "ape", "Löwe"])})

    def test_a_dataset_of_it_has_its_images_labels_and_classes(self, hf, features, tmp_path):
        columns = {"image": [shade(n) for n in range(300)], "label": [n % 3 for n in range(300)]}
        hf.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
        dataset = parquet_images(tmp_path / "a.parquet")
        assert dataset.classes == ("zebra", "ape", "Löwe")
        assert numbers_of(dataset) == list(range(300))
        assert dataset.targets.tolist() == [n % 3 for n in range(300)]
        ordered = parquet_images(tmp_path / "a.parquet", classes=["Löwe", "new", "ape", "zebra"])
        assert ordered.classes == ("Löwe", "new", "ape", "zebra")
        assert ordered.targets.tolist() == [(3, 2, 0)[n % 3] for n in range(300)]
        image_3HW, label = dataset[7]
        assert (image_3HW.shape, image_3HW.dtype, label, type(label)) == ((3, 4, 6), torch.float32, 1, int)

    def test_many_row_groups_and_a_shard_for_each_part(self, hf, features, tmp_path):
        whole = hf.Dataset.from_dict({"image": [shade(n) for n in range(100)], "label": [0] * 100}, features=features)
        for number in range(3):
            part = whole.shard(3, number, contiguous=True)
            part.to_parquet(tmp_path / f"data/train-{number:05}-of-00003.parquet", batch_size=7)
        dataset = parquet_images(tmp_path / "data")
        assert numbers_of(dataset) == list(range(100))
        assert pq.read_metadata(tmp_path / "data/train-00000-of-00003.parquet").num_row_groups == 5
        assert dataset.index.num_objects == 3

    def test_names_as_text_and_lists_of_numbers(self, hf, tmp_path):
        features = hf.Features(
            {"image": hf.Image(), "kind": hf.Value("string"), "box": hf.Sequence(hf.Value("float32"))}
        )
        columns = {"image": [shade(n) for n in range(3)], "kind": ["b", "a", "b"], "box": [[0, 1], [2, 3], [4, 5.5]]}
        hf.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
        named = parquet_images(tmp_path / "a.parquet", label="kind")
        assert (named.classes, named.targets.tolist()) == (("a", "b"), [1, 0, 1])
        boxes = parquet_images(tmp_path / "a.parquet", label="box")
        assert (boxes.classes, boxes.targets.tolist()) == ((), [[0, 1], [2, 3], [4, 5.5]])
        assert boxes[2][1].tolist() == [4, 5.5]

    def test_an_image_that_is_only_a_path_is_refused_with_its_row(self, hf, features, tmp_path):
        shade(1).save(tmp_path / "x.png")
        columns = {"image": [shade(0), shade(1), str(tmp_path / "x.png")], "label": [0, 1, 2]}
        hf.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
        told = error_of(parquet_images, tmp_path / "a.parquet")
        assert told == (
            f"{tmp_path}/a.parquet#2: has no image in image.bytes; write its bytes there, or remove the row"
        )

    def test_an_unknown_label_of_a_test_set_is_refused_with_its_row(self, hf, features, tmp_path):
        columns = {"image": [shade(n) for n in range(3)], "label": [0, -1, -1]}
        hf.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
        assert error_of(parquet_images, tmp_path / "a.parquet") == (
            f"{tmp_path}/a.parquet#1: has label -1, which is no number of the 3 classes; correct it"
        )

    def test_no_label_is_refused_with_its_row(self, hf, features, tmp_path):
        columns = {"image": [shade(n) for n in range(3)], "label": [0, 1, None]}
        hf.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
        assert error_of(parquet_images, tmp_path / "a.parquet") == (
            f"{tmp_path}/a.parquet#2: has no label; fill it in, or remove the row"
        )


class TestLabels:
    def images(self, path: Path, **columns) -> Path:
        return write_parquet(path, [png(n) for n in range(len(next(iter(columns.values()))))], 2, **columns)

    @pytest.mark.parametrize(
        ("labels", "classes", "targets"),
        [
            (pa.array([0, 2, 1], pa.int8()), ("0", "1", "2"), [0, 2, 1]),
            (pa.array([0, 2, 1], pa.uint64()), ("0", "1", "2"), [0, 2, 1]),
            (pa.array([True, False, True]), ("0", "1"), [1, 0, 1]),
            (pa.array(["b", "é", "b"]), ("b", "é"), [0, 1, 0]),
            (pa.array(["b", "a", "b"], pa.large_string()), ("a", "b"), [1, 0, 1]),
            (pa.array(["b", "a", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1]),
            (pa.array([0.5, 2.0, -1.0]), (), [[0.5], [2.0], [-1.0]]),
            (pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float64(), 2)), (), [[1, 2]] * 3),
        ],
        ids=str,
    )
    def test_of_a_type(self, tmp_path, labels, classes, targets):
        dataset = parquet_images(self.images(tmp_path / "a.parquet", label=labels))
        assert dataset.classes == classes
        assert dataset.targets.tolist() == targets
        assert numbers_of(dataset) == [0, 1, 2]

    def test_several_columns_are_numbers_to_predict(self, tmp_path):
        path = self.images(tmp_path / "a.parquet", x=[1, 2, 3], y=[0.5, 1.5, 2.5])
        dataset = parquet_images(path, label=["x", "y"])
        assert dataset.targets.tolist() == [[1, 0.5], [2, 1.5], [3, 2.5]]
        assert dataset.targets.dtype == torch.float32
        assert parquet_images(path, label=["x"]).targets.tolist() == [[1], [2], [3]]

    def test_classes_give_names_their_order_and_numbers_their_names(self, tmp_path):
        path = self.images(tmp_path / "a.parquet", name=["b", "a", "b"], number=[1, 0, 1])
        named = parquet_images(path, label="name", classes=["c", "b", "a"])
        assert (named.classes, named.targets.tolist()) == (("c", "b", "a"), [1, 2, 1])
        assert parquet_images(path, label="number", classes=["cat", "dog"]).classes == ("cat", "dog")
        assert parquet_images(path, label="number", classes=3).classes == ("0", "1", "2")

    def test_a_description_names_it(self, tmp_path):
        path = self.images(tmp_path / "a.parquet", x=[1, 2], y=[3, 4])
        target = Target("jobs.data.parquet_images", {"urls": [str(path)], "label": ["x", "y"]})
        dataset = Builder().build(target, "data.train")
        assert dataset.targets.tolist() == [[1, 3], [2, 4]]

    def test_names_of_all_files_are_the_classes(self, tmp_path):
        self.images(tmp_path / "1.parquet", label=["b", "c"])
        self.images(tmp_path / "2.parquet", label=["a", "c"])
        dataset = parquet_images(tmp_path)
        assert (dataset.classes, dataset.targets.tolist()) == (("a", "b", "c"), [1, 2, 0, 2])

    @pytest.mark.parametrize(
        ("columns", "options", "said"),
        [
            ({"lable": [0, 1]}, {}, "/a.parquet: has no column 'label' (did you mean 'lable'?); name one of image, lable"),
            ({"label": ["a", "dok"]}, {"classes": ["a", "dog"]}, "/a.parquet#1: has label 'dok', which is not in classes "
             "(did you mean 'dog'?); correct it, or add it there"),
            ({"label": [0, 2]}, {"classes": ["a", "b"]}, "/a.parquet#1: has label 2, which is no number of the 2 classes; "
             "correct it"),
            ({"label": [0, 9_999_999]}, {}, "/a.parquet#1: has label 9999999, which is no number of a class; write labels "
             "as text, or name their column as a list"),
            ({"label": [1.0, float("nan")]}, {}, "/a.parquet#1: has [nan] in label, where all must be finite; correct it"),
            ({"label": [[1.0], [1.0, 2.0]]}, {}, "/a.parquet#1: has 2 numbers in label, but 1 in the first row; write as "
             "many in all"),
            ({"label": [1.0, 2.0]}, {"classes": ["a"]}, "/a.parquet: holds numbers to predict in label, not classes; leave "
             "out classes"),
            ({"label": [b"a", b"b"]}, {}, "/a.parquet: column 'label' must hold numbers or text, got binary; name another "
             "one"),
            ({"label": ["a", "b"]}, {"label": ["label"]}, "/a.parquet: column 'label' must hold numbers to predict, got "
             "string; name others"),
            ({"label": ["a", "b"]}, {"classes": ["a", "a"]}, "classes must name each class once, got 'a' twice; remove one"),
            ({"label": [0, 1]}, {"image": "label"}, "/a.parquet: column 'label' must hold the bytes of images, got int64; "
             "name another column in image"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, tmp_path, columns, options, said):
        path = self.images(tmp_path / "a.parquet", **columns)
        assert error_of(parquet_images, path, **options) == (f"{tmp_path}{said}" if said.startswith("/") else said)

    def test_files_of_unequal_schemas_are_refused(self, tmp_path):
        self.images(tmp_path / "1.parquet", label=[0, 1])
        self.images(tmp_path / "2.parquet", label=["a", "b"])
        assert error_of(parquet_images, tmp_path) == (
            f"{tmp_path}/2.parquet: column 'label' holds string, but int64 in {tmp_path}/1.parquet; write all files "
            "with one schema"
        )

    def test_files_of_other_classes_are_refused(self, tmp_path):
        for number, names in ((1, ["a"]), (2, ["b"])):
            table = pa.table({"image": [png(0)], "label": [0]})
            features = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})
            pq.write_table(table.replace_schema_metadata({"huggingface": features}), tmp_path / f"{number}.parquet")
        assert error_of(parquet_images, tmp_path) == (
            f"{tmp_path}/2.parquet: names other classes than {tmp_path}/1.parquet; write all files with one schema"
        )
        assert error_of(parquet_images, tmp_path / "1.parquet", classes=["x"]) == (
            f"{tmp_path}/1.parquet#0: has label 'a', which is not in classes; correct it, or add it there"
        )

    def test_a_file_without_statistics_is_read_and_its_missing_image_named_then(self, tmp_path):
        table = pa.table({"image": pa.array([png(0), None], pa.binary()), "label": [0, 1]})
        pq.write_table(table, tmp_path / "a.parquet", write_statistics=False)
        dataset = parquet_images(tmp_path / "a.parquet")
        assert number_of(dataset[0][0]) == 0
        with pytest.raises(BadSample) as caught:
            dataset[1]
        assert str(caught.value) == (f"{tmp_path}/a.parquet#1: has no image; write its bytes there, or remove the row")


class TestUrls:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for number, name in enumerate(["a.parquet", "b/x 1.parquet", "b/c/y.parquet", "é.PARQUET"]):
            write_parquet(tmp_path / "d" / name, [png(number)], label=[0])
        for name in ("README.md", "_metadata", ".a.parquet", "_temporary/b.parquet", ".hidden/a.parquet"):
            (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "d" / name).write_text("no Parquet file")
        return tmp_path / "d"

    @pytest.mark.parametrize(
        ("urls", "numbers"),
        [
            ("", [0, 2, 1, 3]),
            ("a.parquet", [0]),
            ("b", [2, 1]),
            ("*.parquet", [0]),
            ("*.[pP]*", [0, 3]),
            ("*/*.parquet", [1]),
            ("**/*.parquet", [0, 2, 1]),
            ("b/**/?.parquet", [2]),
            (["é.PARQUET", "a.parquet"], [3, 0]),
            (["b", "a.parquet"], [2, 1, 0]),
            ("{é.PARQUET,b/**/y.parquet}", [3, 2]),
            (["b/c/*.parquet", "b/x 1.parquet"], [2, 1]),
        ],
    )
    def test_what_they_name(self, folder, urls, numbers):
        texts = f"{folder}/{urls}" if isinstance(urls, str) else [f"{folder}/{each}" for each in urls]
        assert numbers_of(parquet_images(texts)) == numbers

    def test_what_is_passed_over_is_noted(self, folder):
        assert parquet_images(folder).index.passed_over == {
            "hidden": (2, ".a.parquet"),
            "no Parquet file": (1, "README.md"),
        }

    def test_a_folder_whose_name_ends_as_a_file(self, tmp_path):
        write_parquet(tmp_path / "all.parquet/part-0.parquet", [png(5)], label=[0])
        assert numbers_of(parquet_images(tmp_path / "all.parquet")) == [5]

    def test_a_file_without_rows_beside_others(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", [], label=pa.array([], pa.int64()))
        assert error_of(parquet_images, tmp_path) == (
            f"{tmp_path}/a.parquet: has no rows, nor has any other file; name others in urls"
        )
        write_parquet(tmp_path / "b.parquet", [png(3)], label=[0])
        assert numbers_of(parquet_images(tmp_path)) == [3]

    def test_what_they_name_not(self, folder):
        assert error_of(parquet_images, f"{folder}/x*.parquet") == (
            f"{folder}/x*.parquet: names no Parquet file; restore what is gone, or correct urls"
        )
        assert error_of(parquet_images, [f"{folder}/a.parquet", f"{folder}/*.parquet"]) == (
            f"{folder}/a.parquet: is named twice in urls; name it once"
        )
        assert error_of(parquet_images, [str(folder), "s3://bucket/a.parquet"]) == (
            f"urls must lie in one bucket, got {folder} and others; copy them to one"
        )
        assert error_of(parquet_images, []) == (
            "urls must be a URL or a list of URLs, got []; write s3://bucket/part-{000..146}.parquet"
        )
        assert (
            error_of(parquet_images, f"{folder}/**")
            == f"{folder}/**: ends in **, which names folders; write **/*.parquet"
        )
        (folder / "z.parquet").write_bytes(b"PAR1 and no more")
        assert error_of(parquet_images, folder) == f"{folder}/z.parquet: is no Parquet file; leave it out, or repair it"

    def test_a_link_to_a_folder_is_passed_over_below_others(self, folder):
        (folder / "b/back").symlink_to(folder / "b")
        assert numbers_of(parquet_images(folder)) == [0, 2, 1, 3]
        (folder.parent / "link").symlink_to(folder / "b")
        assert numbers_of(parquet_images(folder.parent / "link")) == [2, 1]

    def test_a_secret_in_a_url_is_refused(self):
        with pytest.raises(StorageError, match="must not hold a password"):
            parquet_images("s3://key:secret@bucket/a.parquet")


class TestSplits:
    def test_names_of_files_say_the_splits(self, tmp_path):
        for number, name in enumerate(["train-0-of-2", "train-1-of-2", "dev-0-of-1", "test-0-of-1"]):
            write_parquet(tmp_path / f"data/{name}.parquet", [png(number)], label=["cat" if number else "dog"])
        assert numbers_of(parquet_images(tmp_path, "train")) == [0, 1]
        val = parquet_images(tmp_path, "val")
        assert numbers_of(val) == [2]
        assert (val.classes, val[0][1]) == (("cat", "dog"), 0)
        assert val.index.passed_over == {"of the test split": (1, "data/test-0-of-1.parquet")}
        assert (
            error_of(parquet_images, tmp_path)
            == f"split must be train or val, got None; {tmp_path} holds files of both"
        )

    def test_names_of_folders_say_them_too(self, tmp_path):
        for number, name in enumerate(["train/0", "validation/0"]):
            write_parquet(tmp_path / f"{name}.parquet", [png(number)], label=[0])
        assert numbers_of(parquet_images(tmp_path, "val")) == [1]

    def test_files_of_val_alone_are_all_of_it(self, tmp_path):
        """They are no part of a larger whole, of which a fraction would be drawn."""
        for number in range(9):
            write_parquet(tmp_path / f"validation-{number}.parquet", [png(number)], label=[0])
        assert len(parquet_images(tmp_path, "val")) == len(parquet_images(tmp_path)) == 9
        assert error_of(parquet_images, tmp_path, "train") == (
            f"{tmp_path}: holds files of val alone, got split=train; name others in urls"
        )

    def test_files_of_train_and_test_alone_are_refused(self, tmp_path):
        for name in ("train-0", "test-0"):
            write_parquet(tmp_path / f"{name}.parquet", [png(0)], label=[0])
        assert error_of(parquet_images, tmp_path, "train") == (
            f"{tmp_path}: must hold files of train and val, or of one split, got test-0.parquet of test, train-0.parquet "
            "of train; name those of one split in urls, such as train-*.parquet"
        )
        assert len(parquet_images(f"{tmp_path}/train-*.parquet")) == 1

    def test_a_row_has_its_split_whatever_is_added(self, tmp_path):
        own, other = tmp_path / "own", tmp_path / "other/0.parquet"
        write_parquet(own / "a.parquet", [png(n) for n in range(200)], label=[0] * 200)
        split = {each: numbers_of(parquet_images(own, each, val_fraction=0.25)) for each in ("train", "val")}
        assert sorted(split["train"] + split["val"]) == list(range(200))
        assert 30 < len(split["val"]) < 70
        for path in (own / "0.parquet", other):
            write_parquet(path, [png(n) for n in range(1000, 1020)], label=[0] * 20)
        for urls in (own, [own / "a.parquet", other]):
            again = reopened(lambda urls=urls: parquet_images(urls, "val", val_fraction=0.25))
            assert [number for number in numbers_of(again) if number < 1000] == split["val"]
        with pytest.raises(ValueError, match="val_fraction must lie between 0 and 1, got 1.5"):
            parquet_images(own, val_fraction=1.5)


class TestReading:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        """Four row groups of 25 images of about 12 KB each."""
        images = [noise(n) for n in range(100)]
        return write_parquet(tmp_path / "a.parquet", images, 25, label=[n % 2 for n in range(100)])

    def test_indexing_reads_no_image(self, path, ranges):
        dataset = parquet_images(path)
        metadata = pq.read_metadata(path)
        chunks = [metadata.row_group(group).column(column) for group in range(4) for column in (0, 1)]
        labels = {(chunk.dictionary_page_offset, chunk.total_compressed_size) for chunk in chunks[1::2]}
        assert path.stat().st_size > 1_000_000
        assert ranges[0] == ByteRange("a.parquet", path.stat().st_size - 2**16, 2**16 + 1)
        assert {(each.offset, each.size) for each in ranges[1:]} == labels
        assert len(dataset) == 100

    def test_a_long_footer_takes_a_second_request(self, tmp_path, ranges):
        path = write_parquet(tmp_path / "a.parquet", [noise(n, 8) for n in range(800)], 1, label=[0] * 800)
        dataset = parquet_images(path)
        size = path.stat().st_size
        assert ranges[1].offset + (ranges[1].size or 0) == size
        assert (ranges[1].size or 0) > 2**16
        assert dataset.fetch([799, 0]) == [noise(799, 8), noise(0, 8)]

    def test_a_row_group_is_read_once_for_all_its_samples(self, path, ranges):
        dataset = parquet_images(path)
        ranges.clear()
        order = [int(n) for n in np.random.default_rng(0).permutation(100)]
        assert dataset.fetch(order) == [noise(n) for n in order]
        assert len(ranges) == 1 + 4  # the footer, and the images of each group
        assert [dataset.fetch([n]) for n in order] == [[noise(n)] for n in order]
        assert len(ranges) == 5
        metadata = pq.read_metadata(path)
        images = sum(metadata.row_group(group).column(0).total_compressed_size for group in range(4))
        assert sum(each.size or 0 for each in ranges[1:]) == images

    def test_one_field_of_a_struct_is_read(self, tmp_path, ranges):
        images = [{"bytes": noise(n), "path": "x" * 1000 + str(n)} for n in range(10)]
        pq.write_table(pa.table({"image": images, "label": [0] * 10}), tmp_path / "a.parquet")
        dataset = parquet_images(tmp_path / "a.parquet")
        ranges.clear()
        assert dataset.fetch([3]) == [noise(3)]
        assert ranges[1].size == pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).total_compressed_size

    def test_row_groups_used_last_are_kept_up_to_a_number_of_bytes(self, path, ranges):
        index = parquet_images(path).index
        read = ReadRowGroups("image", kept_bytes=700_000)  # two groups
        ranges.clear()
        for number, requests in [(0, 2), (25, 3), (1, 3), (50, 4), (2, 4), (26, 5), (3, 5), (51, 6)]:
            assert read(index, [number]) == [noise(number)]
            assert len(ranges) == requests
        assert read(index, [99, 0, 51]) == [noise(99), noise(0), noise(51)]

    def test_a_group_larger_than_that_is_kept_alone(self, path, ranges):
        index = parquet_images(path).index
        read = ReadRowGroups("image", kept_bytes=1)
        ranges.clear()
        assert [read(index, [n]) for n in (0, 1, 2, 25)] == [[noise(0)], [noise(1)], [noise(2)], [noise(25)]]
        assert len(ranges) == 3

    @pytest.mark.parametrize("name", ["read_row_group", "read_metadata"])
    def test_a_lack_of_memory_names_the_file_and_does_not_make_it_bad(self, path, name, monkeypatch):
        dataset = parquet_images(path)

        def fail(*_, **__):
            raise pa.ArrowMemoryError("malloc of size 64 failed")

        monkeypatch.setattr(pq.ParquetFile if name == "read_row_group" else pq, name, fail)
        with pytest.raises(MemoryError, match=rf"^{path.name}: too little memory to decode it; give"):
            dataset.fetch([0])

    def test_many_groups_are_read_in_portions(self, path, monkeypatch):
        monkeypatch.setattr(row_groups, "ROW_GROUPS_AT_ONCE", 700_000)
        portions = []
        read = Store.read_ranges
        monkeypatch.setattr(Store, "read_ranges", lambda self, own: portions.append(len(own)) or read(self, own))
        dataset = parquet_images(path)
        portions.clear()
        assert dataset.fetch(range(0, 100, 20)) == [noise(n) for n in range(0, 100, 20)]
        assert list(filter(None, portions)) == [1, 2, 2]

    def test_a_pickle_is_small_and_reads_the_same(self, path):
        dataset = parquet_images(path)
        dataset.fetch(range(100))
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 2000
        assert pickle.loads(pickled).fetch([77]) == [noise(77)]  # noqa: S301 - it was made here

    def test_a_forked_process_reads_the_same(self, path):
        dataset = parquet_images(path)
        assert dataset.fetch([1]) == [noise(1)]
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(into, b"yes" if dataset.fetch([2, 99]) == [noise(2), noise(99)] else b"no")
            os._exit(0)
        assert os.read(out, 10) == b"yes"
        assert os.waitpid(child, 0)[1] == 0
        os.close(out)
        os.close(into)

    def test_a_loader_with_processes_reads_the_same(self, path):
        dataset = parquet_images(path)
        loader = torch.utils.data.DataLoader(dataset, batch_size=10, num_workers=2, multiprocessing_context="fork")
        images_NCHW = torch.cat([images for images, _ in loader])
        assert torch.equal(images_NCHW[42], dataset[42][0])
        assert len(images_NCHW) == 100


class TestFilesThatChange:
    @pytest.fixture
    def dataset(self, tmp_path) -> IndexedImages:
        for name in ("a", "b"):
            write_parquet(tmp_path / f"{name}.parquet", [noise(n) for n in range(10)], 5, label=[0] * 10)
        return parquet_images(tmp_path)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda path: path.unlink(), "its file is gone; restore it"),
            (lambda path: path.write_bytes(path.read_bytes() * 2), "its file is longer than when it was listed; restore it"),
            (lambda path: os.truncate(path, 100_000), "its file is shorter than when it was listed; restore it"),
            (lambda path: os.truncate(path, 10), "its file is shorter than when it was listed; restore it"),
            (lambda path: path.write_bytes(bytes(path.stat().st_size)), "its file is no Parquet file; leave it out, or "
             "repair it"),
        ],
        ids=["gone", "longer", "shorter", "much shorter", "zeros"],
    )  # fmt: skip
    def test_its_samples_are_bad_and_others_are_not(self, dataset, tmp_path, change, said):
        change(tmp_path / "b.parquet")
        found = dataset.fetch([17, 3, 11])
        assert found[1] == noise(3)
        assert [str(each) for each in (found[0], found[2])] == [f"{tmp_path}/b.parquet#{row}: {said}" for row in (7, 1)]
        assert isinstance(found[0], BadSample)

    def test_damaged_images_of_a_group_are_bad(self, dataset, tmp_path):
        path = tmp_path / "a.parquet"
        content = bytearray(path.read_bytes())
        content[4:60] = bytes(range(100, 156))
        path.write_bytes(content)
        found = dataset.fetch([0, 5])
        assert str(found[0]).startswith(f"{path}#0: its row group cannot be read, ")
        assert found[1] == noise(5)

    def test_a_file_that_goes_while_its_footer_is_known(self, dataset, tmp_path):
        assert dataset.fetch([0]) == [noise(0)]
        (tmp_path / "a.parquet").unlink()
        assert dataset.fetch([1]) == [noise(1)]  # its group is in memory
        assert [str(each) for each in dataset.fetch([5])] == [f"{tmp_path}/a.parquet#5: its file is gone; restore it"]

    def test_fewer_rows_in_a_file_of_the_same_size(self, tmp_path):
        small = write_parquet(tmp_path / "s.parquet", [noise(0)], label=[0])
        dataset = parquet_images(small)
        index = dataset.index
        place = index.place(0)
        assert (place.object, place.offset, place.length, place.key) == ("s.parquet", 0, 0, "0")
        wrong = type("Index", (), {
            "digest": "other", "source": index.source,
            "place": lambda _, n: type(place)("s.parquet", place.size, *[(1, 0), (0, 1)][n], "9"),
        })()  # fmt: skip
        assert [str(each).partition(": ")[2] for each in ReadRowGroups("image")(wrong, [0, 1])] == [
            "its file has fewer row groups than when it was listed; restore it",
            "its row group has fewer rows than when it was listed; restore the file",
        ]


@pytest.mark.slow
class TestS3:
    @pytest.fixture
    def url(self, s3: S3Server, monkeypatch) -> str:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        return f"s3://{s3.bucket}/parquet images"

    def test_files_of_a_bucket(self, url, tmp_path, ranges):
        for number in range(5):
            images = [noise(100 * number + n) for n in range(10)]
            path = write_parquet(tmp_path / "a.parquet", images, 4, label=[str(number)] * 10)
            Store(url).write(f"d/é {number}.parquet", path.read_bytes())
        dataset = parquet_images(f"{url}/d/*.parquet")
        assert len(ranges) == 5 + 5 * 3
        assert dataset.targets.bincount().tolist() == [10] * 5
        order = np.random.default_rng(0).permutation(50).tolist()
        assert dataset.fetch(order) == [noise(100 * (n // 10) + n % 10) for n in order]
        assert dataset.index.url_of(12) == f"{url}/d/é 1.parquet#2"
        assert all(version for version in dataset.index.objects["version"].to_pylist())

    @pytest.mark.parametrize("size", [10, 100_000])
    def test_a_file_that_became_shorter_is_a_bad_sample(self, url, tmp_path, size):
        path = write_parquet(tmp_path / "a.parquet", [noise(n) for n in range(20)], label=[0] * 20)
        store = Store(f"{url}/{size}")
        store.write("a.parquet", path.read_bytes())
        dataset = parquet_images(store.url)
        store.write("a.parquet", path.read_bytes()[:size])
        assert [str(each) for each in dataset.fetch([4])] == [
            f"{store.url}/a.parquet#4: its file is shorter than when it was listed; restore it"
        ]
        store.delete(["a.parquet"])
        assert [str(each) for each in dataset.fetch([4])] == [f"{store.url}/a.parquet#4: its file is gone; restore it"]
