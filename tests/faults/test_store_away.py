"""A store that goes away in mid-run for good, as a mount does: the run ends, and can be resumed.

A plain file stands where the folder of the runs was, so that no call can succeed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, checkpointed, launcher
from tests.faults.planned import bits, undisturbed

SHORT = ("train.epochs=2", "checkpoint.every_steps=2", "tracking.mode=disabled")


@contextlib.contextmanager
def away(store: Path) -> Iterator[None]:
    store.rename(store.with_name("unmounted"))
    store.touch()
    yield
    store.unlink()
    store.with_name("unmounted").rename(store)


@pytest.mark.timeout(300)
def test_a_store_that_does_not_come_back(tmp_path: Path) -> None:
    run, brake = tmp_path / "runs/digits", tmp_path / "brake"
    brake.touch()
    slow = f"data.train.transform={{_target_: tests.faults.brake.Brake, size: 32, padding: 2, path: {brake}}}"
    overrides = (slow, *SHORT, "checkpoint.patience_s=6", "--json")
    running = Running(["run", JOBS / "digits.yaml", *overrides], tmp_path)
    running.wait_until(checkpointed(run, 2))
    with away(run.parent):
        failed = running.wait()
    assert failed.exit_code == 4, failed.stderr
    assert "the store has been away for 6 s (checkpoint.patience_s): " in failed.document["error"]
    assert failed.stderr.count("training goes on without the store, for 6 s at most") == 1
    assert failed.document["step"] > 2, "training went on"

    brake.unlink()
    resumed = launcher("resume", run, "--json", cwd=tmp_path)
    assert bits(resumed, run) == undisturbed(tmp_path / "undisturbed", SHORT)
    assert resumed.document["attempts"] == 2
