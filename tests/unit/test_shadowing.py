"""Names that a module of the user's has in common with what comes before it."""

import importlib.metadata
import random
import re
import sys
from pathlib import Path

import pytest

import jobs.models
from cluster.errors import DescriptionError
from cluster.host import import_paths
from cluster.host.import_paths import REQUIRED
from jobs.components.shadowing import check_imports
from jobs.components.targets import resolve

CHECKOUT = Path(__file__).parents[2]
MODEL = "class Model:\n    pass\n"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is searched last; before it one that things are installed in."""
    mine, installed = tmp_path / "mine", tmp_path / "installed"
    mine.mkdir()
    installed.mkdir()
    (installed / "lib_of_all.py").write_text("class Other:\n    pass\n")
    monkeypatch.setattr(import_paths, "_users_paths", ())
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    modules = set(sys.modules)
    import_paths.search_last([str(mine)])
    yield mine
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / f"{name.replace('__in__', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


FOLDER = "Python's own random comes first; rename the folder random"
PYTHONS = "Python's own random comes first; rename the file"
OURS = "the launcher's own jobs comes first; rename the folder jobs"
INSTALLED = "the installed lib_of_all in {installed} comes first; rename the file, or uninstall that"


@pytest.mark.parametrize(
    ("files", "named", "hidden", "why"),
    [
        ({"random": MODEL}, "random.Model", "random.py", PYTHONS),
        ({"random": "from a import Model\n"}, "random.Model", "random.py", PYTHONS),
        ({"random": "try:\n    Model = 1\nfinally:\n    pass\n"}, "random.Model", "random.py", PYTHONS),
        ({"random": "class Random:\n    pass\n"}, "random.Random", "random.py", PYTHONS),
        ({"random": MODEL}, "random.Modle", "random.py", PYTHONS),
        ({"random": "raise OSError\nclass Model(:"}, "random.Model", "random.py", PYTHONS),
        ({"random": MODEL}, "random.Model.build", "random.py", PYTHONS),
        ({"sys": MODEL}, "sys.Model", "sys.py", "Python's own sys comes first; rename the file"),
        ({"os": MODEL}, "os.Model", "os.py", "Python's own os comes first; rename the file"),
        ({"random__in____init__": MODEL}, "random.Model", "random/__init__.py", FOLDER),
        ({"jobs__in__models": MODEL}, "jobs.models.Model", "jobs/models.py", OURS),
        ({"jobs__in__models": "class Net:\n    pass\n"}, "jobs.models.Net", "jobs/models.py", OURS),
        ({"jobs__in__nets": MODEL, "jobs__in____init__": ""}, "jobs.nets.Model", "jobs/nets.py", OURS),
        ({"jobs__in____init__": MODEL}, "jobs.Model", "jobs/__init__.py", OURS),
        ({"lib_of_all": MODEL}, "lib_of_all.Model", "lib_of_all.py", INSTALLED),
        ({"lib_of_all": "class Other:\n    text = 1\n"}, "lib_of_all.Other", "lib_of_all.py", INSTALLED),
    ],
)
def test_a_name_that_is_hidden_is_an_error(
    mine: Path, files: dict[str, str], named: str, hidden: str, why: str
) -> None:
    write(mine, **files)
    with pytest.raises(DescriptionError) as caught:
        resolve(named, "model")
    why = why.format(installed=mine.parent / "installed")
    assert str(caught.value) == (
        f"model._target_ {named!r}: {mine / hidden} is not found under that name, because {why}"
    )


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"random": MODEL, "jobs__in____init__": MODEL}, "jobs.models.Net"),
        ({"jobs__in__models": MODEL}, "jobs.models.Net"),
        ({"jobs__in__models": (CHECKOUT / "jobs/models.py").read_text(), "jobs__in__parts": ""}, "jobs.models.Net"),
        ({"random": MODEL}, "random.Random"),
        ({"random": "class Random(:"}, "random.Random"),
        ({"lib_of_all": MODEL}, "lib_of_all.Other"),
        ({"lib_of_all": "class Other:\n    pass\n"}, "lib_of_all.Other"),
        ({"torch": MODEL, "random": MODEL, "own_model": f"import random, torch\n{MODEL}"}, "own_model.Model"),
        ({"torch__in____init__": MODEL}, "torch.nn.Linear"),
    ],
)
def test_what_cannot_matter_is_none(mine: Path, files: dict[str, str], named: str) -> None:
    write(mine, **files)
    found = resolve(named, "model")
    assert found.__name__ == named.rpartition(".")[2]
    check_imports()


@pytest.mark.parametrize("linked", ["own_linked.py", "own_linked"])
def test_a_module_of_the_users_may_be_a_symbolic_link(mine: Path, linked: str) -> None:
    elsewhere = mine.parent / "elsewhere"
    write(elsewhere, other=MODEL, __init__=MODEL)
    (mine / linked).symlink_to(elsewhere / "other.py" if linked.endswith(".py") else elsewhere)
    assert resolve("own_linked.Model", "model").__module__ == "own_linked"
    check_imports()


def test_what_a_description_misspells_is_told_as_such(mine: Path) -> None:
    write(mine, jobs__in____init__=MODEL, torch=MODEL)
    with pytest.raises(DescriptionError, match=r"jobs\.models has no 'Nett' \(did you mean 'Net'\?\)$"):
        resolve("jobs.models.Nett", "model")


def test_a_module_that_imports_what_hides_another_of_the_users_is_an_error(mine: Path) -> None:
    write(
        mine, lib_of_all=MODEL, own_a="import lib_of_all\n", own_b="from lib_of_all import Other\nfrom random import *"
    )
    check_imports()
    for name in ("own_a", "own_b"):
        __import__(name)
        with pytest.raises(DescriptionError) as caught:
            check_imports()
        assert str(caught.value) == (
            f"{mine / name}.py: imports lib_of_all, but {mine / 'lib_of_all.py'} is not found under that name, because "
            + INSTALLED.format(installed=mine.parent / "installed")
        )
        del sys.modules[name]


def test_the_users_folders_are_searched_last_and_in_their_order(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = str(mine / "a"), str(mine / "b")
    monkeypatch.setattr(sys, "path", [second, *sys.path])
    import_paths.search_last([first, second, first])
    assert sys.path[-3:] == [str(mine), first, second]
    assert sys.path.count(second) == 1
    assert import_paths.users_paths() == (str(mine), first, second)
    assert (random.__name__, jobs.models.__name__) == ("random", "jobs.models")


def test_what_the_launcher_requires_is_what_pyproject_says() -> None:
    lines = [line for line in importlib.metadata.requires("launcher") or () if "extra ==" not in line]
    required = {re.split(r"[\[<>=~ ;]", line)[0] for line in lines}
    providers = importlib.metadata.packages_distributions()
    assert {name.lower() for module in REQUIRED for name in providers[module]} == required
