"""Which job description is meant, and what is the user's of one that is shipped."""

from pathlib import Path

import pytest

from cluster.errors import DescriptionError
from launcher.code.packing import directory_in_code, pack_job
from launcher.code.user_code import code_folder, make_import_paths
from launcher.config.job_files import SHIPPED, find_job


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_name_is_that_of_a_shipped_description():
    assert [find_job(name) for name in ("digits", "resnet50")] == [SHIPPED / "digits.yaml", SHIPPED / "resnet50.yaml"]


def test_a_file_here_comes_first(here):
    (here / "digits.yaml").touch()
    assert find_job("digits") == Path("digits.yaml")
    (here / "digits").touch()
    assert find_job("digits") == Path("digits")


def test_a_folder_here_is_no_file(here):
    (here / "digits").mkdir()
    (here / "data").mkdir()
    assert find_job("digits") == SHIPPED / "digits.yaml"
    assert find_job("data") == Path("data")


@pytest.mark.parametrize("path", ["digits.yaml", "nowhere.yml", "./digits", "nowhere/digits", "digits.v2"])
def test_what_looks_like_a_path_is_one(path):
    assert find_job(path) == Path(path)


@pytest.mark.parametrize(
    ("named", "meant"), [("digts", " (did you mean 'digits'?)"), ("miine", " (did you mean 'mine'?)"), ("x", "")]
)
def test_an_unknown_name_is_told_with_the_nearest(here, named, meant):
    (here / "mine.yaml").touch()
    (here / "._miine.yaml").touch()  # macOS leaves such files on disks of other systems
    with pytest.raises(DescriptionError) as caught:
        find_job(named)
    assert str(caught.value) == (
        f"{named}: is no file here, and no description that is shipped{meant}; write the path of a YAML file, or one "
        "of caltech101, digits, finetune, resnet50"
    )


def test_of_a_shipped_one_only_modules_of_the_working_directory_are_the_users(here):
    (here / "mine.py").touch()
    (here / "notes.txt").touch()
    assert make_import_paths(SHIPPED) == (str(here),)
    assert code_folder(SHIPPED) == here
    assert directory_in_code(SHIPPED) is None
    assert pack_job(SHIPPED, []).names == ()
    assert pack_job(SHIPPED, ["mine"]).names == ("mine.py",)


def test_an_error_about_the_code_of_a_shipped_one_names_the_working_directory(here):
    (here / "mine").mkdir()
    (here / "mine/net.py").touch()
    (here / "mine/.gitignore").write_text("net.py\n")
    with pytest.raises(DescriptionError, match=f"^{here}: mine.net would be missing on the cluster"):
        pack_job(SHIPPED, ["mine.net"])


def test_a_package_of_the_users_called_jobs_is_packed(here):
    package = here / "jobs"
    package.mkdir()
    for name in ("__init__.py", "own.yaml"):
        (package / name).touch()
    assert make_import_paths(package) == (str(here),)
    assert pack_job(package, []).names == ("jobs/__init__.py", "jobs/own.yaml")
