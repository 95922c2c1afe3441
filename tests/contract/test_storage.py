"""What the rest of the program relies on, of every store alike."""

import contextlib
import errno
import itertools
import os
import pickle
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import fsspec
import paramiko
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.errors import StorageError
from cluster.storage import retrying_calls
from cluster.storage.deadline import OverrunError, Started, in_seconds, result_within
from cluster.storage.file_systems import file_system_class
from cluster.storage.local import SyncedLocalFileSystem
from cluster.storage.retrying_calls import Trouble
from cluster.storage.store import ByteRange, MissingObject, Store
from cluster.storage.stored_objects import StoredObject
from tests import stores
from tests.stores import Proxy, SSHServer

NAMES = ["with space/and more", "ünï/çödé-数", "plus+and%20percent", "hash#and&more=1"]


def listing(store: Store, folder: str = "") -> tuple[list[str], list[StoredObject]]:
    """The folders and the objects of all pages of a folder, by name."""
    pages = [page for _, page in store.pages([folder])]
    folders = sorted(name for page in pages for name in page.folders)
    return folders, sorted((each for page in pages for each in page.objects), key=lambda each: each.name)


class StoreContract:
    """A subclass gives the fixture ``url``: a place where nothing is yet."""

    forgets_empty_folders = True
    tells_versions = False

    @pytest.fixture
    def store(self, url: str) -> Store:
        return Store(url)

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "byte", "megabyte"])
    def test_an_object_is_read_as_it_was_written(self, store, data):
        store.write("a/b/c.bin", data)
        assert store.read("a/b/c.bin") == data

    @pytest.mark.parametrize("name", NAMES)
    def test_a_name_is_any_text(self, store, name):
        store.write(name, b"1")
        assert store.read(name) == b"1"
        assert store.names() == [name]
        store.delete([name])
        assert not store.exists(name)

    def test_a_part_of_a_buffer_is_written_as_it_was_at_the_call(self, store):
        buffer = bytearray(range(256)) * 4000
        store.write("a", memoryview(buffer)[1000:900_000])
        expected = bytes(buffer[1000:900_000])
        buffer[:] = bytes(len(buffer))
        assert store.read("a") == expected

    def test_many_threads_use_one_store(self, url):
        store = Store(url, patience_s=0)  # without a second try
        contents = {f"part-{number % 3}/{number}": os.urandom(200_000) for number in range(24)}
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(store.write, contents, contents.values()))
            assert dict(zip(contents, threads.map(store.read, contents))) == contents
        assert store.names() == sorted(contents)

    def test_many_threads_make_one_folder(self, url):
        store = Store(url, patience_s=0)
        together = threading.Barrier(8)

        def write(number: int) -> None:
            for folder in range(5):
                together.wait(5)
                store.write(f"{folder}/a/b/{number}", b"1")

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(write, range(8)))
        assert len(store.names()) == 40

    def test_the_last_write_of_a_name_counts(self, store):
        store.write("a", b"first and longer")
        store.write("a", b"second")
        assert store.read("a") == b"second"

    @pytest.mark.parametrize("name", ["a", "folder/a", "folder", "present/below"])
    def test_what_is_not_there_is_missing(self, store, name):
        store.write("present", b"1")
        store.write("folder/other", b"1")
        assert not store.exists(name)
        with pytest.raises(MissingObject) as caught:
            store.read(name)
        assert str(caught.value).startswith(f"{store.url}: ")

    def test_a_fingerprint_changes_with_the_content(self, store):
        for name, content in (("a", b"1"), ("below/b", b"2")):
            store.write(name, content)
        before = store.fingerprints(["below/b", "a", "c"])
        assert store.fingerprints(["below/b", "a", "c"]) == before
        assert (all(before[:2]), before[2]) == (True, "")
        store.write("a", b"10")
        after = store.fingerprints(["below/b", "a"])
        assert (after[0], after[1] == before[1]) == (before[0], False)

    def test_existence_follows_write_and_delete(self, store):
        assert not store.exists("a/b")
        store.write("a/b", b"1")
        assert store.exists("a/b")
        store.delete(["a/b"])
        assert not store.exists("a/b")

    def test_names_are_relative_sorted_and_at_any_depth(self, store):
        for name in ["b", "a/2", "a/1", "a/b/c", "ab/x"]:
            store.write(name, b"1")
        assert store.names() == ["a/1", "a/2", "a/b/c", "ab/x", "b"]
        assert store.names("a") == store.names("a/") == ["a/1", "a/2", "a/b/c"]
        assert store.names("a/b") == ["a/b/c"]

    def test_nothing_is_listed_where_nothing_is(self, store):
        assert store.names() == store.folders() == store.names("nowhere") == []

    def test_an_object_is_no_folder(self, store):
        store.write("a", b"1")
        assert store.names("a") == []
        assert store.at("a").names() == store.at("a").folders() == []

    def test_folders_are_the_direct_ones(self, store):
        for name in ["b/x", "a/b/c", "file"]:
            store.write(name, b"1")
        assert store.folders() == ["a", "b"]

    def test_a_listing_has_the_folders_and_the_objects_of_one_folder_with_their_sizes(self, store):
        for name, size in {"b": 3, "a/2": 70_000, "a/1": 0, "a/b/c": 1, "ab/x": 1, "a/.hidden": 2}.items():
            store.write(name, bytes(size))
        folders, objects = listing(store)
        assert (folders, [(each.name, each.size) for each in objects]) == (["a", "ab"], [("b", 3)])
        folders, objects = listing(store, "a")
        assert folders == ["b"]
        assert [(each.name, each.size) for each in objects] == [(".hidden", 2), ("1", 0), ("2", 70_000)]

    def test_a_listing_of_what_is_no_folder_is_empty(self, store):
        store.write("a/b", b"1")
        assert listing(store, "nowhere") == listing(store, "a/nowhere") == listing(store, "a/b") == ([], [])
        assert listing(Store(f"{store.url}/nowhere")) == ([], [])

    def test_a_version_changes_with_the_content_if_the_store_has_one(self, store):
        store.write("a", b"old")
        store.write("b", b"old")
        before, other = listing(store)[1]
        store.write("a", b"new")
        after, _ = listing(store)[1]
        assert bool(before.version) == self.tells_versions
        assert (before.version != after.version) == self.tells_versions
        assert listing(store)[1] == [after, other]

    def test_many_folders_are_listed_together_each_with_its_name(self, store):
        names = [f"{number:02d}" for number in range(40)]
        for name in names:
            store.write(f"folder {name}/{name}.png", b"1")
        asked = [f"folder {name}" for name in reversed(names)]
        found = dict(store.pages([*asked, "nowhere"]))
        assert list(found) == [*asked, "nowhere"]
        assert [[each.name for each in page.objects] for page in found.values()] == [
            [f"{n}.png"] for n in names[::-1]
        ] + [[]]
        assert list(store.pages([])) == []

    def test_an_object_is_looked_up_as_its_folder_lists_it(self, store):
        store.write("a/b c", b"123")
        assert [store.look_up("a/b c")] == listing(store, "a")[1]
        assert [store.look_up(name) for name in ("a", "a/d", "b")] == [None] * 3

    @pytest.mark.parametrize("name", NAMES)
    def test_a_name_of_a_listing_is_any_text(self, store, name):
        store.write(f"{name}/{name}", b"123")
        folder, _, rest = f"{name}/{name}".partition("/")
        for part in rest.split("/"):
            folders, objects = listing(store, folder)
            assert [*folders, *(each.name for each in objects)] == [part]
            folder = f"{folder}/{part}"
        assert list(store.read_ranges([ByteRange(folder, 1, 1)])) == [b"2"]

    @pytest.mark.parametrize(
        ("offset", "size", "expected"),
        [
            (0, None, b"0123456789"),
            (3, None, b"3456789"),
            (0, 4, b"0123"),
            (3, 4, b"3456"),
            (9, 1, b"9"),
            (3, 0, b""),
            (8, 10, b"89"),
            (0, 100, b"0123456789"),
            (10, None, b""),
            (10, 5, b""),
            (100, 5, b""),
            (100, 0, b""),
        ],
    )
    def test_a_range_is_what_the_object_has_of_it(self, store, offset, size, expected):
        store.write("a", b"0123456789")
        assert list(store.read_ranges([ByteRange("a", offset, size)])) == [expected]

    @pytest.mark.parametrize(("offset", "size"), [(0, None), (0, 1), (5, 5), (1, None), (0, 0)])
    def test_an_empty_object_has_nothing_of_any_range(self, store, offset, size):
        store.write("a", b"")
        assert list(store.read_ranges([ByteRange("a", offset, size)])) == [b""]

    @pytest.mark.parametrize(("offset", "size"), [(0, None), (0, 1), (5, 5), (1, None), (0, 0)])
    @pytest.mark.parametrize("name", ["a", "folder", "folder/a", "present/below"])
    def test_a_range_of_what_is_not_there_is_an_error_in_its_place(self, store, name, offset, size):
        store.write("present", b"1")
        store.write("folder/other", b"1")
        whole, missing, part = store.read_ranges(
            [ByteRange("present"), ByteRange(name, offset, size), ByteRange("folder/other", 0, 1)]
        )
        assert (whole, part) == (b"1", b"1")
        assert isinstance(missing, MissingObject)
        assert str(missing) == f"{store.url}: holds no {name}; restore it, or take it out of the data"

    def test_a_hundred_ranges_come_in_the_order_in_which_they_are_asked_for(self, url):
        store = Store(url, patience_s=0)  # without a second try
        data = {name: os.urandom(500_000) for name in ("a", "b/c")}
        for name, content in data.items():
            store.write(name, content)
        ranges = [ByteRange(("a", "b/c")[number % 2], 4_900 * (99 - number), 9_000) for number in range(100)]
        expected = [data[each.name][each.offset :][: each.size] for each in ranges]
        assert list(store.read_ranges(ranges)) == expected

    def test_a_range_of_a_large_object_is_whole(self, store):
        data = os.urandom(3_000_000)
        store.write("a", data)
        assert list(store.read_ranges([ByteRange("a", 100_001, 2_500_000)])) == [data[100_001:2_600_001]]

    def test_a_listing_shows_what_another_store_object_wrote(self, store, url):
        assert store.names() == []
        Store(url).write("a", b"1")
        assert store.names() == ["a"]
        assert store.exists("a")

    def test_deleting_takes_what_is_named_and_minds_nothing_missing(self, store):
        for name in ["a/1", "a/2", "b"]:
            store.write(name, b"1")
        store.delete(["a/1", "missing", "no/where", "b"])
        assert store.names() == ["a/2"]
        store.delete(store.names())
        assert store.names() == []
        assert store.folders() == [] or not self.forgets_empty_folders

    def test_many_are_deleted_at_a_time(self, store):
        names = [f"a/{number}" for number in range(20)]
        for name in [*names, "b"]:
            store.write(name, b"1")
        store.delete([*names, "missing"], at_once=8)
        assert store.names() == ["b"]
        assert store.folders() == [] or not self.forgets_empty_folders

    def test_a_child_is_a_folder(self, store):
        store.at("run", "logs").write("x", b"1")
        assert store.names() == ["run/logs/x"]
        assert store.at("run/logs").url == f"{store.url}/run/logs"

    @pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "a//b", "a/", ".", "a\nb"])
    def test_no_name_leads_out_of_the_store(self, store, name):
        for call in (
            store.read,
            store.exists,
            store.at,
            lambda name: store.write(name, b""),
            lambda name: store.delete([name]),
            lambda name: store.delete([name], at_once=8),
            lambda name: list(store.read_ranges([ByteRange(name)])),
            lambda name: list(store.pages([name])),
        ):
            with pytest.raises(StorageError, match="is no name of an object"):
                call(name)

    def test_a_pickle_is_the_url_and_the_patience(self, url):
        store = Store(url, patience_s=7.0, most_s=9.0)
        twin = pickle.loads(pickle.dumps(store.at("x")))  # noqa: S301
        assert (twin.url, twin.patience_s) == (f"{store.url}/x", 7.0)
        assert store.__reduce__() == (Store, (store.url, 7.0, 9.0))

    def test_the_canonical_url_leads_to_the_same_place(self, store, url):
        store.write("a", b"1")
        assert Store(store.url).read("a") == b"1"
        assert Store(f"{url}/").url == store.url

    def test_a_probe_leaves_no_folder(self, store):
        store.write("x", b"")
        store.at("a", "b").probe()
        assert store.names() == ["x"]
        assert store.folders() == [] or not self.forgets_empty_folders

    def test_a_probe_leaves_nothing(self, store):
        store.probe()
        assert store.names() == []

    def test_a_forked_child_can_use_the_store(self, store):
        store.write("a", b"1")
        child = os.fork()
        if child == 0:
            os._exit(0 if store.read("a") == b"1" else 1)
        assert os.waitpid(child, 0)[1] == 0
        # And what the child did to its copies of connections is not the parent's: no second try is needed.
        assert Store(store.url, patience_s=0).read("a") == b"1"


class SharedStoreContract(StoreContract):
    def test_processes_see_each_others_objects(self, store, tmp_path):
        store.write("a", b"from the parent")
        assert store.is_shared
        assert (store.names(), store.folders(), store.exists("b/c")) == (["a"], [], False)
        program = f"""
import pickle
store = pickle.loads({pickle.dumps(store)!r})
print(store.read("a").decode())
store.write("b/c", b"from the child")
"""
        child = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert child.stdout == "from the parent\n", child.stderr
        assert (store.exists("b/c"), store.folders(), store.names()) == (True, ["b"], ["a", "b/c"])
        assert store.read("b/c") == b"from the child"


class LocalStoreContract(SharedStoreContract):
    @pytest.fixture
    def kill_writer(self, store):
        """A process that is killed when it has written an object, before that has its name."""

        def write_and_die(name: str, data: bytes) -> None:
            child = os.fork()
            if child == 0:
                os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                store.write(name, data)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

        return write_and_die

    def test_a_killed_writer_leaves_the_old_object_and_nothing_that_shows(self, store, kill_writer):
        store.write("folder/a", b"old")
        kill_writer("folder/a", b"new")
        kill_writer("b/c/d", b"new")
        assert (store.read("folder/a"), store.names()) == (b"old", ["folder/a"])
        store.sweep()
        assert files_in(store) == ["folder/a"]
        assert store.folders() == ["folder"]

    def test_what_a_killed_writer_has_left_keeps_no_folder(self, store, kill_writer):
        store.write("folder/a", b"old")
        kill_writer("folder/a", b"new")
        store.delete(["folder/a"])
        assert list(Path(store.url).iterdir()) == []

    def test_a_writer_whose_file_is_swept_away_writes_again(self, store, monkeypatch):
        store.write("a/b", b"old")
        replace, swept = os.replace, []

        def replace_late(*paths: str) -> None:
            if not swept:
                swept.extend(set(files_in(store)) - {"a/b"})
                Store(store.url).sweep()
            replace(*paths)

        monkeypatch.setattr(os, "replace", replace_late)
        store.write("a/b", b"new")
        assert len(swept) == 1
        assert (store.read("a/b"), files_in(store)) == (b"new", ["a/b"])

    def test_writers_of_one_name_and_its_readers_see_whole_objects(self, url):
        store = Store(url, patience_s=0)
        contents = [bytes([number]) * (number * 50_000) for number in range(1, 7)]
        store.write("a", contents[0])
        with ThreadPoolExecutor(len(contents) + 1) as threads:
            writing = [
                threads.submit(lambda data=data: [store.write("a", data) for _ in range(20)]) for data in contents
            ]
            reading = threads.submit(lambda: [store.read("a") for _ in range(60)])
            assert [len(future.result()) for future in writing] == [20] * len(contents)
        assert set(reading.result()) <= set(contents)
        assert files_in(store) == ["a"]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_failure_to_reach_the_disk_leaves_the_old_object(self, url, monkeypatch, number):
        """NFS and quotas tell only then that there is no room."""
        store = Store(url, patience_s=0)
        store.write("a", b"old")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", mock.Mock(side_effect=OSError(number, os.strerror(number))))
            for name in ("a", "b"):
                with pytest.raises(StorageError, match=f"cannot write {name}: {os.strerror(number)}"):
                    store.write(name, b"new")
        assert (store.read("a"), files_in(store)) == (b"old", ["a"])

    def test_an_object_is_synced_with_its_name(self, store, monkeypatch):
        """A folder that is not written through to the disk may have the old object again after a loss of power."""
        folder, seen = Path(store.url, "folder"), list[bytes]()

        def sync(descriptor: int) -> None:
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                seen.append(Path(folder, "a").read_bytes())

        monkeypatch.setattr(os, "fsync", sync)
        for data in (b"1", b"2"):
            store.write("folder/a", data)
        assert seen == [b"1", b"2"]

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
    def test_only_a_file_system_that_syncs_no_folders_need_not(self, url, monkeypatch, number):
        def sync(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", sync)
        store = Store(url, patience_s=0)
        fails = pytest.raises(StorageError, match=f"cannot write a: {os.strerror(errno.EIO)}")
        with contextlib.nullcontext() if number == errno.EINVAL else fails:
            store.write("a", b"1")
        assert files_in(store) == ["a"]

    def test_the_url_is_an_absolute_path(self, store):
        assert os.path.isabs(store.url)

    def test_no_empty_folder_stays(self, store):
        store.write("checkpoints/step-1/model", b"1")
        store.write("checkpoints/step-2/model", b"1")
        store.delete(["checkpoints/step-1/model"])
        assert store.at("checkpoints").folders() == ["step-2"]
        store.delete(["checkpoints/step-2/model"])
        assert Path(store.url).is_dir()
        assert list(Path(store.url).iterdir()) == []

    def test_a_folder_in_the_way_is_an_error_and_no_missing_object(self, store):
        store.write("a", b"1")
        with pytest.raises(StorageError, match="cannot write a/b: ") as caught:
            store.write("a/b", b"1")
        assert "\n" not in str(caught.value)

    def test_a_folder_that_may_not_be_read_is_an_error_and_not_empty(self, store):
        if os.geteuid() == 0:
            # Root reads everything; a link to itself cannot be listed by anyone.
            Path(store.url).mkdir()
            Path(store.url, "loop").symlink_to("loop")
        else:
            Path(store.url, "loop").mkdir(parents=True, mode=0)
        with pytest.raises(StorageError, match="cannot list loop: "):
            store.names("loop")


class TestLocalPath(LocalStoreContract):
    @pytest.fixture
    def url(self, tmp_path) -> str:
        return str(tmp_path / "store")


class TestRelativePath(LocalStoreContract):
    @pytest.fixture
    def url(self, tmp_path, monkeypatch) -> str:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        return "../store"

    def test_a_change_of_directory_does_not_move_it(self, store, monkeypatch):
        store.write("a", b"1")
        monkeypatch.chdir("/")
        assert store.read("a") == b"1"


class TestFileUrl(LocalStoreContract):
    @pytest.fixture
    def url(self, tmp_path) -> str:
        return f"file://{tmp_path}/store"


@pytest.fixture(scope="module", autouse=True)
def _sessions() -> Iterator[None]:
    yield
    _forget_sessions()


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; file systems that were opened with other ones are forgotten."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def set_to(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        now = {name: value for name, value in os.environ.items() if name == "HOME" or name.startswith("AWS_")}
        if now != _opened_with:
            _forget_sessions()
            _opened_with.update(now)

    return set_to


_opened_with: dict[str, str] = {}


def _forget_sessions() -> None:
    for protocol in ("s3", "sftp"):
        file_system_class(protocol, "").clear_instance_cache()
    _opened_with.clear()


@pytest.mark.parametrize("server", ["s3", "ssh"])
def test_a_remote_store_at_work(server, request, environment):
    """The contract in short; ``TestS3`` and ``TestSFTP`` have all of it."""
    at = request.getfixturevalue(server)
    environment(**at.environment)
    place = f"s3://{at.bucket}" if server == "s3" else f"sftp://127.0.0.1:{at.port}{at.folder}"
    store = Store(f"{place}/{uuid.uuid4().hex}")
    store.probe()
    data = os.urandom(3_000_000)
    store.write("checkpoints/step-1/model", data)
    store.write("job.yaml", b"1")
    store.write("job.yaml", b"2")
    assert store.read("checkpoints/step-1/model") == data
    assert (store.read("job.yaml"), store.names()) == (b"2", ["checkpoints/step-1/model", "job.yaml"])
    store.delete(["checkpoints/step-1/model"])
    with pytest.raises(MissingObject):
        store.read("checkpoints/step-1/model")
    assert Store(store.url).names() == ["job.yaml"]


class TestRename:
    """An SFTP server gives a new object the name of the old one."""

    @pytest.fixture
    def store(self, ssh, environment) -> Store:
        environment(**ssh.environment)
        store = Store(f"sftp://127.0.0.1:{ssh.port}{ssh.folder}/{uuid.uuid4().hex}", patience_s=0)
        store.write("a", b"old")
        return store

    def test_a_server_without_the_extension(self, store, ssh, monkeypatch):
        unsupported = mock.Mock(side_effect=OSError("Operation unsupported"))
        monkeypatch.setattr(paramiko.SFTPClient, "posix_rename", unsupported)
        store.write("a", b"new")
        store.write("b", b"new")
        assert unsupported.called
        assert (store.read("a"), files_in(store, ssh)) == (b"new", ["a", "b"])

    def test_a_server_without_the_extension_that_fails_keeps_the_old_object(self, store, ssh, monkeypatch):
        rename = paramiko.SFTPClient.rename

        def fail(ftp: paramiko.SFTPClient, path: str, new_path: str) -> None:
            if new_path.endswith("/a") and not path.endswith("-aside"):
                raise OSError("Failure")
            rename(ftp, path, new_path)

        monkeypatch.setattr(paramiko.SFTPClient, "posix_rename", mock.Mock(side_effect=OSError("unsupported")))
        monkeypatch.setattr(paramiko.SFTPClient, "rename", fail)
        with pytest.raises(StorageError, match="cannot write a: "):
            store.write("a", b"new")
        assert (store.read("a"), files_in(store, ssh)) == (b"old", ["a"])

    @pytest.mark.parametrize("error", [OSError("Failure"), PermissionError(errno.EACCES, "denied"), TimeoutError()])
    def test_a_rename_that_fails_leaves_the_old_object(self, store, ssh, monkeypatch, error):
        rename = paramiko.SFTPClient.posix_rename

        def fail(ftp: paramiko.SFTPClient, path: str, new_path: str) -> None:
            if path != new_path:
                raise type(error)(*error.args)  # its traceback would hold the session for as long as pytest runs
            rename(ftp, path, new_path)

        monkeypatch.setattr(paramiko.SFTPClient, "posix_rename", fail)
        with pytest.raises(StorageError, match="cannot write a: "):
            store.write("a", b"new")
        assert (store.read("a"), files_in(store, ssh)) == (b"old", ["a"])

    def test_a_session_that_is_lost_leaves_the_old_object_and_nothing_that_shows(self, store, ssh, monkeypatch):
        def lose(ftp: paramiko.SFTPClient, path: str, new_path: str) -> None:  # noqa: ARG001
            ftp.get_channel().get_transport().close()
            raise EOFError

        with monkeypatch.context() as patched:
            patched.setattr(paramiko.SFTPClient, "posix_rename", lose)
            with pytest.raises(StorageError, match="cannot write a: EOFError"):
                store.write("a", b"new")
        assert (store.read("a"), store.names()) == (b"old", ["a"])
        assert len(files_in(store, ssh)) == 2
        store.sweep()
        assert files_in(store, ssh) == ["a"]


def files_in(store: Store, ssh: SSHServer | None = None) -> list[str]:
    """All files in a store's folder, also those that it does not show, by their names there."""
    folder = Path(store.url) if ssh is None else ssh.folder / store.url.rpartition("/")[2]
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
class TestS3(SharedStoreContract):
    forgets_empty_folders = False  # this server's way; Amazon has no folders to forget
    tells_versions = True

    @pytest.fixture(autouse=True)
    def _credentials(self, s3, environment):
        environment(**s3.environment)

    @pytest.fixture
    def url(self, s3) -> str:
        return f"s3://{s3.bucket}/{uuid.uuid4().hex}"

    @pytest.fixture
    def proxy(self, s3, environment) -> Iterator[Proxy]:
        with Proxy(s3.port) as proxy:
            environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}")
            yield proxy

    @pytest.mark.parametrize(
        "call",
        [
            lambda store: store.write("a", b"1"),
            lambda store: store.read("a"),
            lambda store: store.names(),
            lambda store: store.folders(),
            lambda store: store.probe(),
        ],
        ids=["write", "read", "names", "folders", "probe"],
    )
    def test_a_misspelt_bucket_is_an_error_and_never_a_new_bucket(self, call):
        with pytest.raises(StorageError) as caught, _no_patience():
            call(Store("s3://rums/a"))
        assert str(caught.value).startswith("s3://rums/a: ")
        with pytest.raises(StorageError):  # it did not come into being
            Store("s3://rums").names()

    def test_a_wrong_secret_is_one_line_at_once(self, store, environment):
        environment(AWS_SECRET_ACCESS_KEY="another-secret-than-the-right")
        with pytest.raises(StorageError) as caught, _no_patience():
            store.write("a", b"1")
        assert str(caught.value).startswith(f"{store.url}: cannot write a: ")
        assert str(caught.value).endswith("; check the credentials in the environment, and what they may do")
        assert "\n" not in str(caught.value)
        assert "another-secret" not in str(caught.value)

    def test_a_listing_has_more_than_one_page(self, store):
        names = [f"part/{number:04d}" for number in range(1_050)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(store.write, names, itertools.repeat(b"1")))
        assert store.names() == names

    def test_a_placeholder_of_a_folder_is_no_object(self, store, s3):
        """Consoles and other tools write an object whose name ends in ``/``, to show a folder before it holds any."""
        store.write("a/b", b"1")
        fs = file_system_class("s3", "")(use_listings_cache=False)
        for name in ("a/", "a/empty/"):
            fs.call_s3("put_object", Bucket=s3.bucket, Key=f"{store.url.rpartition('/')[2]}/{name}", Body=b"")
        assert (store.folders(), store.names()) == (["a"], ["a/b"])
        folders, objects = listing(store, "a")
        assert (folders, [each.name for each in objects]) == (["empty"], ["b"])
        assert listing(store, "a/empty") == ([], [])

    def test_an_object_of_many_parts_is_whole(self, store):
        data = os.urandom(1 << 20) * 101  # s3fs sends 100 MiB and more in parts
        store.write("large", data)
        assert store.read("large") == data

    @pytest.mark.usefixtures("proxy")
    def test_an_object_costs_one_round_trip(self, store, monkeypatch):
        """Its bytes follow the head of the request, and do not wait for an answer to it."""
        heads, begin = list[bytes](), stores._Connection._begin

        def look(connection, head: bytes) -> None:
            heads.append(head)
            begin(connection, head)

        monkeypatch.setattr(stores._Connection, "_begin", look)
        store.write("a", b"1")
        assert len(heads) == 1
        assert b"expect:" not in heads[0].lower()

    def test_a_busy_and_a_rude_server_are_asked_again(self, store, proxy):
        data = os.urandom(3_000_000)
        proxy.slow_downs, proxy.resets = 2, 2
        store.write("a", data)
        assert proxy.turned_away == 4
        proxy.slow_downs, proxy.resets = 2, 2
        assert store.read("a") == data
        assert proxy.turned_away == 8

    def test_a_server_that_comes_back_in_time_costs_no_more_than_time(self, store, proxy):
        store.write("a", b"1")
        with ThreadPoolExecutor(1) as thread:
            with proxy.away():
                reading = thread.submit(store.read, "a")
                trouble = _soon(lambda: store.trouble)
                assert "connect" in trouble.reason.lower()
            assert reading.result() == b"1"
        assert store.trouble is None

    def test_a_server_away_for_longer_than_patience_lasts_is_one_line(self, url, proxy):
        store = Store(url, patience_s=3.0)
        with proxy.away(), pytest.raises(StorageError, match=r", tried for \d+(\.\d+)? s; check the URL") as caught:
            store.write("a", b"1")
        assert "\n" not in str(caught.value)

    def test_a_server_that_never_answers_is_given_up(self, url, proxy, monkeypatch):
        store = Store(url, patience_s=0)
        assert store.names() == []
        monkeypatch.setattr(retrying_calls, "_CALL_S", 1.0)
        no_answer = pytest.raises(StorageError, match="cannot write a: no answer within 1 s; ")
        with proxy.away(silent=True), _no_patience(), no_answer:
            store.write("a", b"1")


@pytest.mark.slow
class TestSFTP(SharedStoreContract):
    @pytest.fixture(autouse=True)
    def _keys(self, ssh, environment):
        environment(**ssh.environment)

    @pytest.fixture
    def url(self, ssh) -> str:
        return f"sftp://127.0.0.1:{ssh.port}{ssh.folder}/{uuid.uuid4().hex}"

    @pytest.fixture
    def proxy(self, ssh) -> Iterator[Proxy]:
        """Not yet a known host."""
        with Proxy(ssh.port, http=False) as proxy:
            yield proxy

    def test_no_empty_folder_stays(self, store, ssh):
        store.write("checkpoints/step-1/model", b"1")
        store.delete(["checkpoints/step-1/model"])
        assert store.folders() == []
        assert list((ssh.folder / store.url.rpartition("/")[2]).iterdir()) == []

    def test_a_link_counts_as_the_object_that_it_leads_to(self, store, ssh):
        store.write("folder/a", b"123")
        folder = ssh.folder / store.url.rpartition("/")[2]
        for name, target in {"link": "folder/a", "again": "folder", "loop": ".", "gone": "nowhere"}.items():
            (folder / name).symlink_to(target)
        folders, objects = listing(store)
        assert folders == ["folder"], "links to folders may lead back"
        assert [(each.name, each.size) for each in objects] == [("again", -1), ("gone", -1), ("link", 3), ("loop", -1)]
        assert list(store.read_ranges([ByteRange("link")])) == [b"123"]

    def test_the_url_may_name_the_user(self, url, ssh):
        store = Store(url.replace("://", f"://{ssh.environment['USER']}@"))
        store.write("a", b"1")
        assert Store(url).read("a") == b"1"

    def test_a_host_of_the_users_ssh_configuration(self, store, ssh):
        store.write("a", b"1")
        folder = store.url.rpartition("/")[2]
        with _ssh_config(ssh, f"Host lab\n  HostName 127.0.0.1\n  Port {ssh.port}\n  User {ssh.environment['USER']}\n"):
            assert Store(f"sftp://lab{ssh.folder}/{folder}").read("a") == b"1"

    def test_a_way_to_the_host_that_is_not_supported_is_an_error(self, ssh):
        refused = pytest.raises(
            StorageError, match="sftp://inner: ~/.ssh/config has proxyjump gate for it, which is not"
        )
        with _ssh_config(ssh, "Host inner\n  ProxyJump gate\n"), refused:
            Store("sftp://inner/runs").names()

    def test_an_unknown_host_is_refused_at_once(self, proxy, ssh):
        store = Store(f"sftp://127.0.0.1:{proxy.port}{ssh.folder}")
        with pytest.raises(StorageError) as caught, _no_patience():
            store.write("a", b"1")
        assert (
            f"sftp://127.0.0.1:{proxy.port}: its host key is not in ~/.ssh/known_hosts, got ssh-ed25519 SHA256:"
            in str(caught.value)
        )
        assert str(caught.value).endswith(f"then: ssh-keyscan -p {proxy.port} 127.0.0.1 >> ~/.ssh/known_hosts")
        assert not (ssh.folder / "a").exists()

    def test_a_changed_host_key_is_refused_at_once(self, proxy, ssh):
        known_hosts = ssh.home / ".ssh" / "known_hosts"
        other = " ".join((ssh.home / ".ssh" / "id_ed25519.pub").read_text().split()[:2])
        known_hosts.write_text(f"{known_hosts.read_text()}[127.0.0.1]:{proxy.port} {other}\n")
        store = Store(f"sftp://127.0.0.1:{proxy.port}{ssh.folder}")
        with (
            pytest.raises(StorageError, match="has another host key than ~/.ssh/known_hosts says"),
            _no_patience(),
        ):
            store.write("a", b"1")
        assert not (ssh.folder / "a").exists()

    def test_a_key_that_is_not_taken_is_one_line_at_once(self, url, ssh, tmp_path, environment):
        shutil.copytree(ssh.home, tmp_path / "home")
        (tmp_path / "home" / ".ssh" / "id_ed25519").unlink()
        environment(HOME=str(tmp_path / "home"))
        refused = pytest.raises(StorageError, match="takes none of the keys of this user; load the right one")
        with refused, _no_patience():
            Store(url).write("a", b"1")

    def test_a_lost_session_is_opened_anew(self, url, ssh, proxy):
        ssh.know_at(proxy.port)
        store = Store(url.replace(f":{ssh.port}", f":{proxy.port}"))
        store.write("a", b"1")
        for _ in range(2):
            proxy.cut()
            assert store.read("a") == b"1"
        # The new session is kept: it needs no second try.
        assert Store(store.url, patience_s=0).read("a") == b"1"

    def test_a_session_that_is_given_up_is_closed(self, store):
        def sessions() -> list[threading.Thread]:
            return [thread for thread in threading.enumerate() if isinstance(thread, paramiko.Transport)]

        store.write("a", b"1")
        assert sessions()
        _forget_sessions()
        _soon(lambda: True if not sessions() else None)

    def test_a_server_away_for_longer_than_patience_lasts_is_one_line(self, url, ssh, proxy):
        ssh.know_at(proxy.port)
        store = Store(url.replace(f":{ssh.port}", f":{proxy.port}"), patience_s=1.2)
        store.write("a", b"1")
        with (
            proxy.away(),
            pytest.raises(StorageError, match=r"cannot read a: .*, tried for \d+(\.\d+)? s; check the URL"),
        ):
            store.read("a")
        assert store.read("a") == b"1"


@contextlib.contextmanager
def _ssh_config(ssh: SSHServer, text: str) -> Iterator[None]:
    config = ssh.home / ".ssh" / "config"
    config.write_text(text)
    try:
        yield
    finally:
        config.unlink()


@contextlib.contextmanager
def _no_patience() -> Iterator[None]:
    """For errors that patience does not help: no call is made again."""
    clock = SimpleNamespace(
        monotonic=time.monotonic, sleep=mock.Mock(side_effect=AssertionError("a call is made again"))
    )
    with mock.patch.object(retrying_calls, "time", clock):
        yield


def _soon(condition, within_s: float = 60.0):
    """What a condition comes to, once it is something."""
    deadline = time.monotonic() + within_s
    while (found := condition()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


class TestFullDisk:
    """A write that does not fit leaves what was there before, whole, and nothing else; smaller ones go on."""

    @pytest.fixture(params=["local", "sftp"])
    def store(self, request, full_disk) -> Store:
        url = str(full_disk)
        if request.param == "sftp":
            ssh = request.getfixturevalue("ssh")
            request.getfixturevalue("environment")(**ssh.environment)
            url = f"sftp://127.0.0.1:{ssh.port}{full_disk}"
        return Store(url, patience_s=0.5)

    @pytest.mark.parametrize("size", [1_200_000, 5_000_000])
    def test_it_is_said_in_one_line_and_leaves_nothing_torn(self, store, size):
        store.write("small", b"1" * 100_000)
        with pytest.raises(StorageError, match=r"cannot write large: .*(No space left|disk may be full)"):
            store.write("large", b"2" * size)
        assert store.names() == ["small"]
        assert store.read("small") == b"1" * 100_000
        store.write("large", b"3" * 100_000)

    def test_an_object_that_does_not_fit_leaves_the_one_before(self, store, full_disk):
        store.write("a", b"1" * 300_000)
        with pytest.raises(StorageError, match=r"cannot write a: .*(No space left|disk may be full)"):
            store.write("a", b"2" * 900_000)
        assert store.read("a") == b"1" * 300_000
        assert [path.name for path in full_disk.iterdir()] == ["a"]

    def test_room_that_is_made_in_time_is_used(self, store):
        store.write("old", b"1" * 800_000)
        store = Store(store.url)
        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(store.write, "new", b"2" * 800_000)
            assert _soon(lambda: store.trouble)
            Store(store.url).delete(["old"])
            writing.result()
        assert store.read("new") == b"2" * 800_000


class FlakyFileSystem(MemoryFileSystem):
    """``flaky://``: each write meets the next of these errors, until there are no more."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    errors: ClassVar[Iterator[Exception]] = iter(())
    writes: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        FlakyFileSystem.writes += 1
        for error in self.errors:
            raise error
        super().pipe_file(path, value, **kwargs)


fsspec.register_implementation("flaky", FlakyFileSystem)


@pytest.fixture
def flaky(monkeypatch):
    """Sets what the writes to ``flaky://`` meet."""
    monkeypatch.setattr(FlakyFileSystem, "writes", 0)
    return lambda errors: monkeypatch.setattr(FlakyFileSystem, "errors", iter(errors))


class NoCredentialsError(Exception):
    """As botocore's: known by its name."""


class VendorError(Exception):
    def __init__(self, status: int | None = None) -> None:
        super().__init__("something of the vendor's")
        self.status = status


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such bucket"),
        PermissionError("denied"),
        IsADirectoryError("a"),
        OSError(errno.EINVAL, "bad name"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.ENAMETOOLONG, "too long"),
        ValueError("no such option"),
        NoCredentialsError("none"),
        VendorError(403),
    ],
    ids=repr,
)
def test_a_lasting_error_is_told_at_once(flaky, error):
    flaky([error])
    with pytest.raises(StorageError, match="flaky://a: cannot write b: "):
        Store("flaky://a").write("b", b"1")
    assert FlakyFileSystem.writes == 1


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("the server's own"),
        OSError(errno.EIO, "input/output error"),
        OSError(errno.EBUSY, "SlowDown"),
        OSError(errno.ENOSPC, "no space"),
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.ESTALE, "stale handle"),
        OSError("Failure"),
        EOFError(),
        VendorError(),
        VendorError(429),
        VendorError(503),
    ],
    ids=repr,
)
def test_a_passing_error_is_met_with_patience(flaky, error):
    flaky([error, error])
    Store("flaky://a").write("b", b"1")
    assert FlakyFileSystem.writes == 3
    flaky([error])
    with pytest.raises(StorageError, match="flaky://a: cannot write b: "):
        Store("flaky://a", patience_s=0).write("b", b"1")
    assert FlakyFileSystem.writes == 4


def test_how_long_it_tried_is_told_without_an_exponent(flaky):
    flaky(itertools.repeat(ConnectionResetError("reset")))
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)
    with (
        mock.patch.object(retrying_calls, "time", clock),
        pytest.raises(StorageError, match="cannot write b: reset, tried for 1800 s; check the URL"),
    ):
        Store("flaky://a", patience_s=1800.0).write("b", b"1")
    assert [in_seconds(duration) for duration in (0.2, 20.0, 1234.5)] == ["0.2 s", "20 s", "1230 s"]


def test_tries_go_on_until_patience_ends_with_pauses_that_grow(flaky):
    flaky(itertools.repeat(ConnectionResetError("reset")))
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)
    with (
        mock.patch.object(retrying_calls, "time", clock),
        mock.patch.object(retrying_calls._random, "uniform", lambda _, longest: longest),
        pytest.raises(StorageError, match="cannot write b: reset, tried for 20 s; check the URL"),
    ):
        Store("flaky://a", patience_s=20.0).write("b", b"1")
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 3.8]), "the last try is made when patience ends"
    assert FlakyFileSystem.writes == len(pauses) + 1


def test_patience_ends_though_what_is_left_of_it_does_not_move_the_clock(flaky):
    flaky(itertools.repeat(ConnectionResetError("reset")))
    now, pauses = [511 + 2**-44], list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        assert len(pauses) < 10
        now[0] += seconds

    with (
        mock.patch.object(retrying_calls, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)),
        mock.patch.object(retrying_calls._random, "uniform", return_value=10 - 2**-44),
        pytest.raises(StorageError, match="cannot write b: reset"),
    ):
        Store("flaky://a", patience_s=10.0).write("b", b"1")
    assert (pauses, now) == ([10 - 2**-44, 2**-44], [521.0])


def test_a_retry_does_not_change_what_the_training_code_draws(flaky):
    flaky([ConnectionResetError("reset")])
    random.seed(7)
    expected = random.getstate()
    Store("flaky://a").write("b", b"1")
    assert (FlakyFileSystem.writes, random.getstate()) == (2, expected)


def test_what_is_below_a_store_shares_its_patience_and_its_trouble(flaky):
    store = Store("flaky://a", patience_s=1.0)
    flaky(itertools.repeat(ConnectionResetError("reset")))
    now, seen = [7.0], threading.Event()

    def sleep(seconds: float) -> None:
        assert seen.wait(60.0)  # its patience lasts until the trouble was seen
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    with mock.patch.object(retrying_calls, "time", clock), ThreadPoolExecutor(1) as thread:
        writing = thread.submit(store.at("b").write, "c", b"1")
        assert _soon(lambda: store.trouble) == Trouble(since=7.0, reason="reset")
        seen.set()
        with pytest.raises(StorageError, match="flaky://a/b: cannot write c: reset, tried for 1 s"):
            writing.result()
    assert store.trouble is None


def test_a_forked_child_frees_no_file_system_of_its_parent(flaky):
    flaky([])
    Store("flaky://nowhere").names()
    used = [weakref.ref(fs) for fs in FlakyFileSystem._cache.values()]
    child = os.fork()
    if child == 0:
        os._exit(0 if all(fs() is not None for fs in used) else 1)
    assert used
    assert os.waitpid(child, 0)[1] == 0


class TestHang:
    """A pipe that nobody reads or writes hangs whoever opens it, in C, as a file does whose server is gone."""

    @pytest.fixture
    def store(self, tmp_path) -> Iterator[Store]:
        os.mkfifo(tmp_path / "pipe")
        yield Store(str(tmp_path), patience_s=0)
        # Both ends open: whoever hangs goes on.
        with open(tmp_path / "pipe", "r+b", buffering=0) as pipe:
            time.sleep(0.1)
            pipe.write(b"1")

    @pytest.mark.parametrize(
        ("call", "action"),
        [
            (lambda store: store.read("pipe"), "read pipe"),
            (lambda store: store.write("b", b"1"), "write b"),
        ],
        ids=["read", "write"],
    )
    def test_a_call_that_hangs_is_given_up_and_the_others_go_on(self, store, call, action, tmp_path):
        given_up = pytest.raises(StorageError, match=f"cannot {action}: no answer within 0.3 s")
        hanging_disk = mock.patch.object(os, "fsync", side_effect=lambda _: (tmp_path / "pipe").read_bytes())
        with mock.patch.object(retrying_calls, "_CALL_S", 0.3), _no_patience(), hanging_disk, given_up:
            call(store)
        store.write("a", b"1")
        assert store.read("a") == b"1"

    def test_a_write_that_was_given_up_does_not_replace_a_later_one(self, store, monkeypatch):
        """The disk takes its bytes after all, when newer ones are there."""
        sync, hangs, goes_on = os.fsync, threading.Event(), threading.Event()

        def sync_late(descriptor: int) -> None:
            hangs.set()
            goes_on.wait()
            sync(descriptor)

        store.write("a", b"old")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", sync_late)
            patched.setattr(retrying_calls, "_CALL_S", 0.1)
            with pytest.raises(StorageError, match="cannot write a: no answer within 0.1 s"):
                store.write("a", b"given up")
            assert hangs.wait(60.0)
        store.write("a", b"new")
        assert len(files_in(store)) == 2
        goes_on.set()
        _soon(lambda: True if files_in(store) == ["a"] else None)
        assert store.read("a") == b"new"

    def test_a_large_object_is_given_the_time_that_its_bytes_take(self, store, monkeypatch, tmp_path):
        monkeypatch.setattr(retrying_calls, "_CALL_S", 1.0)
        monkeypatch.setattr(retrying_calls, "_SLOWEST_BYTES_PER_S", 20.0)
        limits_s = _reads_take(2.0, monkeypatch)
        (tmp_path / "a").write_bytes(bytes(200))
        assert store.read("a") == bytes(200)
        assert limits_s[-1] == 11.0
        (tmp_path / "a").write_bytes(bytes(10))
        with pytest.raises(StorageError, match="cannot read a: no answer within 1.5 s"):
            store.read("a")

    def test_a_store_that_tells_no_size_either_has_the_time_of_one_try(self, tmp_path, monkeypatch):
        """So a worker that waits for its data fails before it counts as hung."""
        goes_on = threading.Event()
        for name in ("cat_file", "info"):
            monkeypatch.setattr(SyncedLocalFileSystem, name, lambda *_, **__: goes_on.wait())
        waits = list[tuple[float, Started]]()

        def noted(seconds: float, started: Started):
            waits.append((seconds, started))
            return result_within(seconds, started)

        monkeypatch.setattr(retrying_calls, "result_within", noted)
        with pytest.raises(StorageError, match="cannot read a: no answer within 0.4 s"):
            list(Store(str(tmp_path), patience_s=0, most_s=0.4).read_ranges([ByteRange("a")]))
        goes_on.set()
        # Half of it for the read, half for the size, and then all of it, which is over, for the read that began first.
        (half_s, read), (of_size_s, _), (whole_s, read_at_last) = waits
        assert (half_s, of_size_s, whole_s) == (0.2, 0.2, 0.4)
        assert read_at_last is read

    def test_threads_are_used_again(self, store):
        store.write("a", b"1")
        before = _num_threads()
        for _ in range(50):
            store.read("a")
        assert _num_threads() == before


def _num_threads() -> int:
    """Of those that make calls for callers with a time limit."""
    return sum(thread.name == "store" for thread in threading.enumerate())


def _reads_take(duration_s: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Has each read count as one that takes so long, without waiting; returns the limits that calls are given."""
    limits_s = list[float]()

    def result_in_time(seconds: float, started: Started):
        limits_s.append(seconds)
        result = started.result(60.0)
        if isinstance(result, bytes) and seconds < duration_s:
            raise OverrunError(f"no answer within {in_seconds(seconds)}")
        return result

    monkeypatch.setattr(retrying_calls, "result_within", result_in_time)
    return limits_s


class TestSecrets:
    SECRET: ClassVar[str] = "pl4nted-s3cret"

    @pytest.mark.parametrize(
        "text",
        [
            "GET http://h/b?X-Amz-Credential=AKIA&X-Amz-Signature=pl4nted-s3cret&x=1 failed",
            "https://h/b?sv=2020&sig=pl4nted-s3cret",
            "403 for https://h/b?AWSAccessKeyId=pl4nted-s3cret",
            "headers {'Authorization': 'AWS4-HMAC-SHA256 Credential=AKIA/x, Signature=pl4nted-s3cret'}",
            "sent Bearer pl4nted-s3cret.abc",
            "sftp://me:pl4nted-s3cret@host: refused",
            "AccountName=a;AccountKey=pl4nted-s3cret;EndpointSuffix=b",
        ],
    )
    @pytest.mark.parametrize("kind", [ConnectionResetError, PermissionError])
    def test_no_error_tells_one(self, flaky, text, kind):
        flaky(itertools.repeat(kind(text)))
        store = Store("flaky://a", patience_s=0)
        with pytest.raises(StorageError) as caught:
            store.write("b", b"1")
        assert "***" in str(caught.value)
        assert self.SECRET not in _all_that_is_told(caught.value)

    @pytest.mark.parametrize(
        "name",
        [
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "FSSPEC_SFTP_PASSWORD",
            "WANDB_API_KEY",
            "AZURE_STORAGE_ACCOUNT_KEY",
        ],
    )
    def test_none_of_the_environment_is_told(self, flaky, monkeypatch, name):
        monkeypatch.setenv(name, self.SECRET)
        self.test_no_error_tells_one(flaky, "odd: pl4nted-s3cret, said the server", ConnectionResetError)

    def test_none_of_the_configuration_of_fsspec_is_told(self, flaky, monkeypatch):
        monkeypatch.setitem(fsspec.config.conf, "sftp", {"password": self.SECRET})
        self.test_no_error_tells_one(flaky, "odd: pl4nted-s3cret, said the server", ConnectionResetError)

    def test_what_is_harmless_is_kept(self, flaky, monkeypatch):
        monkeypatch.setenv("FSSPEC_SFTP_KEY_FILENAME", "/home/me/.ssh/key")
        flaky([PermissionError("cannot open /home/me/.ssh/key, version 1.2")])
        with pytest.raises(StorageError, match="cannot open /home/me/.ssh/key, version 1.2; ") as caught:
            Store("flaky://a").write("b", b"1")
        assert isinstance(caught.value.__cause__, PermissionError)

    def test_a_store_holds_none(self, ssh, environment, monkeypatch):
        environment(**ssh.environment)
        monkeypatch.setitem(fsspec.config.conf, "sftp", {"password": self.SECRET})
        store = Store(f"sftp://127.0.0.1:{ssh.port}{ssh.folder}")
        store.probe()
        assert self.SECRET not in repr(store)
        assert self.SECRET.encode() not in pickle.dumps(store)


def _all_that_is_told(error: BaseException) -> str:
    """The traceback that Python would print, causes and all."""
    return "".join(traceback.format_exception(error))


class TestMemory(StoreContract):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4().hex}"

    def test_only_this_process_sees_it(self, store):
        assert not store.is_shared


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "ss3://bucket/runs",
            "ss3://bucket/runs: unknown protocol 'ss3' (did you mean 's3'?); write a folder, or a URL such as "
            "s3://bucket/runs",
        ),
        ("s3:/bucket/runs", "s3:/bucket/runs: is neither a URL nor a folder; write s3://bucket/runs"),
        ("s3://", "s3://: names no place; write s3://BUCKET-OR-HOST/FOLDER"),
        (
            "simplecache::s3://bucket",
            "simplecache::s3://bucket: is a chain of file systems; write the URL of the store itself",
        ),
        (
            "simplecache::sftp://me:secret@host/runs",
            "simplecache::sftp://me:***@host/runs: is a chain of file systems; write the URL of the store itself",
        ),
        (
            "sftp://me:secret@host/runs",
            "sftp://host: a store's URL must not hold a password, it is written down and handed on; use a key, or set "
            "FSSPEC_SFTP_PASSWORD",
        ),
        (
            "sftp://me:sec/ret@host:22/runs",
            "sftp://host:22: a store's URL must not hold a password, it is written down and handed on; use a key, or "
            "set FSSPEC_SFTP_PASSWORD",
        ),
        (
            "abfs://runs@account/a?sig=secret",
            "abfs://runs@account/a: a store's URL must not hold a query, it is written down and handed on; leave it "
            "out, and give credentials in the environment",
        ),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_before_anything_is_opened(url, message):
    with pytest.raises(StorageError) as caught:
        Store(url)
    assert str(caught.value) == message


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # what Python itself does for a module that must not be found
    with pytest.raises(StorageError) as caught:
        Store("gs://bucket/runs")
    assert str(caught.value) == ("gs://bucket/runs: the package for gs:// is not installed; pip install 'launcher[gs]'")


def test_a_store_that_cannot_be_written_fails_its_probe_in_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        Store(str(tmp_path / "file")).probe()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/file: cannot write probe-")
    assert message.endswith(": Not a directory; check the URL, the network and the credentials in the environment")
