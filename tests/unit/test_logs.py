"""Following the logs of a run whose store goes away meanwhile, with a clock of its own."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from counting_file_system import CountingFileSystem
from sleeping import replace_sleep

from cluster.run.run_directory import RunDirectory
from launcher.cli import main
from launcher.watching import logs
from tests.unit.test_submit import JOB

AWAY_FROM_S = 10.0


@pytest.fixture
def run() -> RunDirectory:
    """One that this process drives."""
    CountingFileSystem.store.clear()
    run = RunDirectory("count://runs/digits")
    run.write_job(JOB.format(store="count://runs"))
    run.take_lease()
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
        replace_sleep(monkeypatch, sleep)
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


LINES = [f"step {number}: a loss of \N{GREEK SMALL LETTER EPSILON}\n".encode() for number in range(400)]


@pytest.fixture
def follow_looks(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[bytes]], list[str]]:
    """What is printed of a log that is kept again and again, at the pace of an agent, until the run ends."""

    def look(logs_kept: list[bytes]) -> list[str]:
        now, left = [0.0], list(logs_kept)
        run.write_log(0, 0, left.pop(0))

        def sleep(seconds: float) -> None:
            now[0] += seconds
            if now[0] % logs._LOGS_INTERVAL_S == 0:
                run.write_log(0, 0, left.pop(0))
                if not left:
                    run.write_status({"status": "completed", "step": 7})

        monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
        return [piece for _, piece in logs.log_pieces(run, None, follow=True, warn=pytest.fail)]

    return look


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param([b"".join(LINES[:100]), b"".join(LINES)], id="all of it"),
        pytest.param([b"".join(LINES[first : first + 200]) for first in range(0, 201, 40)], id="only its end"),
        pytest.param([LINES[0].partition(b"\xb5")[0], b"".join(LINES)], id="a piece that ends within a character"),
    ],
)
def test_each_line_is_printed_once_however_much_of_the_log_is_kept(follow_looks, monkeypatch, kept):
    monkeypatch.setattr(logs, "_TAIL_BYTES", 64)
    printed = follow_looks(kept)
    assert "".join(printed) == b"".join(LINES).decode()
    assert len(printed) == len(kept)


def test_a_log_that_has_nothing_of_what_was_printed_is_printed_whole(follow_looks):
    assert follow_looks([LINES[0], LINES[7]]) == [LINES[0].decode(), LINES[7].decode()]


def test_logs_are_read_as_often_as_they_are_kept(follow_looks, monkeypatch):
    reads, read_log = [], RunDirectory.read_log

    def counted(run: RunDirectory, name: str) -> bytes:
        reads.append(logs.time.monotonic())
        return read_log(run, name)

    monkeypatch.setattr(RunDirectory, "read_log", counted)
    follow_looks([LINES[0]] * 4)
    assert reads == [0.0, 20.0, 40.0, 60.0]
