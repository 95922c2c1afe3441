"""A run on stock Ray Train, as far as its store sees it: the same acts, through Ray's own classes.

A life is what Ray 2.60 does without a cluster in between: its controller's ``CheckpointManager`` restores itself from
its snapshot in the store; rank 0 loads the latest checkpoint, and at each save writes files with ``torch.save`` to a
folder of its own, which ``ray.train.report`` has ``StorageContext`` copy to the store and the manager register. Left
out are the actors and the queue between the two, through which no byte of a checkpoint goes, and the retries of a run
that fails: they would begin at the same checkpoint.
"""

import asyncio
import io
import logging
import tempfile
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.fs
import torch
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from cluster.storage.file_systems import Location
from tests.crashing import Faults, crashing
from tests.faults.enumeration import Act, Begun, Content, MixedError, parsed

KEEP = 2
_FILES = ("model.pt", "optimizer.pt")


class StockRuns:
    """Runs of a stock ``TorchTrainer``. It has no rows of metrics, and no way back."""

    name = "stock"
    ends_by = (Exception,)

    def __init__(self) -> None:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        pyarrow.set_io_thread_count(1)  # one call at a time

    def acts(self) -> list[Act]:
        """The run's first save; and a resume with a save after which the oldest checkpoint goes."""
        faults = Faults(folder=uuid.uuid4().hex)
        with crashing(faults):
            self.live(f"memory://{faults.folder}", 6, "past")
        return [
            Act("first save", lambda url: self.live(url, 2, "first"), then_to=4),
            Act("resume", lambda url: self.live(url, 10, "first"), then_to=12, begin_with=faults.content),
        ]

    def live(self, url: str, last: int, by: str) -> Begun:
        """The life of a controller and its rank 0."""
        location = Location(url)
        fs, path = location.file_system(), location.path("")
        folder, _, name = path.rpartition("/")
        storage = StorageContext(folder, name, storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)))
        manager = CheckpointManager(checkpoint_config=CheckpointConfig(num_to_keep=KEEP), storage_context=storage)
        latest = manager.latest_checkpoint_result
        begun = Begun(0, "") if latest is None else _load(latest.checkpoint)
        for step in range(begun.step + 2, last + 1, 2):
            asyncio.run(_save(storage, manager, step, by))
        return begun

    def committed(self, content: Content, before: Content) -> dict[int, bool]:
        """The latest checkpoints of the snapshot there is and of the one there was, as far as they are there."""
        found: dict[int, bool] = {}
        for objects in (before, content):
            snapshot = parsed(objects.get(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, b""))
            latest = snapshot and snapshot["latest_checkpoint_result"]
            if latest and any(name.startswith(latest["checkpoint_dir_name"]) for name in content):
                step, folder = latest["metrics"]["step"], latest["checkpoint_dir_name"]
                found[step] = all(_is_whole(content.get(f"{folder}/{name}")) for name in _FILES)
        return found

    def complaint(self, url: str, begun: Begun, last: int, by: str) -> str | None:  # noqa: ARG002
        """What is wrong with a run that a life has brought to its last step, when another one looks at it."""
        found = self.live(url, last, "third")
        return None if (found.step, found.writer) == (last, by) else f"ended at {found}"

    complaint_of_rows = complaint


async def _save(storage: StorageContext, manager: CheckpointManager, step: int, by: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in _FILES:
            torch.save(_state(name, step, by), Path(folder, name))
        persisted = storage.persist_current_checkpoint(
            Checkpoint.from_directory(folder), storage.make_default_checkpoint_dir_name()
        )
    manager.register_checkpoint(_TrainingReport(checkpoint=persisted, metrics={"step": step}, validation=False))


def _load(checkpoint: Checkpoint) -> Begun:
    with checkpoint.as_directory() as folder:
        states = {name: torch.load(Path(folder, name), weights_only=True) for name in _FILES}
    first = states[_FILES[0]]
    for name, state in states.items():
        expected = _state(name, first["step"], first["by"])
        if not (state.keys() == expected.keys() and torch.equal(state["weights"], expected["weights"])):
            raise MixedError(f"{name} holds {state}")
        if (state["step"], state["by"]) != (first["step"], first["by"]):
            raise MixedError(f"{name} is of step {state['step']}, the model of {first['step']}")
    return Begun(first["step"], first["by"])


def _state(name: str, step: int, by: str) -> dict[str, Any]:
    return {"step": step, "by": by, "weights": torch.full((64,), step + _FILES.index(name) / 2)}


def _is_whole(data: bytes | None) -> bool:
    """Whether it is an archive as ``torch.save`` writes it, which lists at its end what it holds."""
    return data is not None and zipfile.is_zipfile(io.BytesIO(data))
