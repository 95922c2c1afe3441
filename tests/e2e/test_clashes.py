"""Files of the user's with names that others have: they disturb nothing, and to name one is an error."""

from pathlib import Path

import pytest

from tests.e2e.command import launcher
from tests.e2e.test_own_parts import JOB, MINE

NAMES = (
    "ray", "torch", "wandb", "numpy", "random", "signal", "queue", "json", "statistics", "jobs/__init__", "jobs/models",
    "cluster/__init__", "launcher/__init__", "launcher/cli",
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "own.yaml").write_text(JOB)
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("class Model:\n    pass\nraise SystemExit('the wrong one')\n")
    return tmp_path


@pytest.mark.parametrize("on_ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_nobody_names_disturbs_nothing(home: Path, on_ray: bool) -> None:
    ended = launcher("run", "own.yaml", "train.max_steps=2", "data.loaders=1", "--json", cwd=home, on_ray=on_ray)
    assert ended.exit_code == 0, ended.stderr
    assert ended.document["step"] == 2
    assert "wrong one" not in ended.stderr


def test_to_name_one_is_an_error_of_one_line(home: Path) -> None:
    refused = launcher("plan", "own.yaml", "model={_target_: jobs.models.Model}", cwd=home)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1] == (
        f"error: own.yaml: model._target_ 'jobs.models.Model': {home}/jobs/models.py is not found under that name, "
        "because the launcher's own jobs comes first; rename the folder jobs"
    )
    assert "Traceback" not in refused.stderr
