"""Buffers that exchanges receive into."""

import threading
import weakref

import pytest
import torch

from cluster.collectives import buffer_pool
from cluster.collectives.buffer_pool import BufferPool

LIMIT_S = 60.0


def test_a_buffer_is_used_again() -> None:
    pool = BufferPool(1)
    with pool.lend(torch.zeros(3), 100) as first:
        place = first.data_ptr()
    with pool.lend(torch.zeros(3, dtype=torch.float64), 50) as second:
        assert second.dtype == torch.float64
        assert second.shape == (50,)
        assert second.data_ptr() == place


def test_a_buffer_grows_to_the_largest_bucket() -> None:
    pool = BufferPool(1)
    places = set()
    for length in (10, 1000, 10, 1000):
        with pool.lend(torch.zeros(0), length) as buffer:
            assert buffer.shape == (length,)
            places.add(buffer.data_ptr())
    assert len(places) == 2


def test_two_buckets_in_flight_share_nothing() -> None:
    pool = BufferPool(2)
    with pool.lend(torch.zeros(0), 10) as first, pool.lend(torch.zeros(0), 10) as second:
        first.fill_(1)
        second.fill_(2)
        assert first.tolist() == [1.0] * 10


def test_a_bucket_waits_for_a_buffer() -> None:
    pool = BufferPool(1)
    borrowed = threading.Event()

    def borrow() -> None:
        with pool.lend(torch.zeros(0), 10):
            borrowed.set()

    with pool.lend(torch.zeros(0), 10):
        thread = threading.Thread(target=borrow)
        thread.start()
        assert not borrowed.wait(0.2)
    thread.join(LIMIT_S)
    assert borrowed.is_set()


def test_a_failure_gives_the_buffer_back() -> None:
    pool = BufferPool(1)
    with pytest.raises(ZeroDivisionError), pool.lend(torch.zeros(0), 10):
        raise ZeroDivisionError
    with pool.lend(torch.zeros(0), 10):
        pass


def test_memory_for_the_bucket_of_a_first_step_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_pool, "_LARGEST_KEPT", 400)
    pool = BufferPool(1)
    with pool.lend(torch.zeros(0), 1000) as large:
        memory = weakref.ref(large.untyped_storage())
    del large
    assert memory() is None


def test_a_buffer_that_cannot_be_had_is_not_missed() -> None:
    pool = BufferPool(1)
    with pytest.raises(RuntimeError), pool.lend(torch.zeros(0), -1):
        pass
    with pool.lend(torch.zeros(0), 10):
        pass
