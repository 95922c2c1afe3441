"""A store that goes away in mid-run for good, as a mount does: the run ends, and can be resumed.

A plain file stands where the folder of the runs was, so that no call can succeed.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, checkpointed, launcher
from tests.faults.injection import Fault, fired, release
from tests.faults.planned import bits, undisturbed

pytestmark = pytest.mark.slow

SHORT = ("train.epochs=2", "checkpoint.every_steps=2", "tracking.mode=disabled")


@contextlib.contextmanager
def away(store: Path) -> Iterator[None]:
    store.rename(store.with_name("unmounted"))
    store.touch()
    try:
        yield
    finally:
        store.unlink()
        store.with_name("unmounted").rename(store)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        pytest.param(
            "digits/metrics", r"the store has been away for 6 s \(checkpoint.patience_s\): ", id="of the driver"
        ),
        # Who is first to be out of patience, the driver or a worker that saves, tells of it.
        pytest.param(".", r"Not a directory|holds nothing of this driver any more", id="of all"),
    ],
)
def test_a_store_that_does_not_come_back(tmp_path: Path, make_plan, place: str, error: str) -> None:
    """It goes while a step waits for that; without it the run cannot end well, however fast it is."""
    run = tmp_path / "runs/digits"
    plan = make_plan(Fault(kind="hold", doing="forward", step=3))
    running = Running(["run", JOBS / "digits.yaml", *SHORT, "checkpoint.patience_s=6", "--json"], tmp_path)
    running.wait_until(lambda: checkpointed(run, 2)() and 0 in fired(plan))
    with away(tmp_path / "runs" / place):
        release(plan, 0)
        failed = running.wait()
    assert failed.exit_code == 4, failed.stderr
    assert re.search(error, failed.document["error"])
    if place != ".":
        assert failed.stderr.count("training goes on without the store, for 6 s at most") == 1
        assert failed.document["step"] > 3, "training went on"

    resumed = launcher("resume", run, "--json", cwd=tmp_path)
    assert bits(resumed, run) == undisturbed(SHORT)
    assert resumed.document["attempts"] == 2
