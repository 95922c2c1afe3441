"""Files of the user's with names that others have: they disturb nothing, and to name one is an error."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.command import CHECKOUT, Ended, Running, launcher
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


def schema(*options: str, cwd: Path, python_path: Sequence[object]) -> Ended:
    """Runs ``launcher schema`` with these folders in ``PYTHONPATH``."""
    given = f"PYTHONPATH={os.pathsep.join(map(str, python_path))}"
    return Running(("schema", *options), cwd, lambda command: ["env", given, *command]).wait()


@pytest.mark.parametrize(
    ("hidden", "whose"),
    [
        ("random.py", "Python's own random"),
        ("queue/__init__.py", "Python's own queue"),
        ("cluster/__init__.py", "the launcher's own cluster"),
        ("jobs/__init__.py", "the launcher's own jobs"),
        ("wandb.py", "the package wandb"),
    ],
)
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "working directory"])
def test_a_module_of_python_path_that_hides_another_is_an_error_of_one_line(
    hidden: str, whose: str, is_named: bool, tmp_path: Path
) -> None:
    (tmp_path / hidden).parent.mkdir(exist_ok=True)
    (tmp_path / hidden).write_text("raise SystemExit('the wrong one')\n")

    refused = schema("--json", cwd=tmp_path, python_path=[tmp_path if is_named else "", CHECKOUT])

    assert refused.exit_code == 2, refused.stderr
    assert refused.document["error"] == (
        f"PYTHONPATH: {(tmp_path / hidden.removesuffix('/__init__.py'))} comes before {whose}; rename it, or take its "
        "folder out of PYTHONPATH: modules beside the job file are found without it"
    )
    assert refused.stderr == f"error: {refused.document['error']}\n"


def test_other_modules_of_python_path_are_the_users_affair(tmp_path: Path) -> None:
    for name in ("test", "data", "ray/__init__", "mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")

    shown = schema(cwd=tmp_path, python_path=[CHECKOUT, tmp_path / "no folder", tmp_path, Path(os.__file__).parent])

    assert (shown.exit_code, shown.stderr) == (0, "")
