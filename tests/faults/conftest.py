from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.agent import FAULTS_VARIABLE
from cluster.faults import Fault, write_plan


@pytest.fixture
def make_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a plan for the commands that follow."""

    def make(*faults: Fault, name: str = "plan.json") -> Path:
        write_plan(faults, tmp_path / name)
        monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / name))
        return tmp_path / name

    return make
