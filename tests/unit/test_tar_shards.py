"""Tar shards: the samples, labels and pixels that WebDataset reads, and an error where it would read fewer."""

import gzip
import io
import json
import math
import os
import pickle
import subprocess
import tarfile
from pathlib import Path
from random import Random

import braceexpand
import pytest
import torch
from counting_file_system import CountingFileSystem, start_counting

from cluster.errors import StorageError
from cluster.storage.store import Store
from cluster.storage.stored_objects import StoredObject
from jobs.data import BadSample, tar_shards
from jobs.images.indexed_images import IndexedImages
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from jobs.images.object_urls import expand_braces
from jobs.images.tar.tar_members import Reads, TarReader
from tests.shards import as_webdataset_reads, jpeg, write_shards

pytestmark = pytest.mark.usefixtures("own_indexes")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format, **options) as tar:
        for name, content in members.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def labelled(keys, label="cls", values=None) -> dict[str, bytes]:
    """Members of samples."""
    values = range(len(keys)) if values is None else values
    members = {}
    for number, (key, value) in enumerate(zip(keys, values)):
        members[f"{key}.{label}"] = str(value).encode() if label == "cls" else json.dumps(value).encode()
        members[f"{key}.jpg"] = jpeg(number)
    return members


def drained(reads: Reads, content: bytes):
    """What a generator returns that reads a file of this content."""
    try:
        wanted = next(reads)
        while True:
            wanted = reads.send(content[wanted.offset : wanted.offset + wanted.size])
    except StopIteration as stop:
        return stop.value


def keys_of(dataset: IndexedImages) -> list[str]:
    return [dataset.index.place(number).key for number in range(len(dataset.index))]


def assert_same(dataset: IndexedImages, shards: list[Path]) -> None:
    """That it has the samples that WebDataset reads, in its order."""
    expected = as_webdataset_reads(shards)
    assert keys_of(dataset) == [sample["__key__"] for sample in expected]
    assert dataset.targets.tolist() == [int(sample["cls"]) for sample in expected]
    assert dataset.fetch(range(len(dataset))) == [sample["jpg"] for sample in expected]
    assert len(expected) > 0


class TestWriters:
    def test_webdatasets_own(self, tmp_path):
        shards = write_shards(tmp_path / "data", num_shards=3, per_shard=5)
        dataset = tar_shards(str(tmp_path / "data"))
        assert_same(dataset, shards)
        assert (len(dataset), dataset.classes) == (15, ("0", "1", "2", "3"))
        samples = [dataset[number] for number in range(15)]
        for (image_3HW, label), expected in zip(samples, as_webdataset_reads(shards, "rgb8"), strict=True):
            assert torch.equal(image_3HW, torch.tensor(expected["jpg"]).permute(2, 0, 1) / 255)
            assert label == expected["cls"]

    @pytest.mark.parametrize("format", FORMATS)
    def test_pythons(self, tmp_path, format):
        keys = ["0", "dir/" * 20 + "x" * 90, "ünï/çödé", "v1.0/a.b/c"]
        if format != "ustar":
            keys += ["long/" * 60 + "y" * 200]
        shard = write_tar(tmp_path / "a.tar", labelled(keys), FORMATS[format], pax_headers={"comment": "of all"})
        dataset = tar_shards(str(shard))
        assert_same(dataset, [shard])
        assert keys_of(dataset) == keys

    @pytest.mark.parametrize("format", ["ustar", "oldgnu", "gnu", "posix", "v7"])
    def test_gnus(self, tmp_path, format):
        keys = ["v1.0/0", "v1.0/1-a", "v1.0/1", "ünï/ö"]
        if format != "v7":
            keys += ["d" * 90 + "/" + "x" * 90]
        if format in ("gnu", "oldgnu", "posix"):
            keys += ["d" * 150 + "/" + "x" * 200]
        for name, content in labelled(keys).items():
            path = tmp_path / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        shard = tmp_path / "a.tar"
        command = ["tar", "--create", f"--format={format}", "--sort=name", f"--file={shard}", "."]
        subprocess.run(command, cwd=tmp_path / "files", check=True)
        dataset = tar_shards(str(shard))
        assert_same(dataset, [shard])
        assert sorted(keys_of(dataset)) == sorted(f"./{key}" for key in keys)
        assert dataset.index.passed_over["folder in a shard"][0] >= 3

    @pytest.mark.parametrize("format", ["gnu", "pax"])
    def test_members_of_more_than_8_gib(self, tmp_path, local_reads, format):
        """Their size does not fit into the octal digits of a header."""
        shard, size = tmp_path / "a.tar", 9 * 2**30
        big = tarfile.TarInfo("0.npy")
        big.size = size
        with shard.open("wb") as file:
            file.write(big.tobuf(FORMATS[format]))
            file.seek(size, os.SEEK_CUR)
            file.write(write_tar(tmp_path / "rest", labelled(["0", "1"]), FORMATS[format]).read_bytes())
        dataset = tar_shards(str(shard))
        assert dataset.fetch([0, 1]) == [jpeg(0), jpeg(1)]
        assert sum(local_reads) < 2**21

    @pytest.mark.parametrize("format", FORMATS)
    def test_members_that_tarfile_finds(self, format):
        random = Random(1)  # noqa: S311 - not for secrets
        kinds = [
            tarfile.REGTYPE,
            tarfile.LNKTYPE,
            tarfile.CONTTYPE,
            tarfile.DIRTYPE,
            tarfile.SYMTYPE,
            tarfile.FIFOTYPE,
        ]
        for _ in range(40):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=FORMATS[format]) as tar:
                for _ in range(random.randrange(12)):
                    longest = 9 if format == "ustar" else 60
                    name = "/".join("".join(random.choices("aö.", k=random.randint(1, longest))) for _ in range(8))
                    target = "t" * random.randint(1, 100 if format == "ustar" else 300)
                    kind, size = random.choice(kinds), random.choice([0, 1, 511, 512, 513, 2**19, 2**21])
                    content = bytes(size) if kind in tarfile.REGULAR_TYPES else b""
                    add(tar, name, content, type=kind, linkname=target, mtime=random.random() * 1e9)
            found = []
            reads = TarReader("a.tar", StoredObject("a.tar", len(file.getvalue()), ""))
            while (member := drained(reads.next_member(), file.getvalue())) is not None:
                found.append((member.name.rstrip("/"), member.kind == "file", member.offset))
            file.seek(0)
            with tarfile.open(fileobj=file) as tar:
                assert found == [(member.name, member.isreg(), member.offset_data) for member in tar]

    @pytest.mark.parametrize("blocks", [1, 20, 512])
    def test_records_of_any_length(self, tmp_path, blocks):
        write_tar(tmp_path / "first.tar", labelled("ab"))
        subprocess.run(["tar", "-xf", "first.tar"], cwd=tmp_path, check=True)
        command = ["tar", f"-b{blocks}", "-cf", "a.tar", "a.cls", "a.jpg", "b.cls", "b.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert keys_of(tar_shards(str(tmp_path / "a.tar"))) == ["a", "b"]

    def test_a_tar_joined_by_gnu_tar(self, tmp_path):
        shard, other = write_tar(tmp_path / "a.tar", labelled("ab")), write_tar(tmp_path / "b", labelled("cd"))
        subprocess.run(["tar", "--concatenate", f"--file={shard}", other], check=True)
        assert_same(tar_shards(str(shard)), [shard])
        assert len(as_webdataset_reads([shard])) == 4


class TestRequests:
    def test_headers_of_small_members_are_read_together(self, tmp_path, local_reads):
        (shard,) = write_shards(tmp_path / "data", num_shards=1, per_shard=400)
        tar_shards(str(shard))
        size = shard.stat().st_size
        assert 2**20 < size < 2**21
        assert len(local_reads) == 2
        # A header, or the rest of an image, is at the end of each.
        assert abs(size - sum(local_reads)) < 2048 * len(local_reads)

    def test_large_members_are_stepped_over(self, tmp_path, local_reads):
        image = jpeg(0) + bytes(2**21)
        members = {}
        for key in "abcdefgh":
            members |= {f"{key}.cls": b"0", f"{key}.jpg": image, f"{key}.txt": b"text"}
        shard = write_tar(tmp_path / "a.tar", members)
        tar_shards(str(shard))
        assert len(local_reads) == 9  # the first headers, and what follows each image
        assert sum(local_reads) <= 2**20 + 8 * 2**18 < shard.stat().st_size / 5

    def test_neighbours_are_read_in_one_request(self, tmp_path, local_reads):
        write_shards(tmp_path / "data", num_shards=2, per_shard=10)
        dataset = tar_shards(str(tmp_path / "data"))
        local_reads.clear()
        assert dataset.fetch([3, 5, 4, 12]) == [jpeg(number) for number in (3, 5, 4, 12)]
        assert len(local_reads) == 2

    def test_many_shards_are_read_at_a_time(self, tmp_path):
        shards = write_shards(tmp_path / "data", num_shards=40, per_shard=2)
        store = Store("count://many/shards")
        for shard in shards:
            store.write(shard.name, shard.read_bytes())
        start_counting(latency_s=0.02)
        try:
            dataset = tar_shards("count://many/shards/shard-{000000..000039}.tar")
            assert CountingFileSystem.calls == {"list": 1, "read": 40}
            assert 8 < CountingFileSystem.most["read"] <= 32
        finally:
            start_counting()
        assert dataset.fetch(range(80)) == [jpeg(number) for number in range(80)]

    def test_the_index_of_a_process_is_made_once(self, tmp_path, local_reads):
        write_shards(tmp_path / "data")
        train, val = (tar_shards(str(tmp_path / "data"), split, val_fraction=0.4) for split in ("train", "val"))
        assert len(local_reads) == 3
        assert train.index is val.index


class TestSamples:
    def test_of_several_members_the_wanted_ones_count(self, tmp_path):
        members = {
            "a.cls": b"0", "a.JPG": jpeg(0), "a.json": b'{"y": 7}', "a.png": b"x", "a.seg.png": b"mask a",
            "b.CLS": b" +1\n", "b.json": b'{"y": 5}', "b.seg.png": b"mask b", "b.webp": jpeg(1),
        }  # fmt: skip
        shard = str(write_tar(tmp_path / "a.tar", members))
        dataset = tar_shards(shard)
        assert (dataset.fetch([0, 1]), dataset.targets.tolist()) == ([jpeg(0), jpeg(1)], [0, 1])
        masks = tar_shards(shard, image=".seg.png", label="y")
        assert (masks.fetch([0, 1]), masks.targets.tolist()) == ([b"mask a", b"mask b"], [7, 5])
        assert tar_shards(shard, image="png;webp").fetch([0, 1]) == [b"x", jpeg(1)]

    def test_what_is_no_sample_is_passed_over_and_counted(self, tmp_path):
        shard = tmp_path / "a.tar"
        with tarfile.open(shard, "w") as tar:
            add(tar, "a", type=tarfile.DIRTYPE)
            add(tar, "a/0.cls", b"0")
            add(tar, "a/._0.jpg", b"resource fork")
            add(tar, "a/0.jpg", jpeg(0))
            add(tar, "a/1.jpg", type=tarfile.SYMTYPE, linkname="0.jpg")
            add(tar, "a/2.jpg", type=tarfile.LNKTYPE, linkname="a/0.jpg")
            add(tar, "a/pipe", type=tarfile.FIFOTYPE)
            add(tar, "__MACOSX/a/3.jpg", b"x")
            add(tar, "__meta__/info.json", b"{}")
            add(tar, "README.txt", b"read me")
            add(tar, "LICENSE", b"free")
        write_tar(tmp_path / "b.tar", {})
        (tmp_path / "00000.parquet").touch()
        (tmp_path / "._a.tar").touch()
        dataset = tar_shards(str(tmp_path))
        assert keys_of(dataset) == ["a/0"]
        assert dataset.index.passed_over == {
            "special file in a shard": (1, "a.tar#a/pipe"),
            "no tar file": (1, "00000.parquet"),
            "folder in a shard": (1, "a.tar#a/"),
            "hidden": (1, "._a.tar"),
            "hidden member": (1, "a.tar#a/._0.jpg"),
            "link in a shard": (2, "a.tar#a/1.jpg"),
            "member that is no sample": (2, "a.tar#__MACOSX/a/3.jpg"),
            "member without an extension": (1, "a.tar#LICENSE"),
            "sample without image and label": (1, "a.tar#README"),
            "shard without samples": (1, "b.tar"),
        }

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"a.jpg": b"", "b.cls": b"1"}, "#a: has no label (.cls), but .jpg; write all members"),
            ({"a.cls": b"1"}, "#a: has no image (.jpg, .jpeg, .png, .webp), but .cls; write all members"),
            ({"d/a.tiff": b"", "d/a.cls": b"1"}, "#d/a: has no image (.jpg, .jpeg, .png, .webp), but .tiff, .cls; "),
            (
                {"a.jpg": b"", "b.jpg": b"", "a.cls": b"1", "b.cls": b"1"},
                "#a: has no label (.cls), but .jpg; write all members of a sample next to each other, and no links "
                "(tar --sort=name --hard-dereference)",
            ),
            (
                {"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.cls": b"1", "a.png": b"", "a.CLS": b"1"},
                "#a: occurs twice in the shard; remove one, or rename it",
            ),
            ({"a.jpg": b"", "a.JPG": b""}, "#a: has two members .jpg; remove one"),
            ({"a.jpg": b"", "a.cls": b"cat"}, "#a: its .cls must hold an integer, got b'cat'; correct it"),
            ({"a.jpg": b"", "a.cls": b"-1"}, "#a: its .cls must lie between 0 and 999999, got -1; correct it, or "),
            ({"a.jpg": b"", "a.cls": b"12345678"}, "#a: its .cls must lie between 0 and 999999, got 12345678; "),
            ({}, ": has no samples with .jpg and .cls in 1 shards; name others in urls"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, members, message):
        shard = write_tar(tmp_path / "a.tar", members)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
            tar_shards(str(shard))
        assert str(caught.value).startswith((f"{shard}{message}", f"{tmp_path}{message}"))

    def test_a_shard_that_was_cut_off_later_is_a_bad_sample(self, tmp_path):
        (shard,) = write_shards(tmp_path, num_shards=1)
        dataset = tar_shards(str(shard))
        os.truncate(shard, dataset.index.place(3).offset + 10)
        contents = dataset.fetch(range(5))
        assert contents[:3] == [jpeg(number) for number in range(3)]
        assert [type(content) for content in contents[3:]] == [BadSample] * 2
        with pytest.raises(BadSample, match=f"{shard}#00003: its object ends before it does"):
            dataset[3]
        shard.unlink()
        with pytest.raises(BadSample, match=f"{shard}#00000: is gone"):
            dataset[0]

    def test_another_process_reads_the_same(self, tmp_path):
        write_shards(tmp_path / "data")
        dataset = tar_shards(str(tmp_path / "data"), "train", val_fraction=0.4)
        twin = pickle.loads(pickle.dumps(dataset))  # noqa: S301
        assert twin.targets.tolist() == dataset.targets.tolist()
        assert all(torch.equal(twin[number][0], dataset[number][0]) for number in range(len(dataset)))


class TestLabels:
    def test_integers_of_json(self, tmp_path):
        shard = write_tar(tmp_path / "a.tar", labelled("abc", "json", [{"y": 4}, {"y": 0}, {"y": 1, "z": "q"}]))
        dataset = tar_shards(str(shard), label="y")
        assert (dataset.targets.tolist(), dataset.classes) == ([4, 0, 1], ("0", "1", "2", "3", "4"))

    def test_names_are_numbered_in_order_whatever_shard_has_them_first(self, tmp_path):
        for shard, names in {"a": ["dog", "cow"], "b": ["ant", "dog"]}.items():
            values = [{"label": name} for name in names]
            write_tar(tmp_path / f"{shard}.tar", labelled([f"{shard}{name}" for name in names], "json", values))
        dataset = tar_shards(str(tmp_path), label="label")
        assert dataset.classes == ("ant", "cow", "dog")
        assert dataset.targets.tolist() == [2, 1, 0, 2]
        given = tar_shards(str(tmp_path), label="label", classes=["dog", "cat", "ant", "cow"])
        assert (given.targets.tolist(), given.classes) == ([0, 3, 2, 0], ("dog", "cat", "ant", "cow"))

    def test_integers_with_names_or_their_number(self, tmp_path):
        shard = str(write_tar(tmp_path / "a.tar", labelled("abc")))
        assert tar_shards(shard, classes=["x", "y", "z", "w"]).classes == ("x", "y", "z", "w")
        dataset = tar_shards(shard, classes=10)
        assert (len(dataset.classes), dataset.targets.tolist(), dataset.targets.dtype) == (10, [0, 1, 2], torch.int64)

    def test_numbers_to_predict(self, tmp_path):
        values = [{"x": 1, "y": 0.5, "name": "q"}, {"x": -2.25, "y": 3}]
        shard = write_tar(tmp_path / "a.tar", labelled("ab", "json", values))
        dataset = tar_shards(str(shard), targets=["y", "x"])
        assert dataset.classes == ()
        assert dataset.targets.dtype == torch.float32
        assert dataset.targets.tolist() == [[0.5, 1.0], [3.0, -2.25]]
        assert dataset[1][1].tolist() == [3.0, -2.25]

    @pytest.mark.parametrize(
        ("values", "arguments", "message"),
        [
            ([{"y": 1}, {"y": "cat"}], {"label": "y"}, "b: its y must be an integer, got 'cat'; correct it, or name "),
            ([{"y": "cat"}, {"y": 1}], {"label": "y"}, "b: its y must be a name as in the samples before it, got 1; "),
            ([{"y": True}], {"label": "y"}, "a: its y must be an integer or the name of a class, got True; correct it"),
            ([{"y": None}], {"label": "y"}, "a: its y must be an integer or the name of a class, got None; correct it"),
            ([{"y": 1.0}], {"label": "y"}, "a: its y must be an integer or the name of a class, got 1.0; correct it"),
            ([{"y": [1]}], {"label": "y"}, "a: its y must be an integer or the name of a class, got [1]; correct it"),
            ([{"z": 1}], {"label": "y"}, "a: its .json has no 'y', but z; name another key"),
            ([[1]], {"label": "y"}, "a: its .json must hold an object with 'y'; correct it, or name other keys"),
            ([{"y": 3}], {"label": "y", "classes": 3}, "a: its y must lie between 0 and 2, got 3; correct it, or set "),
            ([{"y": 2}], {"label": "y", "classes": ["p", "q"]}, "a: its y must lie between 0 and 1, got 2; correct it"),
            ([{"y": "r"}], {"label": "y", "classes": ["p", "q"]}, "a: its y must be one of 2 classes, got 'r'; add it"),
            ([{"y": "r"}], {"label": "y", "classes": 3}, "a: its y must be an integer, got 'r'; correct it, or name "),
            ([{"x": math.inf}], {"targets": ["x"]}, "a: its x must be a finite number, got inf; correct it"),
            ([{"x": math.nan}], {"targets": ["x"]}, "a: its x must be a finite number, got nan; correct it"),
            ([{"x": 1e39}], {"targets": ["x"]}, "a: its x must be a finite number, got 1e+39; correct it"),
            ([{"x": 10**400}], {"targets": ["x"]}, f"a: its x must be a finite number, got 1{'0' * 39}...; correct it"),
            ([{"x": 1, "y": "2"}], {"targets": ["x", "y"]}, "a: its x, y must be a finite number, got '2'; correct it"),
        ],
    )
    def test_wrong_ones_are_named(self, tmp_path, values, arguments, message):
        shard = write_tar(tmp_path / "a.tar", labelled("abc"[: len(values)], "json", values))
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
            tar_shards(str(shard), **arguments)
        assert str(caught.value).startswith(f"{shard}#{message}")

    @pytest.mark.parametrize("content", [b"{", b"\xff{}", b"[" * 100_000])
    def test_a_json_that_is_none(self, tmp_path, content):
        shard = write_tar(tmp_path / "a.tar", {"a.json": content, "a.jpg": jpeg(0)})
        with pytest.raises(ValueError, match=f"{shard}#a: its .json is not valid, .*; correct it"):
            tar_shards(str(shard), label="y")


class TestDamage:
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_shard_that_is_truncated_anywhere(self, tmp_path, format):
        whole = write_tar(tmp_path / "whole", labelled(["a" * 90, "ü"]), FORMATS[format]).read_bytes()
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
        for size in [*range(0, end + 512, 512), 5, 700, end + 511]:
            shard = tmp_path / f"{size}.tar"
            shard.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{shard}: is truncated, it has {size} bytes and .*; restore it"):
                tar_shards(str(shard))
        shard.write_bytes(whole[: end + 512])  # tarfile and GNU tar take it as well
        use_index_files(IndexFiles())
        assert len(tar_shards(str(shard))) == 2

    def test_a_shard_that_is_truncated_says_where(self, tmp_path):
        shard = write_tar(tmp_path / "a.tar", {"a.cls": b"0", "a.jpg": bytes(5000)})
        os.truncate(shard, 4000)
        with pytest.raises(ValueError, match="has 4000 bytes and a.jpg ends at byte 6536; restore it"):
            tar_shards(str(shard))

    def test_a_shard_with_a_hole(self, tmp_path):
        content = bytearray(write_tar(tmp_path / "whole", labelled("abcd")).read_bytes())
        content[2048:4096] = bytes(2048)
        shard = tmp_path / "a.tar"
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=f"{shard}: .*; restore it"):
            tar_shards(str(shard))

    @pytest.mark.parametrize("more", [b"", bytes(2**21)])
    def test_shards_that_are_joined_end_to_end(self, tmp_path, more):
        first, second = (write_tar(tmp_path / name, labelled(name)).read_bytes() for name in "ab")
        shard = tmp_path / "a.tar"
        shard.write_bytes(first + more + second)
        with pytest.raises(ValueError, match=f"{shard}: ends at byte .*, but .* bytes follow; restore it, and join"):
            tar_shards(str(shard))

    @pytest.mark.parametrize("format", FORMATS)
    def test_any_changed_byte_of_a_header(self, tmp_path, format):
        content = bytearray(
            write_tar(tmp_path / "whole", {"a.cls": b"0", "a.jpg": jpeg(0)}, FORMATS[format]).read_bytes()
        )
        shard = tmp_path / "a.tar"
        for position in range(1024, 1024 + 500, 7):  # of the second member
            content[position] ^= 0x55
            shard.write_bytes(content)
            use_index_files(IndexFiles())
            with pytest.raises(ValueError, match=f"{shard}: is damaged at byte 1024, .*; restore it"):
                tar_shards(str(shard))
            content[position] ^= 0x55

    @pytest.mark.parametrize(
        "records", [b"9 path=a", b"12 path=a\n", b"xx path=a\n", b"0 path=a\n", b"11 path a \n", b"9"]
    )
    def test_a_pax_header_that_is_wrong(self, tmp_path, records):
        shard = tmp_path / "a.tar"
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            add(tar, "header", records, type=tarfile.XHDTYPE)
            add(tar, "a.jpg")
        with pytest.raises(ValueError, match=f"{shard}: is damaged at byte .*, a PAX header is wrong; restore it"):
            tar_shards(str(shard))

    def test_a_name_of_gigabytes_is_not_read(self, tmp_path, local_reads):
        shard = tmp_path / "a.tar"
        header = tarfile.TarInfo("header")
        header.type, header.size = tarfile.XHDTYPE, 2**32
        shard.write_bytes(header.tobuf(tarfile.USTAR_FORMAT))
        os.truncate(shard, 2**33)
        with pytest.raises(ValueError, match=f"{shard}: is damaged at byte 512, a name has {2**32} bytes; restore it"):
            tar_shards(str(shard))
        assert sum(local_reads) < 2**21

    def test_what_is_no_tar(self, tmp_path):
        shard = tmp_path / "a.tar"
        shard.write_bytes(jpeg(0, size=64))
        with pytest.raises(ValueError, match=f"{shard}: is no tar file; restore it, or name other shards"):
            tar_shards(str(shard))

    @pytest.mark.parametrize("format", ["gnu", "posix"])
    def test_sparse_files(self, tmp_path, format):
        (tmp_path / "a.cls").write_bytes(b"0")
        with (tmp_path / "a.jpg").open("wb") as file:
            file.seek(2**20)
            file.write(jpeg(0))
        shard = tmp_path / "a.tar"
        command = ["tar", "--sparse", f"--format={format}", "-cf", shard, "a.cls", "a.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        with pytest.raises(ValueError, match=f"{shard}: .*a.jpg is stored as a sparse file; write it without tar's"):
            tar_shards(str(shard))

    @pytest.mark.parametrize("program", ["gzip", "bzip2", "xz"])
    def test_compressed_shards(self, tmp_path, program):
        plain = write_tar(tmp_path / "plain", labelled("a")).read_bytes()
        packed = subprocess.run([program, "-c"], input=plain, capture_output=True, check=True).stdout
        (tmp_path / "in-disguise.tar").write_bytes(packed)
        with pytest.raises(ValueError, match=f"in-disguise.tar: is compressed with {program}; decompress it"):
            tar_shards(str(tmp_path / "in-disguise.tar"))

    @pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.TAR.XZ"])
    def test_compressed_shards_by_name(self, tmp_path, name):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / name).write_bytes(gzip.compress(b""))
        for url in (tmp_path / "data", tmp_path / "data" / name, tmp_path / "data" / f"[ab]{name[1:]}"):
            with pytest.raises(ValueError, match=f"data/{name}: is compressed; decompress it"):
                tar_shards(str(url))


class TestUrls:
    @pytest.fixture
    def data(self, tmp_path) -> Path:
        write_shards(tmp_path / "data/train", num_shards=3, per_shard=2)
        write_shards(tmp_path / "data/extra", num_shards=2, per_shard=2)
        return tmp_path / "data"

    @pytest.mark.parametrize(
        ("urls", "expected"),
        [
            ("{}/train", "0 1 2"),
            ("{}/train/", "0 1 2"),
            ("{}/train/shard-000001.tar", "1"),
            ("{}/train/shard-{{000000..000002}}.tar", "0 1 2"),
            ("{}/train/shard-00000{{2,0}}.tar", "2 0"),
            ("{}/train/*-00000[12].tar", "1 2"),
            ("{}/*/shard-00000?.tar", "extra/0 extra/1 train/0 train/1 train/2"),
            ("{}/{{train,extra}}", "train/0 train/1 train/2 extra/0 extra/1"),
            (["{}/train/shard-000001.tar", "{}/train/shard-000000.tar"], "1 0"),
            (["file://{}/train/shard-000001.tar", "{}/extra"], "train/1 extra/0 extra/1"),
        ],
    )
    def test_name_shards_in_order(self, data, urls, expected):
        dataset = tar_shards(urls.format(data) if isinstance(urls, str) else [url.format(data) for url in urls])
        objects = dict.fromkeys(dataset.index.place(number).object for number in range(len(dataset)))
        assert [name.replace("shard-00000", "").removesuffix(".tar") for name in objects] == expected.split()
        assert dataset.fetch([0]) == [jpeg(2 * int(expected.removeprefix("train/").removeprefix("extra/")[0]))]

    def test_folders_in_braces_are_listed_together(self, data, monkeypatch):
        asked: list[list[str]] = []
        pages = Store.pages

        def counting_pages(self: Store, folders):
            asked.append(list(folders))
            return pages(self, asked[-1])

        monkeypatch.setattr(Store, "pages", counting_pages)
        urls = [f"{data}/{{train,extra}}/shard-000000.tar", f"{data}/{{train,extra}}/*1.tar"]
        assert len(tar_shards(urls)) == 8
        assert asked == [[""], ["extra", "train"]]

    def test_a_pattern_fits_no_hidden_file(self, data):
        (data / "train/._shard-000000.tar").write_bytes(b"macOS" * 200)
        assert len(tar_shards(f"{data}/train/*.tar")) == 6
        with pytest.raises(ValueError, match="is no tar file"):
            tar_shards(f"{data}/train/.*.tar")

    def test_may_be_relative_or_at_home(self, data, monkeypatch):
        monkeypatch.chdir(data)
        monkeypatch.setenv("HOME", str(data))
        for urls in ("train", "~/train", "train/*.tar", "~/{train,extra}"):
            assert len(tar_shards(urls)) in (6, 10)
        monkeypatch.chdir(data / "extra")
        assert len(tar_shards("shard-{000000..000001}.tar")) == len(tar_shards("*.tar")) == 4

    @pytest.mark.parametrize(
        ("urls", "message"),
        [
            ("{}/train/shard-{{000000..000007}}.tar", "{}/train/shard-000003.tar: names no tar file, nor do 4 others "),
            ("{}/train/x-{{0..3}}.tar", "{}/train/x-0.tar: names no tar file, nor do 3 others of 4; restore "),
            ("{}/train/*x.tar", "{}/train/*x.tar: names no tar file; restore what is gone, or correct urls"),
            ("{}/nowhere", "{}/nowhere: names no tar file; "),
            ("{}", "{}: names no tar file; "),
            (["{}/train", "{}/train/shard-000001.tar"], "{}/train/shard-000001.tar: is named twice in urls; "),
            ("pipe:cat {}/train/shard-000001.tar", "urls must hold URLs alone, got 'pipe:cat "),
            ("{}/train/{{0..3.tar", "urls must have a closing brace for each opening one, got '{{0..3.tar'; "),
            ("{}/train/{{0}}.tar", "urls must have a range or a list in braces, got {{0}}; write {{000..146}} "),
            ("{}/train/{{0..9999999}}.tar", "urls must name at most 1000000 files, got {{0..9999999}}; correct "),
            ("{}/{{0..999}}/{{0..1999}}.tar", "urls must name at most 1000000 files, got '{{0..999}}/{{0..1999}}.tar"),
            ([], "urls must be a URL or a list of URLs, got []; write s3://bucket/part-{{000..146}}.tar"),
            (["memory://a/b.tar", "memory://c/d.tar"], "urls must lie in one bucket, got memory://a and others; copy "),
            (["memory://a/b.tar", "{}"], "urls must lie in one bucket, got memory://a and others; copy them to one"),
            ("s3://{{a,b}}/c.tar", "urls must name one bucket, got 's3://{{a,b}}/c.tar'; write it without braces"),
        ],
    )  # fmt: skip
    def test_that_are_wrong(self, data, urls, message):
        given = urls.format(data) if isinstance(urls, str) else [url.format(data) for url in urls]
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
            tar_shards(given)
        assert str(caught.value).startswith(message.format(data))

    def test_with_a_secret_are_the_stores_error(self):
        with pytest.raises(StorageError, match="must not hold a password"):
            tar_shards("sftp://me:secret@host/data/a-{0..3}.tar")

    @pytest.mark.parametrize(
        "text",
        [
            "a", "{0..3}", "x{000..011}y", "{8..11}", "{08..11}", "{3..0}", "{0..10..3}", "{10..0..4}", "{a,b}", "{a,}",
            "{a,{0..2},c{d,e}}f", "{0..1}{x,y}-{00..01}", "p{q{1..2}r,s}t",
        ],
    )  # fmt: skip
    def test_braces_stand_for_what_webdataset_takes_them_for(self, text):
        assert expand_braces(text) == list(braceexpand.braceexpand(text))


class TestSplit:
    def test_splits_share_no_sample_and_have_all(self, tmp_path):
        write_shards(tmp_path / "data", num_shards=10, per_shard=20)
        everything, train, val = (tar_shards(str(tmp_path / "data"), split) for split in (None, "train", "val"))
        contents = [set(dataset.fetch(range(len(dataset)))) for dataset in (everything, train, val)]
        assert contents[1] | contents[2] == contents[0]
        assert (len(train) + len(val), len(everything)) == (200, 200)
        assert 8 <= len(val) <= 35
        assert train.classes == val.classes

    def test_more_shards_move_no_sample(self, tmp_path):
        for shards in (4, 8):
            write_shards(tmp_path / str(shards), num_shards=shards, per_shard=10)
        few, many = (tar_shards(str(tmp_path / shards), "val", val_fraction=0.3) for shards in "48")
        assert many.fetch(range(len(few))) == few.fetch(range(len(few)))
        assert len(many) > len(few)

    def test_other_urls_move_no_sample(self, tmp_path):
        """They change the folder that all have in common, and so the names of the samples."""
        for folder, num_shards in (("own", 2), ("other", 4)):
            write_shards(tmp_path / folder, num_shards=num_shards, per_shard=20)
        alone = tar_shards(str(tmp_path / "own"), "val", val_fraction=0.3)
        both = [str(tmp_path / folder) for folder in ("own", "other")]
        beside, train = tar_shards(both, "val", val_fraction=0.3), tar_shards(both, "train", val_fraction=0.3)
        assert alone.index.url_of(alone.numbers[0]) == beside.index.url_of(beside.numbers[0])
        urls = [{each.index.url_of(number) for number in each.numbers} for each in (alone, beside, train)]
        assert urls[0] == {url for url in urls[1] if url.startswith(f"{tmp_path}/own/")}
        assert not urls[0] & urls[2]

    def test_one_that_is_empty_is_an_error(self, tmp_path):
        write_shards(tmp_path / "data", num_shards=1, per_shard=1)
        with pytest.raises(
            ValueError, match=r"data: none of its 1 samples is drawn for split=\w+; change val_fraction"
        ):
            [tar_shards(str(tmp_path / "data"), split) for split in ("train", "val")]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "test"}, "split must be train or val, got 'test'"),
            ({"val_fraction": 0}, "val_fraction must lie between 0 and 1, got 0; write a share such as 0.1"),
            ({"mean": [0.5]}, "mean must hold a finite number for each of 3 channels, got [0.5]"),
            ({"image": ""}, "image must name extensions, got ''; write jpg, or jpg;png"),
            ({"image": ["jpg"]}, "image must name extensions, got ['jpg']; write jpg, or jpg;png"),
            ({"targets": "x"}, "targets must be a list of keys, got 'x'; write [x]"),
            ({"targets": ["x"], "label": "y"}, "targets must stand without label and classes; remove one or the other"),
            ({"targets": ["x"], "classes": 3}, "targets must stand without label and classes; remove one or the other"),
            ({"classes": 0}, "classes must be a list of names or their number, got 0; write [cat, dog] or 1000"),
            ({"classes": []}, "classes must be a list of names or their number, got []; write [cat, dog] or 1000"),
            ({"classes": "cat"}, "classes must be a list of names or their number, got 'cat'; write [cat, dog] or "),
            ({"classes": [1, 2]}, "classes must be a list of names or their number, got [1, 2]; write [cat, dog] or "),
            ({"classes": ["a", "b", "a"]}, "classes must name each class once, got 'a' twice; remove one"),
        ],
    )  # fmt: skip
    def test_wrong_arguments(self, tmp_path, arguments, message):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
            tar_shards(str(tmp_path), **arguments)
        assert str(caught.value).startswith(message)
