"""Another Ray than the tests pass with is refused in one line, before anything of it is imported."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from cluster import versions
from cluster.errors import ClusterError
from cluster.versions import check_ray_version

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
OLDEST, NEWEST = (".".join(map(str, version)) for version in (versions._OLDEST_RAY, versions._NEWEST_RAY))
NEXT = f"{versions._NEWEST_RAY[0]}.{versions._NEWEST_RAY[1] + 1}"


def test_the_package_admits_the_same():
    (admitted,) = re.findall(r'"ray\[train\](.*?)"', PYPROJECT.read_text())
    assert admitted == f">={OLDEST},<{NEXT}"


@pytest.mark.parametrize("installed", [f"{OLDEST}.0", f"{NEWEST}.9", importlib.metadata.version("ray")])
def test_what_the_tests_pass_with(monkeypatch, installed):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: installed)
    check_ray_version()


@pytest.mark.parametrize("installed", ["2.9.3", f"{NEXT}.0", f"{NEXT}.0rc1", "3.0.0", "3.0.0.dev0"])
def test_another_is_refused_with_what_to_install(monkeypatch, installed):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: installed)
    with pytest.raises(ClusterError) as caught:
        check_ray_version()
    assert str(caught.value) == (
        f"Ray {installed} is installed, and launcher works with {OLDEST} to {NEWEST}, whose private parts it uses; "
        f"pip install 'ray[train]>={OLDEST},<{NEXT}'"
    )


def test_none_is_refused_in_the_same_way(monkeypatch):
    def find_none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", find_none)
    with pytest.raises(ClusterError) as caught:
        check_ray_version()
    assert str(caught.value) == (
        f"Ray is not installed, and launcher needs it, also to submit; pip install 'ray[train]>={OLDEST},<{NEXT}'"
    )


def test_private_parts_are_imported_where_they_are_named():
    root = PYPROJECT.parent
    named = {
        path.name
        for package in ("launcher", "jobs", "cluster")
        for path in root.glob(f"{package}/**/*.py")
        if re.search(r"^\s*(from|import) ray\.(_private|train\.v2|.*_internal)", path.read_text(), re.M)
    }
    assert named == {"private_train.py", "private_core.py"}
