"""What a process tells of the stores that it reads samples from."""

import time

import pytest

from cluster.storage.retrying_calls import Trouble, UnderWay
from jobs.images import data_stores


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
