"""Image folders on real servers, beside the same tree on this machine."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.storage import s3 as pages
from cluster.storage.file_systems import file_system_class
from cluster.storage.store import Store
from jobs.data import BadSample, image_folder
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from tests.image_stores import described, make_tree, upload
from tests.images import make_image_folder


@pytest.fixture(params=["s3", "ssh"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place on a server where nothing is yet."""
    server = request.getfixturevalue(request.param)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    for name, value in {**server.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    _forget()
    base = f"s3://{server.bucket}" if request.param == "s3" else f"sftp://127.0.0.1:{server.port}{server.folder}"
    yield f"{base}/{tmp_path.parent.name}/{tmp_path.name}"
    _forget()


def _forget() -> None:
    use_index_files(IndexFiles())
    for protocol in ("s3", "sftp"):
        file_system_class(protocol, "").clear_instance_cache()


@pytest.mark.parametrize("split", ["train", None])
def test_a_tree_is_the_same_on_a_server(tmp_path: Path, url: str, split: Any) -> None:
    root = make_tree(tmp_path / "root")
    upload(root, url)

    here, there = image_folder(root, split, val_fraction=0.4), image_folder(f"{url}/", split, val_fraction=0.4)

    assert described(here) == described(there)
    assert here.index.passed_over == there.index.passed_over
    assert [here.index.place(number) for number in range(19)] == [there.index.place(number) for number in range(19)]
    assert there.fetch(range(len(there))) == here.fetch(range(len(here)))


def test_folders_named_train_and_val_are_the_splits(tmp_path: Path, url: str) -> None:
    make_image_folder(tmp_path / "root" / "train", num_classes=3, per_class=3, size=8)
    make_image_folder(tmp_path / "root" / "val", num_classes=3, per_class=2, size=8, seed=1)
    upload(tmp_path / "root", url)

    for split in ("train", "val"):
        here, there = image_folder(tmp_path / "root", split), image_folder(url, split)
        assert described(here) == described(there)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_thousands_of_objects_over_many_pages(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_NAMES_OF_PAGE", 100)
    flat = [f"a b/{number:05d}.jpg" for number in range(3_500)]
    small = [f"class {name:03d}/{number}/x.png" for name in range(250) for number in range(6)]
    store = Store(url)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(store.write, [*flat, *small], itertools.repeat(b"123")))

    index = image_folder(url).index

    assert [index.place(number).object for number in range(len(index))] == [*flat, *small]
    assert set(index.objects["size"].to_pylist()) == {3}
    assert store.names() == [*flat, *small]


def test_a_changed_object_is_seen_when_it_is_listed_or_read(tmp_path: Path, url: str) -> None:
    store = upload(make_image_folder(tmp_path / "root", num_classes=2, per_class=2, size=8), url)
    before = image_folder(url)
    other = store.read("class_001/image_0001.jpg")
    store.write("class_000/image_0000.jpg", other[:-1])
    store.delete(["class_001/image_0001.jpg"])

    with pytest.raises(BadSample, match=r"class_000/image_0000\.jpg: had \d+ bytes when it was listed, has \d+ now"):
        before[0]
    with pytest.raises(BadSample, match=r"class_001/image_0001\.jpg: is gone; restore it$"):
        before[3]
    use_index_files(IndexFiles())
    after = image_folder(url)
    assert (len(before), len(after)) == (4, 3)
    if url.startswith("s3://"):
        first, then = (dataset.index.objects["version"].to_pylist() for dataset in (before, after))
        assert (first[0] != then[0], first[1:3]) == (True, then[1:])


def test_a_place_without_a_folder_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="^root must be a folder that holds a folder per class, got '.*'; it does not"):
        image_folder(Store(url).url)
