"""A crash, or a lie of the store, at every storage call; ``python -m tests.faults.crashes`` does all of it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.crashes import enumerate_runs, place_at, place_on_s3, place_on_sftp
from tests.faults.enumeration import GOOD, Tally
from tests.faults.lives import OurRuns
from tests.faults.stock_lives import StockRuns
from tests.stores import S3Server, SSHServer, disk_in_memory


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory if that can be: processes are killed here and no machines, and on a disk it takes twice as long."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    with disk_in_memory(tmp_path / "disk", "64m") as disk:
        yield disk


@pytest.mark.usefixtures("calls_in_this_thread")
@pytest.mark.parametrize("store", ["memory", pytest.param("folder", marks=pytest.mark.slow)])
def test_no_crash_costs_a_checkpoint(store: str, folder: Path) -> None:
    with place_at(store, folder) as place:
        assert_nothing_lost(enumerate_runs(OurRuns(), place), least_points=450)


@pytest.mark.slow
def test_no_crash_of_a_first_save_on_s3_costs_a_checkpoint(s3: S3Server) -> None:
    with place_on_s3(s3) as place:
        assert_nothing_lost(enumerate_runs(OurRuns(), place, 1), least_points=40)


@pytest.mark.slow
def test_no_crash_of_a_first_save_on_sftp_costs_a_checkpoint(ssh: SSHServer) -> None:
    with place_on_sftp(ssh) as place:
        assert_nothing_lost(enumerate_runs(OurRuns(), place, 1), least_points=40)


def assert_nothing_lost(tally: Tally, least_points: int) -> None:
    assert tally.told == []
    assert tally.num_points == sum(map(tally.count, GOOD))
    kills = sum(count for (kind, _), count in tally.outcomes.items() if kind in ("before", "after"))
    assert tally.outcomes["before", "resumed"] + tally.outcomes["after", "resumed"] == kills, "no kill costs anything"
    assert tally.num_points >= least_points
    assert tally.count("fell back") >= 4, "a store that loses parts is found out"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .* method is deprecated")  # in Ray
def test_the_enumeration_finds_what_there_is_to_find(folder: Path) -> None:
    """Stock Ray Train's snapshot, once torn, cannot be started from."""
    with place_at("folder", folder) as place:
        tally = enumerate_runs(StockRuns(), place)
    assert tally.outcomes["torn", "cannot start"] > 0
