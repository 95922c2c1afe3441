"""A crash, or a lie of the store, at every storage call; ``python -m tests.faults.crashes`` does all of it."""

from pathlib import Path

import pytest

from tests.faults.crashes import enumerate_runs, place_at
from tests.faults.enumeration import GOOD
from tests.faults.lives import OurRuns
from tests.faults.stock_lives import StockRuns


@pytest.mark.parametrize(("store", "acts"), [("memory", 3), ("folder", 3), ("s3", 1), ("sftp", 1)])
def test_no_crash_costs_a_checkpoint(store: str, acts: int, tmp_path: Path) -> None:
    with place_at(store, tmp_path) as place:
        tally = enumerate_runs(OurRuns(), place, acts)
    assert tally.told == []
    assert tally.num_points == sum(map(tally.count, GOOD))
    kills = sum(count for (kind, _), count in tally.outcomes.items() if kind in ("before", "after"))
    assert tally.outcomes["before", "resumed"] + tally.outcomes["after", "resumed"] == kills, "no kill costs anything"
    assert tally.num_points >= (450 if acts == 3 else 40)
    assert tally.count("fell back") >= 4, "a store that loses parts is found out"


@pytest.mark.filterwarnings("ignore:The .* method is deprecated")  # in Ray
def test_the_enumeration_finds_what_there_is_to_find(tmp_path: Path) -> None:
    """Stock Ray Train's snapshot, once torn, cannot be started from."""
    with place_at("folder", tmp_path) as place:
        tally = enumerate_runs(StockRuns(), place)
    assert tally.outcomes["torn", "cannot start"] > 0
