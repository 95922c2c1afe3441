"""The bytes that leave a host, as its interface counts them."""

import json
import subprocess
import sys

import pytest

from tests.faults.hosts import CHECKOUT, why_there_can_be_none

LIMIT_S = 300.0


@pytest.mark.slow
@pytest.mark.skipif(why_there_can_be_none() is not None, reason=str(why_there_can_be_none()))
def test_the_bytes_that_leave_a_host() -> None:
    """At most 3% more than the least, headers and acknowledgements included, and fewer than of DDP."""
    layouts = ("2x2", "3+2+1:8")
    command = [sys.executable, "-m", "tests.benchmarks.exchange", "--rates", "unlimited", "--rounds", "2", "--mb", "5"]
    ran = subprocess.run(
        [*command, "--layouts", *layouts], cwd=CHECKOUT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout.splitlines()[-1])["rows"]
    bytes_of = {(row["layout"], row["arm"]): row["bytes"] for row in rows}
    least = {row["layout"]: row["least"] for row in rows}
    for layout in least:
        assert bytes_of[layout, "exact"] <= 1.03 * least[layout]
        assert bytes_of[layout, "exact"] < bytes_of[layout, "ddp"]
    assert len(least) == len(layouts)
