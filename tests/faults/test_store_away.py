"""A store that goes away in mid-run, as a mount does: training goes on, or the run ends and can be resumed.

A plain file stands where the folder of the runs was, so that no call can succeed.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, Running, checkpointed, events, launcher
from tests.faults.planned import bits, undisturbed

SHORT = ("train.epochs=2", "checkpoint.every_steps=null", "tracking.mode=disabled")
AWAY_S = 6.0


@contextlib.contextmanager
def away(store: Path) -> Iterator[None]:
    store.rename(store.with_name("unmounted"))
    store.touch()
    yield
    store.unlink()
    store.with_name("unmounted").rename(store)


@pytest.mark.timeout(300)
def test_a_store_that_is_away_for_a_while_and_for_good(tmp_path: Path) -> None:
    run, brake = tmp_path / "runs/digits", tmp_path / "brake"
    brake.touch()
    slow = f"data.train.transform={{_target_: tests.faults.brake.Brake, size: 32, padding: 2, path: {brake}}}"
    overrides = (slow, *SHORT, "checkpoint.patience_s=9", "--json")
    running = Running(["run", JOBS / "digits.yaml", *overrides], tmp_path)
    running.wait_until(lambda: run.exists() and bool(events(run, "training")))
    with away(run.parent):
        time.sleep(AWAY_S)
    running.wait_until(lambda: bool(events(run, "store_away")))
    assert len(events(run, "attempt_started")) == 1, "nothing was lost by it"
    (gone,) = events(run, "store_away")
    assert AWAY_S - 5.5 < gone["seconds"] < AWAY_S + 6
    assert gone["step"] > events(run, "training")[0]["step"], "training went on"
    brake.unlink()
    running.wait_until(checkpointed(run, 22))

    brake.touch()
    with away(run.parent):
        failed = running.wait()
    assert failed.exit_code == 4, failed.stderr
    assert "the store has been away for 9 s (checkpoint.patience_s): " in failed.document["error"]
    assert failed.stderr.count("training goes on without the store, for 9 s at most") == 2
    assert failed.stderr.count("the store is back after ") == 1

    brake.unlink()
    resumed = launcher("resume", run, "--json", cwd=tmp_path)
    assert bits(resumed, run) == undisturbed(tmp_path / "undisturbed", SHORT)
    assert resumed.document["attempts"] == 2
