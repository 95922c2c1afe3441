"""The wheel: what it holds, and that it runs where nothing else of the product is."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.command import CHECKOUT, LIMIT_S

PACKAGES = ("launcher", "jobs", "cluster")
WHERE = "import launcher, jobs, cluster; print(*(p.__file__ for p in (launcher, jobs, cluster)), sep='\\n')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for setuptools writes beside what it builds."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    for name in PACKAGES:
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", built, source)
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


@pytest.fixture
def tests_alone(tmp_path: Path) -> Path:
    """A folder to import the tests from, and nothing beside them."""
    folder = tmp_path / "beside"
    folder.mkdir()
    (folder / "tests").symlink_to(CHECKOUT / "tests")
    return folder


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def pip(*arguments: object) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "-q", *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert ended.returncode == 0, ended.stderr


def python(*arguments: str, cwd: Path, paths: list[Path], is_safe: bool = True) -> subprocess.CompletedProcess[str]:
    """``is_safe``: with -P, by which Python does not look in the working directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "WANDB_DIR": str(cwd)}
    return subprocess.run(
        [sys.executable, *(["-P"] if is_safe else []), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_it_holds_all_that_the_checkout_does(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    files = {
        path.relative_to(CHECKOUT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.yaml", "py.typed")
        for path in (CHECKOUT / package).rglob(pattern)
    }
    assert held == files
    assert {f"{package}/py.typed" for package in PACKAGES} | {"jobs/digits.yaml", "cluster/ray.yaml"} <= held


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("plan", "digits", "seed=x"), "command line: seed must be a whole number"),
        (("run", "digts"), "digts: is no file here, and no description that is shipped (did you mean 'digits'?)"),
        (("submit", "digits", "seed=x", "--cluster", "http://a:1"), "command line: seed must be a whole number"),
        (("plan", "digits", "--cluster", "rya"), "--cluster rya: is no cluster (did you mean 'ray'?)"),
    ],
)
def test_python_m_launcher_knows_what_is_shipped(
    target: Path, empty: Path, arguments: tuple[str, ...], error: str
) -> None:
    ended = python("-m", "launcher", *arguments, cwd=empty, paths=[target])
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"error: {error}")


def test_python_m_launcher_takes_nothing_from_the_working_directory(target: Path, empty: Path) -> None:
    for name in ("random", "signal", "click", "yaml", "jobs/__init__", "cluster/__init__"):
        (empty / name).parent.mkdir(exist_ok=True)
        (empty / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    ended = python("-m", "launcher", "plan", "digits", "seed=x", cwd=empty, paths=[target], is_safe=False)
    assert (ended.returncode, ended.stderr.startswith("error: command line: seed must be")) == (2, True), ended.stderr


@pytest.mark.slow
def test_a_shipped_description_runs_in_an_empty_folder(target: Path, empty: Path, tests_alone: Path) -> None:
    paths = [target, tests_alone]
    imported = python("-c", WHERE, cwd=empty, paths=paths)
    assert imported.stdout.split() == [str(target / package / "__init__.py") for package in PACKAGES]

    short = ("train.max_steps=3", "workers.num=1", "tracking.mode=disabled")
    ended = python("-m", "tests.launcher_without_ray", "run", "digits", *short, "--json", cwd=empty, paths=paths)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result["run"], result["step"]) == (str(empty / "runs/digits"), 3)
    environment = json.loads((empty / "runs/digits/environment.json").read_text())
    assert environment["import_paths"] == [str(empty)], "the folder of a shipped description is not the user's"
