"""Host memory for copies of a share: allocated in the background, of the size that is needed, and freed."""

import mmap
import threading
from typing import Any

import pytest
import torch

from jobs.checkpoint import host_buffers
from jobs.checkpoint.host_buffers import HostBuffer, HostBuffers


class Cuda:
    """The part of CUDA that locks memory."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        """The size of what is locked, by its address."""
        self.error = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        assert address % mmap.PAGESIZE == 0
        if not self.error:
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    def check_error(error: int) -> None:
        if error:
            raise RuntimeError(f"CUDA error {error}")

    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    return cuda


@pytest.fixture
def made_by(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the thread of the test made it, for each buffer."""
    made: list[bool] = []

    def make(size: int, **options: Any) -> HostBuffer:
        made.append(threading.current_thread() is threading.main_thread())
        return HostBuffer(size, **options)

    monkeypatch.setattr(host_buffers, "HostBuffer", make)
    return made


def test_a_buffer_is_made_in_the_background(made_by: list[bool]) -> None:
    buffers = HostBuffers(are_locked=False)
    buffers.prepare(1000)
    buffer = buffers.take(990)
    assert buffer.data.numel() == 1000
    assert made_by == [False]


def test_a_buffer_serves_one_copy_after_the_other(made_by: list[bool]) -> None:
    buffers = HostBuffers(are_locked=False)
    buffers.prepare(1000)
    first = buffers.take(1000)
    buffers.give_back(first)
    buffers.prepare(1000)
    assert buffers.take(1) is first
    assert made_by == [False]


def test_a_copy_beside_another_one_has_a_buffer_of_its_own() -> None:
    buffers = HostBuffers(are_locked=False)
    first, second = buffers.take(8), buffers.take(8)
    first.data.fill_(1)
    second.data.fill_(2)
    assert first.data.tolist() == [1] * 8


def test_one_buffer_is_kept_and_the_others_are_freed(cuda: Cuda) -> None:
    buffers = HostBuffers(are_locked=True)
    taken = [buffers.take(size) for size in (100, 5000, 300)]
    assert sorted(cuda.locked.values()) == [100, 300, 5000]
    for buffer in taken:
        buffers.give_back(buffer)
    assert list(cuda.locked.values()) == [5000]
    buffers.close()
    assert cuda.locked == {}


def test_a_larger_state_gets_a_larger_buffer(cuda: Cuda) -> None:
    buffers = HostBuffers(are_locked=True)
    buffers.prepare(100)
    buffers.prepare(5000)
    assert buffers.take(5000).data.numel() == 5000
    assert list(cuda.locked.values()) == [5000]


def test_a_share_may_be_empty() -> None:
    assert HostBuffers(are_locked=False).take(0).data.numel() == 1


def test_a_host_without_memory_says_so(cuda: Cuda) -> None:
    cuda.error = 2
    buffers = HostBuffers(are_locked=True)
    buffers.prepare(1_000_000)
    with pytest.raises(MemoryError, match="^the host cannot lock 1,000,000 bytes of memory for copies of"):
        buffers.take(10)


def test_a_buffer_that_no_copy_needs_any_more_may_fail(cuda: Cuda) -> None:
    cuda.error = 2
    buffers = HostBuffers(are_locked=True)
    buffers.prepare(1_000_000)
    buffers.close()
    assert not cuda.locked


def test_another_error_of_the_gpu_is_its_own(cuda: Cuda) -> None:
    cuda.error = 719
    with pytest.raises(RuntimeError, match="^CUDA error 719$"):
        HostBuffers(are_locked=True).take(10)
