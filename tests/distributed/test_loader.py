"""Loader processes: they end with the training process that they load for, and their errors reach it."""

import ctypes
import importlib
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from cluster.errors import StorageError
from cluster.process import fork_server
from cluster.storage.store import ByteRange, Store
from jobs.data import store_reports
from jobs.data.loader import LoadedBatch, validation_batches
from jobs.images import data_stores
from jobs.images.data_stores import data_store
from jobs.training.failure_causes import message_of
from tests.processes import state, wait_until


class Samples:
    """Samples of one number and its label; a loader process that gets to ``place`` never leaves it again.

    Every process of the loader leaves a file, named as its number, in the folder.
    """

    def __init__(self, place: str, folder: Path) -> None:
        self._place, self._folder = place, folder

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reach("reading the dataset")

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        self._reach("reading a sample")
        return torch.tensor(number), 0

    def _reach(self, place: str) -> None:
        (self._folder / str(os.getpid())).touch()
        if place == self._place:
            ctypes.PyDLL(None).pause()  # in C, where Python hears no signal
        if place == "reading a sample" and self._place == "waiting for a store":
            fifo = self._folder.with_name("store") / str(os.getpid())
            fifo.parent.mkdir(exist_ok=True)
            os.mkfifo(fifo)
            Store(str(fifo.parent)).read(fifo.name)  # nobody ever writes to it


class BadSamples(Samples):
    """Samples that raise an exception of a class that no other process can find."""

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        class BadSampleError(Exception):
            def __init__(self, *, number: int) -> None:
                super().__init__(f"sample {number} is bad")

        raise BadSampleError(number=number)


class LateFileSystem(MemoryFileSystem):
    """Answers once there is a file ``answers`` in the folder that its URLs name: before, it is silent, or refuses."""

    protocol = "late"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("late://")

    def cat_file(self, path: str, **_: Any) -> bytes:
        while not Path(path).with_name("answers").exists():
            if Path(path).name == "refused":
                raise ConnectionResetError("reset by peer")
            time.sleep(0.01)
        return b"content"


fsspec.register_implementation("late", LateFileSystem)


class LateSamples(Samples):
    """Samples in a store that answers late; every process that reads them looks at it without delay."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__("", folder)
        self._name = name
        report_at_once()

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        report_at_once()

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        data_store(f"late://{self._folder}").read(self._name)
        return super().__getitem__(number)


def report_at_once() -> None:
    store_reports._SHORT_S, store_reports._LOOK_INTERVAL_S, store_reports._AGAIN_S = 0.0, 0.01, 0.0


def wait_for_late_samples(folder: str, name: str, text: str, loaders: int) -> str:
    """Reads samples whose store answers once this process has been told of it; returns what it was told.

    Args:
        folder: Of the store.
        name: Of the sample.
        text: A regular expression for the end of what it must be told.
        loaders: Loader processes.
    """
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def tell(said: str) -> None:
        if re.search(f"{text}$", said):
            told.put(said)
            (Path(folder) / "answers").touch()

    samples = LateSamples(Path(folder), name)
    store_reports.report_to(tell)
    next(batches_of(samples, loaders))
    return told.get(timeout=60)


def train_on_bad(folder: str) -> str:
    """Returns the message of the failure that a bad sample leads to."""
    try:
        next(batches_of(BadSamples("", Path(folder))))
    except RuntimeError as error:
        return message_of(error)
    return "no failure"


def train(place: str, folder: Path) -> None:
    """Takes one batch, as a training process does."""
    batches = batches_of(Samples(place, folder))  # kept, because its loaders end with it
    next(batches)
    threading.Event().wait()


def read_with_environment(folder: str) -> list[int]:
    """Reads samples of the user's module ``reader`` in loader processes of a process that was given a GPU."""
    os.environ["GIVEN_TO_A_WORKER"], os.environ["CUDA_VISIBLE_DEVICES"] = "yes", "3"
    sys.path.append(folder)
    reader = importlib.import_module("reader")
    assert reader.AT_IMPORT == [1, 0, 0]
    flags: list[int] = next(batches_of(reader.Flags())).inputs[0].tolist()
    return flags


def batches_of(samples: Any, loaders: int = 2) -> Iterator[LoadedBatch]:
    address = fork_server.own_address()
    assert address is not None
    fork_server.use(address)
    return validation_batches(
        samples, batch_size=2, seed=0, rank=0, world_size=1, loaders=loaders, device=torch.device("cpu")
    )  # fmt: skip


@pytest.mark.parametrize(
    "place", ["reading the dataset", "reading a sample", "waiting for a store", "waiting for more to do"]
)
def test_loaders_end_with_their_training_process(tmp_path: Path, place: str) -> None:
    fork_server.start([__name__])
    folder = tmp_path / "loaders"
    folder.mkdir()
    training = fork_server.fork(train, (place, folder), "training")
    reached = tmp_path / "store" if place == "waiting for a store" else folder
    wait_until(lambda: reached.exists() and len(list(reached.iterdir())) == 2)
    loaders = [int(path.name) for path in folder.iterdir()]
    assert all(map(state, loaders))
    training.kill()
    training.join()
    wait_until(lambda: not any(map(state, loaders)), limit_s=5)


def test_an_exception_that_cannot_be_sent_ends_the_training_process_too(tmp_path: Path) -> None:
    fork_server.start([__name__])
    message = fork_server.call(f"{__name__}:train_on_bad", str(tmp_path), timeout_s=60.0)
    assert message == "BadSampleError: sample 0 is bad"


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("refused", r"does not answer for \d+ s: reset by peer"),
        ("silent", r"the call to read silent has not returned for \d+ s"),
    ],
)
def test_the_training_process_is_told_of_a_store_that_does_not_answer(
    tmp_path: Path, name: str, text: str, loaders: int
) -> None:
    fork_server.start([__name__])
    told = fork_server.call(f"{__name__}:wait_for_late_samples", str(tmp_path), name, text, loaders, timeout_s=60.0)
    assert re.fullmatch(f"late://{re.escape(str(tmp_path))}: {text}", told), told


def test_a_store_that_is_silent_is_given_up_before_the_worker_counts_as_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_stores, "_patience_s", data_stores.patience_below(hang_timeout_s=0.6))
    with pytest.raises(StorageError, match=f"late://{tmp_path}: cannot read silent: no answer within 0.2 s"):
        list(data_store(f"late://{tmp_path}").read_ranges([ByteRange("silent", 0, 1)]))
    (tmp_path / "answers").touch()


def test_the_users_code_is_imported_with_the_environment_of_the_training_process_and_without_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reader.py").write_text(
        "import os\nimport torch\n"
        "AT_IMPORT = [\n"
        "    int(os.environ.get('GIVEN_TO_A_WORKER') == 'yes'),\n"
        "    int(os.environ.get('CUDA_VISIBLE_DEVICES') == ''),\n"
        "    int('ONLY_IN_THE_SERVER' in os.environ),\n"
        "]\n"
        "class Flags:\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, number): return torch.tensor(AT_IMPORT), 0\n"
    )
    fork_server.stop()
    monkeypatch.setenv("ONLY_IN_THE_SERVER", "yes")
    fork_server.start([__name__])
    monkeypatch.delenv("ONLY_IN_THE_SERVER")
    try:
        found = fork_server.call(f"{__name__}:read_with_environment", str(tmp_path), timeout_s=60.0)
    finally:
        fork_server.stop()
    assert found == [1, 1, 0]
