"""Loader processes end with the training process that they load for, whatever they are at."""

import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch

from cluster.process import fork_server
from jobs.data.loader import validation_batches
from tests.processes import state, wait_until


class Samples:
    """Samples of one number; a loader process that gets to ``place`` never leaves it again.

    Every process of the loader leaves a file, named as its number, in the folder.
    """

    def __init__(self, place: str, folder: Path) -> None:
        self._place, self._folder = place, folder

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reach("reading the dataset")

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> torch.Tensor:
        self._reach("reading a sample")
        return torch.tensor(number)

    def _reach(self, place: str) -> None:
        (self._folder / str(os.getpid())).touch()
        if place == self._place:
            ctypes.PyDLL(None).pause()  # in C, where Python hears no signal


def train(place: str, folder: Path) -> None:
    """Takes one batch, as a training process does."""
    address = fork_server.own_address()
    assert address is not None
    fork_server.use(address)
    batches = validation_batches(
        Samples(place, folder), batch_size=2, seed=0, rank=0, world_size=1, loaders=2, device=torch.device("cpu")
    )
    next(batches)
    threading.Event().wait()


@pytest.mark.parametrize("place", ["reading the dataset", "reading a sample", "waiting for more to do"])
def test_loaders_end_with_their_training_process(tmp_path: Path, place: str) -> None:
    fork_server.start([__name__])
    training = fork_server.fork(train, (place, tmp_path), "training")
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    loaders = [int(path.name) for path in tmp_path.iterdir()]
    assert all(map(state, loaders))
    training.kill()
    training.join()
    wait_until(lambda: not any(map(state, loaders)), limit_s=5)
