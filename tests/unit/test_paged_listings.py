"""Listings of S3, page by page, from a server that lists more keys than a test could write."""

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.errors import StorageError
from cluster.storage import s3
from cluster.storage.file_systems import file_system_class
from cluster.storage.store import Store
from jobs.data import image_folder, parquet_images, tar_shards
from jobs.images.folders.image_folders import _build
from jobs.images.indexing.index import IndexBuilder, Source
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from tests.listed_bucket import BUCKET, ENVIRONMENT, ListedBucket

ROOT = f"s3://{BUCKET}/images"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], ListedBucket]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(s3, "_NAMES_OF_PAGE", 100)
    use_index_files(IndexFiles())
    with ExitStack() as servers:

        def serve(keys: list[str]) -> ListedBucket:
            server = servers.enter_context(ListedBucket(sorted(keys)).serving())
            for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
                monkeypatch.setenv(name, value)
            file_system_class("s3", "").clear_instance_cache()
            return server

        yield serve
    file_system_class("s3", "").clear_instance_cache()
    use_index_files(IndexFiles())


def pages_of(server: ListedBucket) -> Counter[str]:
    """How often each folder was asked for."""
    return Counter(query["prefix"] for query in server.asked)


def test_an_index_has_the_order_of_classes_and_names_whatever_the_pages_are(bucket) -> None:
    flat = [f"a/{number:04d}.jpg" for number in range(1_234)]
    # "a-b" sorts behind "a", but "a-b/" before "a/".
    deep = [f"a-b/{folder}/{number}.png" for folder in ("x", "y y", "z") for number in range(150)]
    small = [f"c{number:03d}/1.jpg" for number in range(250)]
    server = bucket([f"images/{name}" for name in [*flat, *deep, *small, "a/notes.txt", "a/"]])

    dataset = image_folder(ROOT)

    index = dataset.index
    assert dataset.classes == ("a", "a-b", *(f"c{number:03d}" for number in range(250)))
    assert [index.place(number).object for number in range(len(index))] == [*flat, *sorted(deep), *small]
    assert dataset.targets.tolist() == [0] * 1_234 + [1] * 450 + list(range(2, 252))
    assert {index.place(number).size for number in range(len(index))} == {3}
    versions = index.objects["version"].to_pylist()
    assert len(set(versions)) == len(index)
    assert versions == [
        f'"{server.keys.index(f"images/{name}"):032x}"'.encode() for name in [*flat, *sorted(deep), *small]
    ]
    assert index.passed_over == {"no image file": (1, "a/notes.txt")}
    asked = pages_of(server)
    assert (asked["images/"], asked["images/a/"], asked["images/a-b/y y/"], asked["images/c007/"]) == (3, 13, 2, 1)


def test_a_page_that_fails_is_asked_for_again_and_no_other(bucket) -> None:
    server = bucket([f"images/a/{number:04d}.jpg" for number in range(950)])
    names = list[str]()
    for number, (folder, page) in enumerate(Store(ROOT).pages(["a"])):
        names += [each.name for each in page.objects]
        assert folder == "a"
        if number == 3:
            server.busy = 2
    assert names == [f"{number:04d}.jpg" for number in range(950)]
    assert len(server.asked) == 10 + 2
    times_asked = Counter(query.get("continuation-token") for query in server.asked)
    assert sorted(times_asked.values()) == [1] * 9 + [3]


def test_a_store_that_fails_in_the_middle_is_named_with_the_folder(bucket) -> None:
    server = bucket([f"images/a/{number:04d}.jpg" for number in range(950)])
    pages = Store(ROOT, patience_s=0).pages(["a"])
    next(pages)
    server.busy = 100
    with pytest.raises(StorageError, match=f"^{ROOT}: cannot list a: .*; check the URL"):
        list(pages)


def test_no_more_pages_are_in_memory_than_are_asked_for_at_once(bucket) -> None:
    at_once = Store(ROOT).max_requests
    server = bucket([f"images/{number // 150:03d}/{number:05d}.jpg" for number in range(15_000)])
    pages = Store(ROOT).pages(f"{number:03d}" for number in range(100))
    for taken in range(1, 60):
        next(pages)
        assert len(server.asked) < taken + at_once + 1


def test_a_large_folder_takes_the_memory_of_its_index(bucket) -> None:
    beside = {}
    for num_images in (4_000, 12_000):
        bucket([f"images/a/{number:06d}.jpg" for number in range(num_images)])
        builder = IndexBuilder(Source("image_folder", ROOT))
        list(Store(ROOT).pages(["nowhere"]))  # has opened what a process needs once
        tracemalloc.start()
        _build([], Store(ROOT), builder)
        stays, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        beside[builder.num_samples] = most - stays
    assert list(beside) == [4_000, 12_000]
    assert beside[12_000] < 1.5 * beside[4_000], "names of which an index is made, and pages"


@pytest.mark.parametrize(
    ("key", "open_it", "where"),
    [
        ("images/a//1.jpg", lambda: image_folder(ROOT), "images/a//"),
        ("images//a/1.jpg", lambda: image_folder(ROOT), "images//"),
        ("images/a/b//1.jpg", lambda: image_folder(ROOT), "images/a/b//"),
        ("images//1.tar", lambda: tar_shards(ROOT), "images//"),
        ("images/a//1.tar", lambda: tar_shards(f"{ROOT}/*/*.tar"), "images/a//"),
        ("images//1.parquet", lambda: parquet_images(ROOT), "images//"),
        ("images/a//1.parquet", lambda: parquet_images(f"{ROOT}/**/*.parquet"), "images/a//"),
    ],
)
def test_a_name_with_an_empty_part_is_refused(bucket, key, open_it, where) -> None:
    bucket([key, "images/a/2.jpg", "images/a/2.tar", "images/2.tar", "images/a/2.parquet"])
    with pytest.raises(ValueError, match=f"^s3://{BUCKET}/{where}: no name of an object may have an empty part; write"):
        open_it()
    assert "" not in Store(f"s3://{BUCKET}/images").folders()
