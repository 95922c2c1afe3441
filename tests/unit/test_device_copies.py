"""Copies of batches on the device, and when the streams of a GPU wait for each other; a fake GPU stands in for one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jobs.data import device_copies
from jobs.data.device_copies import copied_ahead
from jobs.data.loader import LoadedBatch

GPU = torch.device("cuda", 0)


class Stream:
    """A stream that tells of what it is asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log, self._copies = name, log, 0

    def wait_stream(self, other: "Stream") -> None:
        self._log.append(f"{self._name} waits for {other._name}")

    def record_event(self) -> str:
        self._copies += 1
        return f"copy {self._copies}"

    def wait_event(self, event: str) -> None:
        self._log.append(f"{self._name} waits for {event}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    computing, current = Stream("computing", log), list[Stream]()

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        current.append(entered)
        yield
        current.pop()

    def empty_like(tensor: Tensor, *, device: torch.device) -> Tensor:
        assert not current, "the memory belongs to the stream that computes"
        return original(tensor, device=device)

    original: Any = torch.empty_like
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copying", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(device_copies.torch, "empty_like", empty_like)
    return log


def batches(log: list[str], count: int) -> Iterator[LoadedBatch]:
    for number in range(count):
        log.append(f"batch {number + 1} is loaded")
        yield LoadedBatch({"image": torch.zeros(2, 3)}, [torch.ones(2, dtype=torch.int64), "text"], 0.5)


def test_a_copy_begins_before_the_batch_ahead_of_it_is_computed_with(log: list[str]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        for batch in copied_ahead(batches(log, 3), GPU):
            log.append("computing works")
            assert batch.inputs["image"].device == batch.target[0].device == GPU
            assert (batch.target[0].dtype, batch.target[1], batch.weight) == (torch.int64, "text", 0.5)

    assert log == [
        "batch 1 is loaded", "copying waits for computing",
        "batch 2 is loaded", "copying waits for computing",
        "computing waits for copy 1", "computing works",
        "batch 3 is loaded", "copying waits for computing",
        "computing waits for copy 2", "computing works",
        "computing waits for copy 3", "computing works",
    ]  # fmt: skip


def test_a_cpu_copies_nothing_and_loads_nothing_ahead() -> None:
    log: list[str] = []
    loaded = list(batches([], 2))

    for number, batch in enumerate(copied_ahead(loaded, torch.device("cpu"))):
        assert batch is loaded[number]
    next(copied_ahead(batches(log, 2), torch.device("cpu")))
    assert log == ["batch 1 is loaded"]
