"""What ``launcher data --verify`` does with a part of the work, how it cuts it, and what it keeps for the next time."""

import fcntl
import hashlib
import io
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.errors import StorageError
from jobs.images.decoding import BadSample
from jobs.images.indexed_images import IndexedImages, read_ranges
from jobs.images.indexing.index import Index, IndexBuilder, Source
from launcher.inspecting import reading_process
from launcher.inspecting.parts import Part, stretches
from launcher.inspecting.reading_process import verify_part
from launcher.inspecting.stamps import UNKNOWN, stamps_of
from launcher.inspecting.verified_file import RECORD, VerifiedFile


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "launcher" / "verified"


def records(*numbers: int, stamp: int = 9) -> np.ndarray:
    return np.array(
        [(number, hashlib.sha256(b"%d" % number).digest(), stamp, 1000 + number) for number in numbers], RECORD
    )


class TestVerifiedFile:
    def test_what_it_keeps_is_there_again(self, kept: Path) -> None:
        first = VerifiedFile("ab")
        first.add(records(7, 5))
        first.close()
        again = VerifiedFile("ab")
        again.add(records(6))
        assert again.records().tolist() == records(5, 6, 7).tolist()
        again.forget(np.arange(10))
        again.close()
        assert list(kept.iterdir()) == []

    def test_the_last_record_of_a_sample_counts(self) -> None:
        file = VerifiedFile("ab")
        file.add(records(1, 2, stamp=8))
        file.add(records(1, stamp=9))
        assert file.records()[["number", "stamp"]].tolist() == [(1, 9), (2, 8)]

    def test_a_sample_without_a_stamp_is_not_kept(self) -> None:
        file = VerifiedFile("ab")
        file.add(records(1, stamp=UNKNOWN))
        assert len(file.records()) == 0

    def test_what_belongs_to_other_datasets_stays(self) -> None:
        file = VerifiedFile("ab")
        file.add(records(*range(6)))
        file.forget(np.array([1, 4, 5, 99]))
        file.close()
        again = VerifiedFile("ab")
        assert again.records()["number"].tolist() == [0, 2, 3]
        again.add(records(4))
        assert again.records()["number"].tolist() == [0, 2, 3, 4]

    def test_what_a_full_disk_has_cut_is_dropped(self, kept: Path) -> None:
        first = VerifiedFile("ab")
        first.add(records(5, 6))
        first.close()
        os.truncate(kept / "ab", RECORD.itemsize + 3)
        again = VerifiedFile("ab")
        again.add(records(7))
        assert again.records().tolist() == records(5, 7).tolist()

    def test_a_write_that_a_full_disk_cuts_is_an_error_and_shifts_nothing(self) -> None:
        file = VerifiedFile("ab")
        file.add(records(1))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * RECORD.itemsize + 5, limits[1]))
        try:
            with pytest.raises(StorageError, match="cannot keep what was verified, File too large; make room"):
                file.add(records(2, 3, 4))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        file.add(records(5))
        assert file.records().tolist() == records(1, 5).tolist()

    def test_another_command_is_refused(self) -> None:
        held = VerifiedFile("ab")
        with pytest.raises(StorageError, match="another command verifies samples of the same data; wait for its end"):
            VerifiedFile("ab")
        held.close()
        VerifiedFile("ab").close()

    def test_a_file_that_another_command_removes_meanwhile_is_made_again(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        VerifiedFile("ab").close()
        flock, has_removed = fcntl.flock, []

        def late(file: int, how: int) -> None:
            if not has_removed:
                has_removed.append((kept / "ab").unlink())
            flock(file, how)

        monkeypatch.setattr(fcntl, "flock", late)
        file = VerifiedFile("ab")
        file.add(records(1))
        file.close()
        assert VerifiedFile("ab").records().tolist() == records(1).tolist()

    def test_what_nobody_goes_on_with_is_removed(self, kept: Path) -> None:
        long_ago = (0, time.time() - 31 * 24 * 3600)
        for name in ("old", "new"):
            VerifiedFile(name).close()
        in_use = VerifiedFile("used")
        os.utime(kept / "old", long_ago)
        os.utime(kept / "used", long_ago)
        VerifiedFile("other").close()
        assert sorted(path.name for path in kept.iterdir()) == ["new", "other", "used"]
        in_use.close()


def jpeg(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(content, "JPEG")
    return content.getvalue()


def of_files(folder: Path, contents: Sequence[bytes], version: str = "") -> Index:
    root = folder / f"{len(list(folder.iterdir()))}  two"
    root.mkdir()
    names = [f"{number}.jpg" for number in range(len(contents))]
    for name, content in zip(names, contents):
        (root / name).write_bytes(content)
    builder = IndexBuilder(Source("folder", str(root)))
    builder.classes = ("cat",)
    builder.add_files(names, [len(content) for content in contents], [version] * len(names), [0] * len(names))
    return builder.write(folder / f"{len(list(folder.iterdir()))}.arrow")


def path_of(index: Index, number: int) -> Path:
    return Path(index.url_of(number))


def read_files(index: Index, numbers: Sequence[int]) -> list[bytes | BadSample]:
    paths = [path_of(index, number) for number in numbers]
    return [path.read_bytes() if path.exists() else BadSample("is gone", str(path)) for path in paths]


def unread(*numbers: int) -> Part:
    return Part(np.array(numbers), np.zeros(len(numbers), np.uint64))


class TestPart:
    def test_it_is_read_decoded_and_hashed(self, tmp_path: Path) -> None:
        index = of_files(tmp_path, [jpeg(0), b"no image", b""])
        path_of(index, 2).unlink()
        verified = verify_part(index, read_files, unread(0, 1, 2))
        assert verified.whole[["number", "sha256"]].tolist() == [(0, hashlib.sha256(jpeg(0)).digest())]
        assert abs(verified.whole["read_at"][0] - time.time()) < 100
        assert list(verified.broken) == [1, 2]
        assert verified.broken[1].startswith("cannot be decoded"), "the URL is told beside it"
        assert verified.broken[2] == "is gone"
        assert len(verified) == 3

    def test_what_has_not_changed_is_not_read_again(self, tmp_path: Path) -> None:
        index = of_files(tmp_path, [jpeg(shade) for shade in range(4)])
        first = verify_part(index, read_files, unread(0, 1, 2, 3)).whole
        path_of(index, 1).write_bytes(bytes(len(jpeg(1))))
        path_of(index, 2).unlink()
        again = verify_part(index, read_files, Part(first["number"], first["stamp"]))
        assert again.unchanged.tolist() == [0, 3]
        assert list(again.broken) == [1, 2]

    def test_a_file_with_its_old_size_and_time_has_changed(self, tmp_path: Path) -> None:
        index = of_files(tmp_path, [jpeg(0)])
        path, before = path_of(index, 0), stamps_of(index, np.arange(1), "")
        assert stamps_of(index, np.arange(1), "") == before
        times = path.stat()
        path.write_bytes(bytes(len(jpeg(0))))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert stamps_of(index, np.arange(1), "") != before

    def test_another_version_of_the_decoder_reads_all_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = of_files(tmp_path, [jpeg(0)])
        first = verify_part(index, read_files, unread(0)).whole
        part = Part(first["number"], first["stamp"])
        assert verify_part(index, read_files, part).unchanged.tolist() == [0]
        monkeypatch.setattr(reading_process, "DECODER", "Pillow 99.0.0, rules 1")
        assert verify_part(index, read_files, part).unchanged.tolist() == []

    def test_where_the_index_has_versions_the_store_is_not_asked(self, tmp_path: Path) -> None:
        index = of_files(tmp_path, [jpeg(0), jpeg(0)], version='"etag"')
        before = stamps_of(index, np.arange(2), "")
        path_of(index, 1).unlink()
        assert stamps_of(index, np.arange(2), "").tolist() == before.tolist()
        assert UNKNOWN not in before

    def test_without_a_stamp_a_sample_is_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        index = of_files(tmp_path, [jpeg(0)])
        monkeypatch.setattr("cluster.storage.object_calls._CHANGING", ())
        first = verify_part(index, read_files, unread(0)).whole
        assert first["stamp"].tolist() == [UNKNOWN]
        again = verify_part(index, read_files, Part(first["number"], first["stamp"]))
        assert (len(again.whole), len(again.unchanged)) == (1, 0)

    def test_a_reader_that_returns_too_few_is_an_error(self, tmp_path: Path) -> None:
        index = of_files(tmp_path, [jpeg(0), jpeg(1)])
        with pytest.raises(ValueError, match="zip"):
            verify_part(index, lambda index, numbers: read_files(index, numbers[1:]), unread(0, 1))

    @pytest.mark.parametrize(
        ("size", "num", "expected"),
        [
            (reading_process.BYTES_AT_ONCE // 3, 7, [[0, 1, 2], [3, 4, 5], [6]]),
            (2 * reading_process.BYTES_AT_ONCE, 2, [[0], [1]]),
            (-1, 7, [[*range(7)]]),
        ],
    )
    def test_large_images_are_not_held_together(
        self, tmp_path: Path, size: int, num: int, expected: list[list[int]]
    ) -> None:
        builder = IndexBuilder(Source("folder", "s3://bucket"))
        builder.classes = ("cat",)
        builder.add_files([f"{number}.jpg" for number in range(num)], [size] * num, ["v"] * num, [0] * num)
        assert read_at_once(builder.write(tmp_path / "index")) == expected

    def test_nor_are_large_rows_of_parquet(self, tmp_path: Path) -> None:
        """Whose place in the index is a number of a row, and no number of bytes."""
        index = of_row_groups(tmp_path, [[4, 3], [2]], size_of_row=reading_process.BYTES_AT_ONCE // 3)
        assert read_at_once(index) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def read_at_once(index: Index) -> list[list[int]]:
    at_once = []

    def read(_: Index, numbers: Sequence[int]) -> list[Any]:
        at_once.append(list(numbers))
        return [jpeg(0)] * len(numbers)

    verify_part(index, read, unread(*range(len(index))))
    return at_once


def of_row_groups(folder: Path, files: Sequence[Sequence[int]], size_of_row: int = 1) -> Index:
    """An index of Parquet files, by the numbers of rows in their row groups."""
    builder = IndexBuilder(Source("parquet", "s3://bucket"))
    builder.classes = ("cat",)
    for number, groups in enumerate(files):
        rows = sum(groups)
        builder.add_container(
            f"{number}.parquet", size_of_row * rows, "v",
            offsets=np.repeat(np.arange(len(groups)), groups), lengths=np.concatenate([*map(np.arange, groups)]),
            labels=[0] * rows, keys=list(map(str, range(rows))),
        )  # fmt: skip
    return builder.write(folder / "index")


def test_the_numbers_of_a_range_are_made_fast(tmp_path: Path) -> None:
    """numpy would make a Python number of each."""
    dataset = IndexedImages(of_files(tmp_path, [b""]), read_ranges, range(3, 20_000_003))
    began = time.thread_time()  # what other processes take of the machine does not count
    numbers = dataset.numbers
    assert time.thread_time() - began < 1.3, "it takes 2.6 s otherwise"
    assert (numbers.dtype, len(numbers), numbers[0], numbers[-1]) == (np.int64, 20_000_000, 3, 20_000_002)


class TestStretches:
    @pytest.mark.parametrize("num_samples", [0, 1, 64, 65, 5_000, 100_000])
    @pytest.mark.parametrize("num_processes", [1, 3, 64])
    def test_every_sample_is_in_one(self, tmp_path: Path, num_samples: int, num_processes: int) -> None:
        cut = list(stretches(of_files(tmp_path, [b""]), np.arange(num_samples), num_processes))
        assert [number for each in cut for number in each] == list(range(num_samples))
        assert all(len(each) % 64 == 0 for each in cut[:-1])
        assert max(map(len, cut), default=0) <= 1024

    def test_no_row_group_is_in_two(self, tmp_path: Path) -> None:
        sizes = [[70, 70], [5_000], [10] * 200, [1_500, 3]]
        index = of_row_groups(tmp_path, sizes)
        ends = np.cumsum([0, *(size for groups in sizes for size in groups)])
        for numbers in (np.arange(len(index)), np.arange(len(index))[::3], np.arange(len(index))[1:]):
            cut = list(stretches(index, numbers, 2))
            assert [position for each in cut for position in each] == list(range(len(numbers)))
            assert len(cut) > 2
            groups = [set(np.searchsorted(ends, numbers[each.start : each.stop], "right")) for each in cut]
            assert sum(map(len, groups)) == len(set.union(*groups))
