"""The kernel's counts of processes killed for want of memory, read from files such as it writes."""

import os
from pathlib import Path

import pytest

from cluster.host import oom
from cluster.host.oom import OomKills

EVENTS = "low 0\nhigh 0\nmax 7\noom 1\noom_kill {}\noom_group_kill 0\n"


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that counts for this process's cgroup."""
    monkeypatch.setattr(oom, "_CGROUPS", tmp_path)
    (tmp_path / "memory.events").write_text(EVENTS.format(2))
    return tmp_path / "memory.events"


def test_a_kill_counts_from_the_start_of_the_process(counts: Path) -> None:
    kills = OomKills(os.getpid())
    assert not kills.any_lately()
    counts.write_text(EVENTS.format(3))
    assert kills.any_lately()
    kills.look()
    assert kills.any_lately(), "a look a moment later changes nothing"


def test_what_is_long_past_is_no_evidence(counts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = OomKills(os.getpid())
    counts.write_text(EVENTS.format(3))
    monkeypatch.setattr(oom, "_LATELY_S", 0.0)
    kills.look()
    assert kills.any_lately(), "it may have been just before the look"
    kills.look()
    assert not kills.any_lately()


@pytest.mark.parametrize("own", [None, "low 0\n"], ids=["no file", "an old kernel"])
def test_where_no_cgroup_tells_the_host_does(
    own: str | None, tmp_path: Path, counts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = tmp_path / "vmstat"
    host.write_text("pgfault 9\noom_kill 4\n")
    monkeypatch.setattr(oom, "_HOST_COUNTS", host)
    counts.unlink() if own is None else counts.write_text(own)
    kills = OomKills(os.getpid())
    host.write_text("pgfault 9\noom_kill 5\n")
    assert kills.any_lately()
