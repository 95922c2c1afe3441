"""Where processes get the index of their data from: the dry run makes it, workers take the run's."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ClusterError, DescriptionError, StorageError
from cluster.host import scratch
from cluster.process import host_cache
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from jobs.images.indexing.index import Index, IndexBuilder, Source
from jobs.images.indexing.index_files import IndexFiles, fetch_index, pack_index, unpack_index, use_index_files
from launcher.planning.built_index import built_indexes, digests_of
from launcher.runs import data_indexes
from launcher.runs.data_indexes import check_indexes, write_indexes

DAY_S = 24 * 3600.0
FILES = {f"{number:03d}.jpg": b"x" * number for number in range(200)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/launcher/indexes"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write(tmp_path / "images", FILES)


@pytest.fixture
def source(images: Path) -> Source:
    return Source("test", str(images))


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def build(store: Store, builder: IndexBuilder) -> None:
    builder.classes = ["a", "b"]
    objects = [each for _, page in store.pages([""]) for each in page.objects]
    objects.sort(key=lambda each: each.name)
    found = [each for each in objects if each.name.endswith(".jpg")]
    for each in objects:
        if each not in found:
            builder.pass_over("other file", each.name)
    names, sizes = [each.name for each in found], [each.size for each in found]
    builder.add_files(names, sizes, [""] * len(found), np.arange(len(found)) % 2)


def build_nothing(*_: object) -> None:
    raise AssertionError("a worker lists nothing")


def begun(source: Source, url: Path) -> tuple[RunDirectory, dict[str, str]]:
    """A run whose dry run has made an index, and what its tasks say of it; this host forgets it."""
    files, run = IndexFiles(), RunDirectory(str(url))
    index = files.open(source, build)
    built = built_indexes(files.opened)
    run.take_lease()
    write_indexes(run, built)
    index.path.unlink()
    return run, digests_of(built)


@pytest.fixture
def run(source: Source, tmp_path: Path) -> tuple[RunDirectory, dict[str, str]]:
    return begun(source, tmp_path / "run")


def test_a_worker_takes_the_one_of_the_run(run, source, cache) -> None:
    files = IndexFiles(*run)
    index = files.open(source, build_nothing)
    assert files.open(source, build_nothing) is index
    assert [index.place(number).object for number in range(len(index))] == [*FILES]
    assert os.listdir(cache) == [run[1][source.id]] == [index.digest]
    run[0].store.delete([f"indexes/{index.digest}.arrow.zst"])
    assert len(IndexFiles(*run).open(source, build_nothing)) == len(FILES), "this host has it"


@pytest.mark.usefixtures("run")
def test_it_is_written_once(source, tmp_path) -> None:
    (written,) = (tmp_path / "run/indexes").iterdir()
    before = written.stat()
    begun(source, tmp_path / "run")
    assert (written.stat().st_ino, written.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    written.write_bytes(b"torn")
    begun(source, tmp_path / "run")
    assert written.stat().st_size == before.st_size


def test_the_heartbeat_goes_on_while_a_large_one_is_written(run, source, monkeypatch) -> None:
    alive = threading.Event()
    monkeypatch.setattr(data_indexes, "STATUS_INTERVAL_S", 0.01)
    monkeypatch.setattr(run[0], "stay_alive", alive.set)
    monkeypatch.setattr(run[0], "write_index", lambda *_: alive.wait(60.0) or pytest.fail("no heartbeat"))
    files = IndexFiles()
    files.open(source, build)
    write_indexes(run[0], built_indexes(files.opened))
    assert alive.is_set()


def test_a_run_goes_on_with_the_same_samples_whatever_lies_beside_them(run, source, images) -> None:
    def check() -> None:
        files = IndexFiles()
        files.open(source, build)
        check_indexes(run[0], "job.yaml", built_indexes(files.opened))

    check()  # nothing is recorded, by an earlier version of the launcher
    for known in ({}, {"0" * 32: "1" * 32}, run[1]):  # sources that only one of them has are no difference
        run[0].write_environment({"attempts": [{}, {"indexes": known}]})
        check()
    (images / "Thumbs.db").touch()
    check()
    (images / "new.jpg").touch()
    with pytest.raises(DescriptionError) as raised:
        check()
    assert str(raised.value) == (
        f"job.yaml: data has changed since the run began: {images}: 1 sample added: new.jpg; restore it, or resume "
        "with --force"
    )


def test_what_the_dry_run_has_not_listed_is_an_error(run, tmp_path) -> None:
    other = Source("test", str(write(tmp_path / "others", FILES)))
    with pytest.raises(ClusterError, match="others: this host builds other data than the dry run") as raised:
        IndexFiles(*run).open(other, build)
    assert raised.value.cause == "environment"


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 1_000)])
def test_a_host_with_other_data_is_told_from_the_others(run, source, images, spoil: Callable[[Path], object]) -> None:
    spoil(images / "199.jpg")
    with pytest.raises(ClusterError, match=r"images/199.jpg: .* in the index of the run; give every node") as raised:
        IndexFiles(*run).open(source, build_nothing)
    assert (raised.value.cause, raised.value.step) == ("environment", 0)


def test_a_table_may_list_what_does_not_exist_but_not_only_that(images, tmp_path) -> None:
    """``data.on_bad_sample`` decides about those; a host that has none of the files lacks the data."""

    def build_table(_: Store, builder: IndexBuilder) -> None:
        builder.classes = ["a"]
        builder.add_files([*FILES], [-1] * len(FILES), [""] * len(FILES), [0] * len(FILES))

    (images / "000.jpg").unlink()
    made = IndexFiles()
    made.open(Source("table", str(images)), build_table)
    built = built_indexes(made.opened)
    run = RunDirectory(str(tmp_path / "run"))
    run.take_lease()
    write_indexes(run, built)
    assert len(IndexFiles(run, digests_of(built)).open(Source("table", str(images)), build_nothing)) == len(FILES)

    for name in FILES:
        (images / name).unlink(missing_ok=True)
    with pytest.raises(ClusterError, match="000.jpg: cannot be read on this host, No such file"):
        IndexFiles(run, digests_of(built)).open(Source("table", str(images)), build_nothing)


def test_the_index_of_other_data_is_refused(run, source, tmp_path) -> None:
    """Who can write to the store cannot direct reads elsewhere."""
    other = Source("test", str(write(tmp_path / "others", FILES)))
    with pytest.raises(StorageError, match=r"run: index \w+ of its data is one of .*/images, not of .*/others; resume"):
        IndexFiles(run[0], {other.id: run[1][source.id]}).open(other, build_nothing)


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_is_named(run, source, cache, tmp_path) -> None:
    digest = run[1][source.id]
    fetch_index(run[0], digest)
    for spoilt in (b"", b"ARROW1", (cache / digest).read_bytes()[:-100]):
        (cache / digest).write_bytes(spoilt)
        assert len(fetch_index(run[0], digest)) == len(FILES)
    whole = (cache / digest).read_bytes()
    (cache / digest).write_bytes(whole.replace(b"007.jpg", b"006.jpg", 1))
    assert fetch_index(run[0], digest).check()
    (cache / digest).unlink()
    original = tmp_path / f"run/indexes/{digest}.arrow.zst"
    content = original.read_bytes()
    for spoilt in (b"", content[:-100], b"x" * 100):
        original.write_bytes(spoilt)
        with pytest.raises(StorageError, match=f"index {digest} of its data is damaged, .*; delete it, and resume"):
            fetch_index(run[0], digest)
    with pytest.raises(ValueError, match="it is another one"):
        unpack_index(content, "0" * 32)
    (cache / digest).unlink()
    assert os.listdir(cache) == []
    with pytest.raises(StorageError, match="is no digest"):
        fetch_index(run[0], "../../../etc/passwd")


def test_an_index_that_another_host_may_have_mapped_is_never_replaced(source, cache) -> None:
    first = IndexFiles().open(source, build).path.stat()
    second = IndexFiles().open(source, build).path.stat()
    assert (first.st_ino, os.listdir(cache)) == (second.st_ino, [IndexFiles().open(source, build).digest])


def test_an_empty_one_travels_too(tmp_path) -> None:
    empty = IndexFiles().open(Source("test", str(tmp_path / "nothing")), build)
    packed = pack_index(empty)
    empty.path.unlink()
    assert len(unpack_index(packed, empty.digest)) == 0


def test_data_that_comes_with_the_code_is_the_same_in_every_process(tmp_path, monkeypatch) -> None:
    """Each has a copy of the code in a folder of its own."""
    opened = []
    for name in ("dry-run", "worker"):
        here = tmp_path / name
        write(here, {"labels.csv": b""})
        write(here / "images", FILES)
        monkeypatch.setattr(scratch, "_made", [here])
        monkeypatch.chdir(here)
        source = Source("test", str(here / "images"), {"table": f"{here}/labels.csv", "of": ["a", 1, None]})
        if not opened:
            run, known = begun(source, tmp_path / "run")
        opened.append(IndexFiles(run, known).open(source, build_nothing))
        assert opened[-1].url_of(7) == "images/007.jpg"
    assert (
        opened[0].source == opened[1].source == Source("test", "images", {"table": "labels.csv", "of": ["a", 1, None]})
    )


def test_what_killed_processes_leave_goes_and_what_nobody_uses(source, cache) -> None:
    script = (
        "from cluster.process.host_cache import HostCache as C; import os; path = C('indexes').unfinished('a' * 32);"
        "path.touch(); print(path, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout.strip()
    assert Path(killed).exists()
    index = IndexFiles().open(source, build)
    assert os.listdir(cache) == [index.digest]

    lock = cache.parent / "indexes-in-use" / index.digest
    os.utime(lock, (time.time() - 31 * DAY_S,) * 2)
    sweep = [sys.executable, "-c", "from cluster.process.host_cache import HostCache; HostCache('indexes').sweep()"]
    subprocess.run(sweep, check=True)
    assert index.path.exists(), "this process uses it"
    os.close(host_cache._held.pop(lock))
    subprocess.run(sweep, check=True)
    assert os.listdir(cache) == os.listdir(lock.parent) == []
    assert index.labels[7] == 1, "it stays in the memory of those that have it mapped"


def test_in_a_process_of_a_persons_own_data_that_changes_is_seen_after_a_minute(images, source) -> None:
    now = 100.0
    files = IndexFiles(listed_again_after_s=60.0, clock=lambda: now)
    first = files.open(source, build)
    (images / "200.jpg").write_bytes(b"1")
    now += 60.0
    assert files.open(source, build_nothing) is first, "another split, or the other dataset"
    now += 1.0
    assert (len(files.open(source, build)), len(first)) == (201, 200)
    now += 61.0
    other = Source("other", str(images))
    files.open(other, build)
    assert list(files.opened) == [other.id], "no index is kept for the life of the process"


def test_a_damaged_index_of_the_same_size_is_mended(run, source, tmp_path) -> None:
    run_directory, known = run
    name = f"indexes/{known[source.id]}.arrow.zst"
    whole = run_directory.store.read(name)
    run_directory.store.write(name, bytes([whole[0] ^ 1]) + whole[1:])
    run_directory.write_index(known[source.id], whole)
    assert run_directory.store.read(name) == whole
    before = (tmp_path / "run" / name).stat().st_ino
    run_directory.write_index(known[source.id], whole)
    assert (tmp_path / "run" / name).stat().st_ino == before, "it is written once"


def test_a_host_without_room_says_so(source, cache, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexBuilder, "write", fail)
    with pytest.raises(StorageError, match=r"indexes: cannot hold an index, .*No space left on device; make room"):
        IndexFiles().open(source, build)
    assert os.listdir(cache) == []


def test_a_process_is_told_where_from(run, source, monkeypatch) -> None:
    from jobs.images.indexing import index_files

    monkeypatch.setattr(index_files, "_files", IndexFiles())
    assert isinstance(index_files.open_index(source, build), Index)
    use_index_files(IndexFiles(run[0], {}))
    with pytest.raises(ClusterError, match="this host builds other data"):
        index_files.open_index(source, build)
