"""Image folders at URLs: which objects are images, in which order, and what their index costs."""

import hashlib
import pickle
import threading
import tracemalloc
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.storage.store import Store
from jobs.data import BadSample, image_folder
from jobs.images.folders.image_folders import _build
from jobs.images.indexing.index import IndexBuilder, Source
from tests.image_stores import GeneratedFileSystem, described, make_tree, upload
from tests.images import make_image_folder

pytestmark = pytest.mark.usefixtures("own_indexes")
fsspec.register_implementation("generated", GeneratedFileSystem)


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "store"])
def at(request: pytest.FixtureRequest, url: str) -> Any:
    """Returns where a folder can be listed: there, or on a store that has a copy of it."""
    return str if request.param == "local" else lambda folder: upload(folder, url).url


@pytest.mark.parametrize("split", ["train", "val", None])
def test_a_tree_is_the_same_on_a_store(tmp_path: Path, url: str, split: Any) -> None:
    root = make_tree(tmp_path / "root")
    upload(root, url)

    here, there = image_folder(root, split, val_fraction=0.4), image_folder(url, split, val_fraction=0.4)

    assert described(here) == described(there)
    assert here.index.passed_over == there.index.passed_over
    assert there.index.url_of(0) == f"{url}/class_000/image_0000.jpg"


def test_what_is_passed_over_is_counted_by_reason(tmp_path: Path, at: Any) -> None:
    root = make_tree(tmp_path / "root")
    (root / "stray.png").touch()

    dataset = image_folder(at(root), exclude=["class_002"])

    assert dataset.classes == ("class_000", "class_001")
    assert dataset.index.passed_over == {
        "hidden": (6, "._x.png"),
        "left by a system or tool": (3, "__MACOSX"),
        "no image file": (2, "class_000/notes.txt"),
        "outside the class folders": (2, "notes.txt"),
        "excluded": (1, "class_002"),
    }


def test_train_and_val_share_one_index(tmp_path: Path, at: Any) -> None:
    where = at(make_image_folder(tmp_path / "root", num_classes=3, per_class=40, size=8))

    train, val, other = (
        image_folder(where, "train"),
        image_folder(where, "val"),
        image_folder(where, "val", exclude=["x"]),
    )

    assert train.index is val.index
    assert len(train) + len(val) == len(train.index) == 120
    assert other.index is not val.index


def test_the_split_is_by_the_digest_of_a_name(tmp_path: Path, at: Any) -> None:
    dataset = image_folder(at(make_image_folder(tmp_path / "root", 3, 40, size=8)), "val", val_fraction=0.3)

    names = [f"class_{label:03d}/image_{number:04d}.jpg" for label in range(3) for number in range(40)]
    firsts = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in names]
    expected = [number for number, first in enumerate(firsts) if first < 0.3 * 2**64]
    assert dataset._chosen_N is not None
    assert list(dataset._chosen_N) == expected


def test_folders_named_train_and_val_are_the_splits(tmp_path: Path, at: Any) -> None:
    make_image_folder(tmp_path / "root" / "train", num_classes=3, per_class=4, size=8)
    make_image_folder(tmp_path / "root" / "val", num_classes=3, per_class=2, size=8, seed=1)
    (tmp_path / "root" / "val" / "class_001" / "image_0000.jpg").unlink()
    (tmp_path / "root" / "val" / "class_001" / "image_0001.jpg").unlink()
    where = at(tmp_path / "root")

    train, val = image_folder(where, "train", num_classes=3), image_folder(where, "val", num_classes=3)

    assert train.index is val.index
    assert train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert val.targets.tolist() == [0, 0, 2, 2]
    assert val.index.url_of(12) == f"{where}/val/class_000/image_0000.jpg"
    alone = image_folder(tmp_path / "root" / "val", exclude=["class_001"])
    assert [val[number][0].tolist() for number in range(4)] == [image_CHW.tolist() for image_CHW, _ in list(alone)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": "nowhere"}, "root must be a folder that holds a folder per class, got '{at}/nowhere'; it does not"),
        ({"root": "root/class_000"}, "{at}/root/class_000 must hold a folder of images per class, got no folder; name"),
        ({"root": "hollow"}, "{at}/hollow/a must hold images, got none; add some, or name it in exclude"),
        ({"root": "root", "num_classes": 101}, "{at}/root must hold num_classes=101 classes, got 2; set num_classes"),
        (
            {"root": "root", "split": "val", "val_fraction": 1e-9},
            "{at}/root: none of its 4 samples is drawn for split=",
        ),
        ({"root": "divided"}, "split must be train or val, got None; {at}/divided holds both as folders"),
        ({"root": "divided", "split": "val"}, "{at}/divided/val must hold classes of train/ only, got class_001; move"),
        ({"root": "misnamed"}, "{at}/misnamed must hold train/ and val/, or a folder per class, got Val, train; "),
        ({"root": "unfinished", "split": "train"}, "{at}/unfinished/train/a must hold images, got none; add some, or"),
        ({"root": "unfinished", "split": "val"}, "{at}/unfinished/val must hold images, got none; add some"),
        ({"root": "odd"}, "{at}/odd must hold names without control characters, got 'a/b\\nc.png'; rename it"),
    ],
)
def test_errors_are_the_same_on_a_store(tmp_path: Path, at: Any, arguments: dict[str, Any], message: str) -> None:
    make_image_folder(tmp_path / "root", num_classes=2, per_class=2, size=8)
    make_image_folder(tmp_path / "divided" / "train", num_classes=1, per_class=1, size=8)
    make_image_folder(tmp_path / "divided" / "val", num_classes=2, per_class=1, size=8)
    make_image_folder(tmp_path / "misnamed" / "train", num_classes=1, per_class=1, size=8)
    make_image_folder(tmp_path / "misnamed" / "Val", num_classes=1, per_class=1, size=8)
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    (tmp_path / "hollow" / "a" / "notes.txt").touch()
    for name in ("train/a/notes.txt", "train/b/image.png", "val/notes.txt"):
        (tmp_path / "unfinished" / name).parent.mkdir(parents=True)
        (tmp_path / "unfinished" / name).touch()
    (tmp_path / "odd" / "a").mkdir(parents=True)
    where = at(tmp_path)
    if where == str(tmp_path):
        (tmp_path / "odd" / "a" / "b\nc.png").touch()
    else:
        MemoryFileSystem().pipe_file(f"{where}/odd/a/b\nc.png", b"")  # by another tool

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        image_folder(**{**arguments, "root": f"{where}/{arguments['root']}"})
    assert str(caught.value).startswith(message.format(at=where))
    assert "\n" not in str(caught.value)


def test_classes_of_val_alone_do_not_hinder_training(tmp_path: Path, at: Any) -> None:
    make_image_folder(tmp_path / "root" / "train", num_classes=2, per_class=2, size=8)
    make_image_folder(tmp_path / "root" / "val", num_classes=4, per_class=1, size=8)

    train = image_folder(where := at(tmp_path / "root"), "train")

    assert (len(train), train.classes) == (4, ("class_000", "class_001"))
    with pytest.raises(ValueError, match=r"val must hold classes of train/ only, got class_002, class_003; move"):
        image_folder(where, "val")


def test_a_file_that_has_changed_or_vanished_is_named(tmp_path: Path, at: Any) -> None:
    root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2, size=8)
    store = Store(at(root))
    dataset = image_folder(store.url)
    size = len(store.read("class_000/image_0000.jpg"))
    store.write("class_000/image_0000.jpg", b"123")
    store.delete(["class_001/image_0001.jpg"])

    with pytest.raises(BadSample) as changed:
        dataset[0]
    with pytest.raises(BadSample) as gone:
        dataset[3]

    url = f"{store.url}/class_000/image_0000.jpg"
    assert str(changed.value) == f"{url}: had {size} bytes when it was listed, has 3 now; restore it"
    assert str(gone.value) == f"{store.url}/class_001/image_0001.jpg: is gone; restore it"
    assert len(dataset.fetch([1, 2])) == 2


def test_folders_are_listed_at_once_and_classes_keep_their_order(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    at_once, classes = store.max_requests, [f"{number:03d}" for number in range(2 * store.max_requests + 3)]
    for name in classes:
        store.write(f"{name}/inner/{name}.png", b"")
    together, lock, running, most = threading.Barrier(at_once), threading.Lock(), 0, 0
    ls = MemoryFileSystem.ls

    def listed(fs: MemoryFileSystem, path: str, **options: Any) -> list[Any]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            if path.endswith(tuple(f"/{name}" for name in classes[:at_once])):
                together.wait(60)  # none goes on before all are in flight
            found: list[Any] = ls(fs, path, **options)
            return found
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(MemoryFileSystem, "ls", listed)
    dataset = image_folder(url)

    assert most == at_once
    assert dataset.classes == tuple(classes)
    assert [dataset.index.place(number).object for number in range(len(dataset))] == [
        f"{name}/inner/{name}.png" for name in classes
    ]


def test_a_listing_holds_few_names_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays for each sample is a row of the index: 175 bytes here, of which the name and the ETag are 77."""
    monkeypatch.setattr(GeneratedFileSystem, "images", 50)
    monkeypatch.setattr(GeneratedFileSystem, "inner", 2)
    beside = {}
    for num_classes in (40, 2_000):
        monkeypatch.setattr(GeneratedFileSystem, "classes", num_classes)
        builder, arrays = IndexBuilder(Source("image_folder", "generated://root")), pa.total_allocated_bytes()
        tracemalloc.start()
        _build([], Store("generated://root"), builder)
        stays, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        beside[builder.num_samples] = most - stays
        row = (stays + pa.total_allocated_bytes() - arrays) / builder.num_samples

    assert list(beside) == [4_000, 200_000]
    assert row < 200
    unsorted = 3 * 8 * 200_000  # sizes, draws and labels, which the sorted ones replace
    assert beside[200_000] - unsorted < 2 * beside[4_000] < 6e6, "the names of 32 pages and of 4,096 images"


def test_a_pickle_does_not_grow_with_the_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GeneratedFileSystem, "classes", 1_000)
    monkeypatch.setattr(GeneratedFileSystem, "images", 20)

    everything, val = image_folder("generated://many"), image_folder("generated://many", "val")

    assert len(everything) == 20_000
    assert len(pickle.dumps(everything)) < 2_000
    assert len(pickle.dumps(val)) < 2_000 + 8 * len(val)
    twin = pickle.loads(pickle.dumps(val))  # noqa: S301
    assert (twin.classes, twin.targets.tolist()) == (val.classes, val.targets.tolist())
