"""Whether Ray is told to send a token: where there is none, a cluster without one can still be joined."""

import os
from pathlib import Path

import pytest

from cluster import ray_cluster
from cluster.errors import ClusterError
from cluster.ray_token import find_token


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    made = {"HOME": str(tmp_path)}
    monkeypatch.setattr(os, "environ", made)
    return made


@pytest.mark.parametrize(
    ("joins", "has_token", "own", "mode"),
    [
        (True, True, None, "token"),
        (True, False, None, None),
        (True, True, "disabled", "disabled"),
        (False, False, None, "token"),  # Ray makes one for a cluster of its own
    ],
)
def test_the_mode(environment: dict[str, str], joins: bool, has_token: bool, own: str | None, mode: str | None) -> None:
    if has_token:
        environment["RAY_AUTH_TOKEN"] = "a" * 64
    if own is not None:
        environment["RAY_AUTH_MODE"] = own
    ray_cluster._set_environment(joins=joins)
    assert environment.get("RAY_AUTH_MODE") == mode
    assert environment["RAY_TRAIN_V2_ENABLED"] == "1"


def test_an_empty_file_holds_no_token(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("\n")
    assert find_token() is None
    environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path)
    with pytest.raises(ClusterError, match="Is a directory; give the cluster's token in RAY_AUTH_TOKEN"):
        find_token()
