"""What people who wait for an index are told, of each format."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage.store import Store
from cluster.storage.stored_objects import ListedPage, StoredObject
from jobs.data import image_folder, image_table, parquet_images, tar_shards
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from jobs.images.indexing.listing_progress import ListingProgress
from jobs.images.tables import parquet_columns
from jobs.images.tar import tar_members
from tests.image_stores import GeneratedFileSystem
from tests.images import make_image_folder
from tests.shards import write_shards

fsspec.register_implementation("generated", GeneratedFileSystem)

URL = "s3://bucket/data"


class TestLines:
    @pytest.fixture
    def told(self) -> list[str]:
        return []

    @pytest.fixture
    def progress(self, told: list[str]) -> ListingProgress:
        self.now = 100.0
        return ListingProgress(URL, told.append, clock=lambda: self.now)

    def test_without_a_total_they_have_the_count_and_the_rate(self, progress, told):
        for _ in range(29):
            self.now += 1
            progress.listed(1_000)
        assert told == [f"listing {URL}: 10,000 samples, 1,000/s", f"listing {URL}: 20,000 samples, 1,000/s"]

    def test_with_a_total_they_have_the_time_left(self, progress, told):
        progress.expect(1_000, "folders")
        for _ in range(20):
            self.now += 1
            progress.listed(500, 5)
        assert told == [
            f"listing {URL}: 5,000 samples, 500/s, 50 of 1,000 folders, ETA 0:03:10",
            f"listing {URL}: 10,000 samples, 500/s, 100 of 1,000 folders, ETA 0:03:00",
        ]

    def test_a_total_may_grow(self, progress, told):
        progress.expect(2, "folders")
        self.now += 10
        progress.listed(0, 1)
        progress.expect(7, "folders")
        self.now += 10
        progress.listed(0, 1)
        assert [line.partition("/s, ")[2] for line in told] == [
            "1 of 2 folders, ETA 0:00:10",
            "2 of 9 folders, ETA 0:01:10",
        ]

    def test_nothing_done_leaves_the_time_open(self, progress, told):
        progress.expect(3, "files")
        self.now += 10
        progress.listed(70)
        assert told == [f"listing {URL}: 70 samples, 7/s, 0 of 3 files"]

    def test_when_all_is_done_no_time_is_left(self, progress, told):
        progress.expect(3, "files")
        self.now += 10
        progress.listed(70, 3)
        assert told == [f"listing {URL}: 70 samples, 7/s"]

    def test_the_end_is_told_of_what_was_told_before(self, progress, told):
        self.now += 9
        progress.listed(70)
        progress.end()
        assert told == []
        self.now += 9
        progress.listed(70)
        self.now += 75
        progress.end()
        assert told[1:] == [f"listed {URL}: 140 samples, 0:01:33"]


@pytest.fixture
def told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], list[str]]]:
    """Opens a dataset, and returns what is told in the meantime; ten seconds pass each time that anything looks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def open_it(dataset: Callable[[], Any]) -> list[str]:
        told, seconds = list[str](), itertools.count(0.0, 10.0)
        use_index_files(IndexFiles(tell=told.append, clock=lambda: next(seconds)))
        num_samples = len(dataset().index)
        assert re.fullmatch(rf"listed \S+: {num_samples:,} samples, \S+", told[-1])
        assert all(re.match(r"listing \S+: [\d,]+ samples, [\d,]+/s", line) for line in told[:-1])
        return told[:-1]

    yield open_it
    use_index_files(IndexFiles())


def done(lines: list[str]) -> list[str]:
    """What is done, of those lines that know a total, and the time left, without repetitions."""
    found = (re.search(r"/s, (.*?)(?:, ETA \d+:\d\d:\d\d)?$", line) for line in lines)
    return list(dict.fromkeys(each[1] for each in found if each))


def test_a_folder_on_this_machine(tmp_path, told_of):
    root = make_image_folder(tmp_path / "root", num_classes=3, per_class=4, size=8)
    (root / "class_001" / "deep").mkdir()
    lines = told_of(lambda: image_folder(root))
    assert done(lines) == ["1 of 3 folders", "2 of 3 folders", "2 of 4 folders", "3 of 4 folders"]
    assert sum("ETA" in line for line in lines) > 6, "of each file"


def test_a_folder_on_a_store(told_of, monkeypatch):
    for name, number in {"classes": 5, "inner": 2, "images": 3}.items():
        monkeypatch.setattr(GeneratedFileSystem, name, number)
    lines = told_of(lambda: image_folder("generated://root"))
    assert done(lines)[-1] == "14 of 15 folders"
    assert "30 samples" in lines[-1]


def test_one_large_folder_on_a_store(told_of, monkeypatch):
    pages = [ListedPage([], [StoredObject(f"{n}{m}.jpg", 3, "") for m in range(10)], f"{n}") for n in range(4)]
    found = {"": [ListedPage(["a"], [])], "a": [*pages, ListedPage([], [])]}
    monkeypatch.setattr(Store, "pages", lambda _, folders: ((each, page) for each in folders for page in found[each]))
    lines = told_of(lambda: image_folder("memory://nowhere"))
    assert [int(re.findall(r"(\d+) samples", line)[0]) for line in lines] == [0, 10, 20, 30, 40, 40]
    assert done(lines) == ["0 of 1 folders"]


def test_tar_shards_while_their_headers_are_read(tmp_path, told_of, monkeypatch):
    monkeypatch.setattr(tar_members, "READ_AHEAD", 2**14)
    write_shards(tmp_path / "data", num_shards=2, per_shard=200)
    lines = told_of(lambda: tar_shards(f"{tmp_path / 'data'}/*.tar"))
    with_time = [line for line in lines if "ETA" in line]
    assert len(with_time) > 5
    assert all(re.search(r"\d of \d+ MB, ETA", line) for line in with_time)
    assert with_time[0].startswith(f"listing {tmp_path / 'data'}: 0 samples, 0/s")


def test_parquet_while_labels_are_read(tmp_path, told_of, monkeypatch):
    monkeypatch.setattr(parquet_columns, "_GROUPS_AT_ONCE", 2)
    for number in range(3):
        table = pa.table({"image": [b"1"] * 60, "label": [number] * 60})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=10)
    lines = told_of(lambda: parquet_images(tmp_path))
    assert [line.partition(" samples")[0].rpartition(" ")[2] for line in lines] == [f"{n}" for n in range(20, 200, 20)]
    assert lines[3].partition("/s, ")[2].startswith("1 of 3 files, ETA")


def test_a_parquet_table(tmp_path, told_of, monkeypatch):
    monkeypatch.setattr(parquet_columns, "_GROUPS_AT_ONCE", 2)
    splits = ["train", "val", "test"]
    table = pa.table({"path": [f"{n}.jpg" for n in range(60)], "label": [0] * 60, "fold": splits * 20})
    pq.write_table(table, tmp_path / "table.parquet", row_group_size=10)
    lines = told_of(lambda: image_table(tmp_path / "table.parquet"))
    assert done(lines) == ["20 of 60 rows", "40 of 60 rows"]
    lines = told_of(lambda: image_table(tmp_path / "table.parquet", split="val", split_column="fold"))
    assert [re.findall(r"(\d+) samples", line) for line in lines] == [["0"], ["0"], ["0"], ["20"]]
