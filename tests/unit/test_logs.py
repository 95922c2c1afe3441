"""Following the logs of a run whose store goes away meanwhile, with a clock of its own."""

import time
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from counting_file_system import CountingFileSystem

from cluster.run_directory import RunDirectory
from launcher.cli import main
from tests.unit.test_submit import JOB

AWAY_FROM_S = 10.0


@pytest.fixture
def run() -> RunDirectory:
    """One that this process drives."""
    CountingFileSystem.store.clear()
    run = RunDirectory("count://runs/digits")
    run.write_job(JOB.format(store="count://runs"))
    run.claim()
    run.write_status({"status": "running", "step": 3})
    run.write_log(0, 0, b"one\n")
    return run


@pytest.fixture
def follow(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], tuple[Result, float]]:
    """How following ends, and after how many seconds, if the store is away for some; the run ends when it is back."""

    def look(away_s: float) -> tuple[Result, float]:
        now, has_ended, find = [0.0], [False], CountingFileSystem.find

        def sleep(seconds: float) -> None:
            now[0] += seconds
            assert now[0] < 3600
            if now[0] >= AWAY_FROM_S + away_s and not has_ended[0]:
                has_ended[0] = True
                run.write_log(0, 0, b"one\ntwo\n")
                run.write_status({"status": "completed", "step": 7})

        def find_unless_away(fs: CountingFileSystem, path: str, **of: object) -> list[str]:
            if AWAY_FROM_S <= now[0] < AWAY_FROM_S + away_s:
                raise ConnectionError("nobody answers")
            return find(fs, path, **of)

        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        monkeypatch.setattr(time, "sleep", sleep)
        monkeypatch.setattr(CountingFileSystem, "find", find_unless_away)
        ended = CliRunner().invoke(main, ["logs", run.url, "--follow"])
        return ended, now[0]

    return look


@pytest.mark.parametrize("away_s", [0.0, 30.0, 500.0])
def test_it_goes_on_when_the_store_is_back(follow, away_s):
    ended, _ = follow(away_s)
    assert (ended.exit_code, ended.stdout) == (0, "one\ntwo\n")
    said = [line for line in ended.stderr.splitlines() if not line.startswith("---")]
    assert len(said) == (away_s > 0)
    for line in said:
        assert line.startswith("warning: count://runs/digits: cannot list drivers: nobody answers")
        assert line.endswith("; trying again for 10 minutes")


def test_it_ends_when_the_store_stays_away(follow):
    ended, waited_s = follow(2000.0)
    assert (ended.exit_code, ended.stdout) == (4, "one\n")
    assert ended.stderr.splitlines()[-1].startswith("error: count://runs/digits: cannot list drivers: nobody answers")
    assert 600 <= waited_s - AWAY_FROM_S <= 660
