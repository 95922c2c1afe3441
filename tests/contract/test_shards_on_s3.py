"""Tar shards in a bucket: few requests, neighbours in one, and a store that fails in between."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import StorageError
from cluster.storage.file_systems import file_system_class
from cluster.storage.store import Store
from jobs.data import tar_shards
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from tests.shards import as_webdataset_reads, jpeg, write_shards
from tests.stores import Proxy, S3Server


@pytest.fixture
def proxy(s3: S3Server, tmp_path, monkeypatch) -> Iterator[Proxy]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Proxy(s3.port) as proxy:
        for name, value in {**s3.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}.items():
            monkeypatch.setenv(name, value)
        file_system_class("s3", "").clear_instance_cache()
        use_index_files(IndexFiles())
        yield proxy
        use_index_files(IndexFiles())
    file_system_class("s3", "").clear_instance_cache()


@pytest.fixture
def upload(proxy: Proxy, s3: S3Server):
    def to_bucket(shards: list[Path]) -> str:
        url = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
        for shard in shards:
            Store(url).write(shard.name, shard.read_bytes())
        Store(url).names()  # has opened what each session needs once
        proxy.requests = 0
        return url

    return to_bucket


def test_the_samples_that_webdataset_reads(tmp_path, proxy, upload):
    shards = write_shards(tmp_path / "data", num_shards=5, per_shard=10)
    url = upload(shards)
    dataset = tar_shards(f"{url}/shard-{{000000..000004}}.tar")
    assert proxy.requests == 1 + 5  # a listing, and a shard is shorter than what is read ahead
    expected = as_webdataset_reads(shards)
    assert [dataset.index.place(number).key for number in range(50)] == [sample["__key__"] for sample in expected]
    assert dataset.targets.tolist() == [int(sample["cls"]) for sample in expected]
    proxy.requests = 0
    assert dataset.fetch(range(50)) == [sample["jpg"] for sample in expected]
    assert proxy.requests == 5
    assert all(version for version in dataset.index.objects["version"].to_pylist())
    assert dataset.index.url_of(12) == f"{url}/shard-000001.tar#00012"


def test_images_are_stepped_over(tmp_path, proxy, upload):
    shards = write_shards(tmp_path / "data", num_shards=2, per_shard=4, size=1024)
    assert all(shard.stat().st_size > 4 * 2**19 for shard in shards)
    dataset = tar_shards(upload(shards))
    assert proxy.requests == 1 + 2 * 5
    assert dataset.fetch([7]) == [jpeg(7, 1024)]


def test_a_server_that_is_busy_or_breaks_off(tmp_path, proxy, upload):
    url = upload(write_shards(tmp_path / "data", num_shards=8, per_shard=3))
    proxy.slow_downs, proxy.resets = 3, 3
    dataset = tar_shards(url)
    assert (len(dataset), proxy.turned_away) == (24, 6)
    proxy.slow_downs = 1
    assert dataset.fetch([23]) == [jpeg(23)]


def test_a_bucket_that_is_not_there(s3, proxy):  # noqa: ARG001 - the server is reached through it
    with pytest.raises(StorageError, match="s3://rums/a: "):
        tar_shards("s3://rums/a/shard-{0..3}.tar")
