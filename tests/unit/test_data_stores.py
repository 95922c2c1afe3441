"""What a process tells of the stores that it reads samples from."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StorageError
from cluster.storage.local import SyncedLocalFileSystem
from cluster.storage.retrying_calls import Trouble, UnderWay
from jobs.data import image_folder
from jobs.images import data_stores
from tests.images import make_image_folder


def test_the_read_that_has_been_waited_for_longest_is_told_whichever_store_it_is_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_stores, "_stores", {})
    first, second, third = (data_stores.data_store(f"memory://{name}") for name in ("first", "second", "third"))
    now = time.monotonic()
    first._calls.troubles[1] = Trouble(now - 1, "reset")
    second._calls.troubles[2] = Trouble(now - 90, "is down")
    third._calls.under_way[3] = UnderWay(now - 60, "read a.tar")

    def told() -> str:
        late = data_stores.oldest_read()
        assert late is not None
        return late.text

    assert told() == "memory://second: does not answer for 90 s: is down"
    second._calls.troubles.clear()
    assert told() == "memory://third: the call to read a.tar has not returned for 60 s"


@pytest.mark.usefixtures("own_indexes")
def test_a_read_of_an_image_has_the_time_for_its_size_in_the_index_and_asks_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_folder(make_image_folder(tmp_path / "images", 1, 1, size=8))
    monkeypatch.setattr(data_stores, "_patience_s", 0.2)
    goes_on, asked = threading.Event(), list[Any]()
    monkeypatch.setattr(SyncedLocalFileSystem, "cat_file", lambda *_, **__: goes_on.wait())
    monkeypatch.setattr(SyncedLocalFileSystem, "info", lambda *args, **_: asked.append(args))
    with pytest.raises(StorageError, match=r"cannot read class_000/image_0000.jpg: no answer within 0\.2\d* s"):
        images.fetch([0])
    goes_on.set()
    assert asked == []
