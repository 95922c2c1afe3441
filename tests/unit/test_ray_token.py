"""Whether Ray is told to send a token: where there is none, a cluster without one can still be joined."""

import os
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.ray import cluster
from cluster.ray.token import find_token, known_tokens, token_files


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
    cluster._set_environment(joins=joins)
    assert environment.get("RAY_AUTH_MODE") == mode
    assert environment["RAY_TRAIN_V2_ENABLED"] == "1"


def test_an_empty_file_holds_no_token(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("\n")
    assert find_token() is None
    environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path)
    with pytest.raises(ClusterError, match="Is a directory; give the cluster's token in RAY_AUTH_TOKEN"):
        find_token()


@pytest.mark.parametrize("source", ["variable", "named file", "usual file"])
@pytest.mark.parametrize(
    ("text", "token"),
    [
        (b"s3cret\n", "s3cret"),
        (b" \ts3cret\r\n\n", "s3cret"),
        (b" \n", None),
        (b"s3\ncret", ClusterError),
        (b"s3 cret", ClusterError),
        (b"s3cret\x7f", ClusterError),
        ("s3crèt".encode(), ClusterError),
        (b"s3cret\xff", ClusterError),
    ],
)
def test_what_is_around_a_token_is_removed_and_what_is_none_is_not_shown(
    environment: dict[str, str], tmp_path: Path, source: str, text: bytes, token: str | type[ClusterError] | None
) -> None:
    if source == "variable":
        environment["RAY_AUTH_TOKEN"] = os.fsdecode(text)
    else:
        path = tmp_path / ("own" if source == "named file" else ".ray/auth_token")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
        if source == "named file":
            environment["RAY_AUTH_TOKEN_PATH"] = str(path)
    if token is not ClusterError:
        assert find_token() == token
        return
    with pytest.raises(ClusterError, match="give the cluster's token in RAY_AUTH_TOKEN") as caught:
        find_token()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_source_is_known(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("usual\n")
    (tmp_path / "own").write_text("named\n")
    environment |= {"RAY_AUTH_TOKEN": "variable\n", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "own")}
    assert token_files() == [tmp_path / "own", tmp_path / ".ray/auth_token"]
    assert known_tokens() == ["variable", "named", "usual"]
    (tmp_path / "own").write_bytes(b"\xff")
    (tmp_path / ".ray/auth_token").unlink()
    assert known_tokens() == ["variable"]
