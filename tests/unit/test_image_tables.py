import csv
import pickle
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import StorageError
from cluster.storage.store import MissingObject, Store
from jobs.data import BadSample, image_table
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from tests.stores import S3Server
from tests.tables import error_of, number_of, numbers_of, png

pytestmark = pytest.mark.usefixtures("own_indexes")

NAMES = ["a.png", "sub/b c.png", 'q"uote, comma.png', "é/数.png"]


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with four images, which are shades of their numbers."""
    for number, name in enumerate(NAMES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class TestWhatOthersWrite:
    def frame(self, **columns) -> pd.DataFrame:
        return pd.DataFrame({"path": NAMES, **columns})

    @pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
    @pytest.mark.parametrize(("suffix", "encoding"), [("csv", "utf-8"), ("csv", "utf-8-sig"), ("tsv", "utf-8")])
    def test_text_of_pandas(self, root, quoting, suffix, encoding):
        frame = self.frame(label=["dog", "cat, small", "dog", 'the "ü"'], note=["1", "two\nlines", "", "x"])
        sep = "," if suffix == "csv" else "\t"
        frame.to_csv(root / f"t.{suffix}", index=False, sep=sep, quoting=quoting, encoding=encoding)
        dataset = image_table(root / f"t.{suffix}")
        assert dataset.classes == ("cat, small", "dog", 'the "ü"')
        assert dataset.targets.tolist() == [1, 0, 1, 2]
        assert numbers_of(dataset) == [0, 1, 2, 3]

    def test_text_with_an_index_crlf_and_semicolons(self, root):
        self.frame(label=[0, 1, 0, 1]).to_csv(root / "t.csv", sep=";", lineterminator="\r\n")
        assert image_table(root / "t.csv", delimiter=";").targets.tolist() == [0, 1, 0, 1]
        assert error_of(image_table, root / "t.csv") == (
            f"{root}/t.csv: has no column 'path' (did you mean ';path;label'?); name one of ;path;label"
        )

    @pytest.mark.parametrize("engine", ["plain", "category"])
    def test_parquet_of_pandas(self, root, engine):
        frame = self.frame(label=["dog", "cat", "dog", "cat"], split=["train", "val", "train", "train"])
        frame = (
            frame.astype({"label": "category", "split": "category", "path": "category"}) if engine != "plain" else frame
        )
        frame.to_parquet(root / "t.parquet")
        dataset = image_table(root / "t.parquet", split="train", split_column="split")
        assert (dataset.classes, dataset.targets.tolist()) == (("cat", "dog"), [1, 1, 0])
        assert numbers_of(dataset) == [0, 2, 3]

    def test_classes_that_datasets_wrote(self, root):
        text = '{"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}'
        table = pa.table({"path": NAMES, "label": [0, 1, 1, 0]}).replace_schema_metadata({"huggingface": text})
        pq.write_table(table, root / "t.parquet")
        assert image_table(root / "t.parquet").classes == ("x", "y")


class TestLabels:
    def table(self, root: Path, cells: list[str], header: str = "path,label") -> Path:
        lines = [f'"{name.replace(chr(34), chr(34) * 2)}",{cell}' for name, cell in zip(NAMES, cells)]
        return written(root / "t.csv", "\n".join([header, *lines]))

    @pytest.mark.parametrize(
        ("cells", "options", "classes", "targets"),
        [
            (["0", "2", " 1", "007"], {}, tuple("01234567"), [0, 2, 1, 7]),
            (["0", "1", "1", "0"], {"classes": ["cat", "dog"]}, ("cat", "dog"), [0, 1, 1, 0]),
            (["1", "0", "1", "1"], {"classes": ["1", "0"]}, ("1", "0"), [0, 1, 0, 0]),
            (["A", "0", "1", "A"], {"classes": ["0", "1", "A"]}, ("0", "1", "A"), [2, 0, 1, 2]),
            (["b", "a", "B", "b"], {}, ("B", "a", "b"), [2, 1, 0, 2]),
            (["0.5", "2", "1e3", "-1"], {}, (), [[0.5], [2], [1000], [-1]]),
            (["1", "2", "3", "4"], {"label": ["label"]}, (), [[1], [2], [3], [4]]),
        ],
    )
    def test_what_cells_mean(self, root, cells, options, classes, targets):
        dataset = image_table(self.table(root, cells), **options)
        assert (dataset.classes, dataset.targets.tolist()) == (classes, targets)

    def test_several_columns_are_numbers_to_predict(self, root):
        dataset = image_table(self.table(root, ["1,2.5", "3,4", "5,6", "7,8"], "path,x,y"), label=["y", "x"])
        assert dataset.targets.tolist() == [[2.5, 1], [4, 3], [6, 5], [8, 7]]
        image_3HW, target = dataset[3]
        assert (target.dtype, target.tolist(), number_of(image_3HW)) == (torch.float32, [8, 7], 3)

    @pytest.mark.parametrize(
        ("cells", "options", "said"),
        [
            (["a", "", "b", "b"], {}, "t.csv: row 3: has no label; fill it in, or remove the row"),
            (["1", "2", " ", "3"], {}, "t.csv: row 4: has no label; fill it in, or remove the row"),
            (["1", "2", "1o", "3"], {}, "t.csv: row 4: has label '1o', but other rows have numbers; correct it, or name all labels in classes"),
            (["1", "0.5", "x", "3"], {"label": ["label"]}, "t.csv: row 4: has label 'x', but other rows have numbers; correct it, or name all labels in classes"),
            (["1", "nan", "2", "3"], {"label": ["label"]}, "t.csv: row 3: has [nan] in label, where all must be finite; correct it"),
            (["0", "1", "2", "0"], {"classes": ["a", "b"]}, "t.csv: row 4: has label 2, which is no number of the 2 classes; correct it"),
            (["a", "-", "dgo", "a"], {"classes": ["a", "-", "dog"]}, "t.csv: row 4: has label 'dgo', which is not in classes (did you mean 'dog'?); correct it, or add it there"),
            (["a", "b", "c", "d"], {"label": "lable"}, "t.csv: has no column 'lable' (did you mean 'label'?); name one of path, label"),
            (["a", "b", "c", "d,e"], {}, "t.csv: cannot be read as text with a header and ',' between cells, CSV parse error: Row #5: Expected 2 columns, got 3: \"é/数.png\",d,e; save it as UTF-8, or set delimiter"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, root, cells, options, said):
        assert error_of(image_table, self.table(root, cells), **options) == f"{root}/{said}"

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "t.csv: cannot be read as text with a header and ',' between cells, Empty CSV file; save it as UTF-8, or set delimiter"),
            (b"path,label\n", "t.csv: has no rows; write one for each image"),
            (b"path,label\n\xff.png,a\n", "t.csv: cannot be read as text with a header and ',' between cells, In CSV column #0: Row #2: CSV conversion error to string: invalid UTF8 data; save it as UTF-8, or set delimiter"),
            (b"path,label,label\na.png,1,1\n", "t.csv: has 2 columns 'label'; rename all but one"),
        ],
        ids=["empty", "header", "latin-1", "twice"],
    )  # fmt: skip
    def test_a_file_that_is_no_table(self, root, content, said):
        (root / "t.csv").write_bytes(content)
        assert error_of(image_table, root / "t.csv") == f"{root}/{said}"

    def test_what_is_wrong_in_parquet_is_said(self, root):
        rows = {"path": ["a.png", None], "number": [1, 2], "label": ["a", None]}
        pq.write_table(pa.table(rows), root / "t.parquet")
        assert error_of(image_table, root / "t.parquet") == (
            f"{root}/t.parquet: row 1: has no path; fill it in, or remove the row"
        )
        assert error_of(image_table, root / "t.parquet", path="number") == (
            f"{root}/t.parquet: column 'number' must hold text, got int64; name another one"
        )
        assert error_of(image_table, root / "gone.parquet") == f"{root}/gone.parquet: does not exist; correct the URL"
        assert (
            error_of(image_table, root / "t.xls")
            == f"table must end in .csv, .tsv or .parquet, got {root}/t.xls; rename it"
        )

    def test_a_text_that_is_not_there(self, root):
        with pytest.raises(MissingObject, match=r"holds no t\.csv"):
            image_table(root / "t.csv")


class TestPaths:
    @pytest.mark.parametrize(
        ("cell", "name"),
        [
            ("a.png", "a.png"),
            ("./a.png", "a.png"),
            ("sub/../a.png", "a.png"),
            ("sub//b.png", "sub/b.png"),
            ("{root}/a.png", "a.png"),
            ("file://{root}/sub/a.png", "sub/a.png"),
            (" a.png", " a.png"),
            ("a#b?c%20.png", "a#b?c%20.png"),
        ],
    )
    def test_below_the_root(self, root, cell, name):
        table = written(root / "t.csv", f"path,label\n{cell.format(root=root)},x\n")
        assert image_table(table).index.place(0).object == name

    @pytest.mark.parametrize(
        "cell",
        ["../a.png", "sub/../../a.png", "/etc/passwd", "s3://bucket/a.png", "file:///etc/a.png", "{root}/../a.png",
         "{root}x/a.png", ".", "{root}/"],
    )  # fmt: skip
    def test_outside_the_root_is_refused(self, root, cell):
        cell = cell.format(root=root)
        table = written(root / "t.csv", f"path,label\na.png,x\n{cell},x\n")
        assert (
            error_of(image_table, table)
            == f"{root}/t.csv: row 3: {cell} must lie below {root}; correct it, or set root"
        )

    def test_a_name_that_no_store_has_is_refused(self, root):
        table = written(root / "t.csv", 'path,label\n"a\nb.png",x\n')
        assert error_of(image_table, table) == f"{root}/t.csv: row 2: 'a\\nb.png' is no path of a file; correct it"

    def test_an_empty_path_is_refused(self, root):
        table = written(root / "t.csv", "path,label\na.png,x\n ,x\n")
        assert error_of(image_table, table) == f"{root}/t.csv: row 3: has no path; fill it in, or remove the row"

    def test_relative_to_another_root(self, root):
        (root / "tables").mkdir()
        table = written(root / "tables/t.csv", "path,label\nb c.png,x\n")
        assert numbers_of(image_table(table, root / "sub")) == [1]
        missing = image_table(table)
        with pytest.raises(BadSample) as caught:
            missing[0]
        assert str(caught.value) == f"{root}/tables/b c.png: is gone; restore it"

    def test_a_secret_in_a_root_is_refused(self, root):
        table = written(root / "t.csv", "path,label\na.png,x\n")
        with pytest.raises(StorageError, match="must not hold a password"):
            image_table(table, "s3://key:secret@bucket/images")


class TestRows:
    def test_a_row_that_is_written_twice_counts_twice(self, root):
        table = written(root / "t.csv", "path,label\na.png,x\nsub/b c.png,y\n./a.png,x\n")
        dataset = image_table(table)
        assert (numbers_of(dataset), dataset.targets.tolist()) == ([0, 1, 0], [0, 1, 0])

    def test_rows_of_one_path_that_disagree_are_refused(self, root):
        table = written(
            root / "t.csv", "path,label,split\na.png,x,train\nb.png,y,val\n./a.png,y,train\nb.png,y,train\n"
        )
        assert error_of(image_table, table) == (
            f"{root}/t.csv: row 4: has label 'y' for a.png, but 'x' in row 2; correct one of them, or remove it"
        )
        assert error_of(image_table, table, split_column="split") == (
            f"{root}/t.csv: row 5: has split 'train' for b.png, but 'val' in row 3; correct one of them, or remove it"
        )

    def test_several_measurements_of_an_image_are_samples(self, root):
        table = written(root / "t.csv", "path,label\na.png,0.5\na.png,1.5\n")
        assert image_table(table).targets.tolist() == [[0.5], [1.5]]

    def test_a_column_says_the_split(self, root):
        rows = ["a.png,b,train", "sub/b c.png,a,val", "é/数.png,c,test"]
        table = written(root / "t.csv", "\n".join(["path,label,fold", *rows]))
        train, val = (image_table(table, split=each, split_column="fold") for each in ("train", "val"))
        assert (train.classes, numbers_of(train), train.targets.tolist()) == (("a", "b", "c"), [0], [1])
        assert (val.classes, numbers_of(val), val.targets.tolist()) == (("a", "b", "c"), [1], [0])
        assert train.index.passed_over == {"fold is neither train nor val": (1, "é/数.png")}
        assert numbers_of(image_table(table, split_column="fold")) == [0, 1]
        assert error_of(image_table, table, split="val", split_column="label") == (
            f"{root}/t.csv: column 'label' must say val in a row, got 'b' in 1 rows, 'a' in 1 rows, 'c' in 1 rows; "
            "correct it, or name another column in split_column"
        )

    def test_a_path_has_its_split_whatever_is_added(self, root):
        names = [f"{number}.png" for number in range(200)]
        table = written(root / "t.csv", "\n".join(["path,label", *(f"{name},x" for name in names)]))
        splits = {each: image_table(table, split=each, val_fraction=0.25) for each in ("train", "val")}
        held = {each: [own.index.place(n).object for n in own._chosen_N] for each, own in splits.items()}
        assert sorted(held["train"] + held["val"]) == sorted(names)
        assert 30 < len(held["val"]) < 70
        use_index_files(IndexFiles())
        written(table, "\n".join(["path,label", "new.png,x", *(f"{name},x" for name in reversed(names))]))
        again = image_table(table, split="val", val_fraction=0.25)
        held_again = {again.index.place(n).object for n in again._chosen_N}
        assert held_again - {"new.png"} == set(held["val"])

    def test_a_table_that_changed_is_another_index(self, root):
        table = written(root / "t.csv", "path,label\na.png,x\nsub/b c.png,y\n")
        before = image_table(table).index
        use_index_files(IndexFiles())
        written(table, "path,label\na.png,y\nsub/b c.png,x\n")
        after = image_table(table).index
        assert before.source.id == after.source.id
        assert before.digest != after.digest

    def test_a_pickle_is_small(self, root):
        table = written(root / "t.csv", "\n".join(["path,label", *(f"{number}.png,x" for number in range(5000))]))
        assert len(pickle.dumps(image_table(table))) < 2000

    def test_only_the_table_is_read_for_the_index(self, root, monkeypatch):
        asked = []
        read = Store.read
        monkeypatch.setattr(Store, "read", lambda self, name: asked.append(name) or read(self, name))
        monkeypatch.delattr(Store, "pages")
        monkeypatch.delattr(Store, "read_ranges")
        image_table(written(root / "t.csv", "path,label\na.png,x\n"))
        assert asked == ["t.csv"]


@pytest.mark.slow
class TestS3:
    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_a_table_and_its_images_in_a_bucket(self, s3: S3Server, monkeypatch, tmp_path, suffix):
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        store = Store(f"s3://{s3.bucket}/tables {suffix}")
        for number, name in enumerate(NAMES):
            store.write(f"images/{name}", png(number))
        cells = [*NAMES[:3], f"{store.url}/images/{NAMES[3]}"]
        frame = pd.DataFrame({"path": cells, "label": ["b", "a", "b", "b"]})
        if suffix == "csv":
            frame.to_csv(tmp_path / "t.csv", index=False)
        else:
            frame.to_parquet(tmp_path / "t.parquet")
        store.write(f"t.{suffix}", (tmp_path / f"t.{suffix}").read_bytes())
        dataset = image_table(f"{store.url}/t.{suffix}", f"{store.url}/images")
        assert numbers_of(dataset) == [0, 1, 2, 3]
        assert dataset.targets.tolist() == [1, 0, 1, 1]
        store.delete([f"images/{NAMES[1]}"])
        assert [isinstance(each, BadSample) for each in dataset.fetch([0, 1])] == [False, True]
