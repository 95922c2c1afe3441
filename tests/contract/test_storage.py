"""What the rest of the program relies on, of every store alike."""

import os
import pickle
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cluster.errors import StorageError
from cluster.storage import MissingObject, Store


class StoreContract:
    """A subclass gives the fixture ``url``: a place where nothing is yet."""

    @pytest.fixture
    def store(self, url: str) -> Store:
        return Store(url)

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "byte", "megabyte"])
    def test_an_object_is_read_as_it_was_written(self, store, data):
        store.write("a/b/c.bin", data)
        assert store.read("a/b/c.bin") == data

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
        assert store.names() == store.folders() == []

    def test_a_child_is_a_folder(self, store):
        store.at("run", "logs").write("x", b"1")
        assert store.names() == ["run/logs/x"]
        assert store.at("run/logs").url == f"{store.url}/run/logs"

    @pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "a//b", "a/", "."])
    def test_no_name_leads_out_of_the_store(self, store, name):
        for call in (
            store.read,
            store.exists,
            store.at,
            lambda name: store.write(name, b""),
            lambda name: store.delete([name]),
        ):
            with pytest.raises(StorageError, match="is no name of an object"):
                call(name)

    def test_a_pickle_is_the_url(self, store):
        store.write("a", b"1")
        twin = pickle.loads(pickle.dumps(store.at("x")))  # noqa: S301
        assert twin.url == f"{store.url}/x"
        assert store.__reduce__() == (Store, (store.url,))

    def test_the_canonical_url_leads_to_the_same_place(self, store, url):
        store.write("a", b"1")
        assert Store(store.url).read("a") == b"1"
        assert Store(f"{url}/").url == store.url

    def test_a_probe_leaves_nothing(self, store):
        store.probe()
        assert store.names() == []

    def test_a_forked_child_can_use_the_store(self, store):
        store.write("a", b"1")
        child = os.fork()
        if child == 0:
            os._exit(0 if store.read("a") == b"1" else 1)
        assert os.waitpid(child, 0)[1] == 0


class SharedStoreContract(StoreContract):
    def test_another_process_sees_the_objects(self, store, tmp_path):
        store.write("a", b"from the parent")
        assert store.is_shared
        program = f"import pickle; print(pickle.loads({pickle.dumps(store)!r}).read('a').decode())"
        child = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert child.stdout == "from the parent\n", child.stderr


class LocalStoreContract(SharedStoreContract):
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
            "sftp://me:secret@host/runs",
            "sftp://host: a store's URL must not hold a password, it is written down and handed on; use a key, or set "
            "FSSPEC_SFTP_PASSWORD",
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
