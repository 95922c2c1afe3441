"""A temporary folder that cannot be used: one line names the variable to change, before anything starts."""

import errno
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.host import temporary_folder
from cluster.host.scratch import make_own_folder
from cluster.host.temporary_folder import TemporaryFolderError, check_socket_path, in_temporary_folder
from cluster.kinds.ray import LocalRay
from cluster.ray.session_folder import logs_path


@pytest.fixture
def short_path() -> Iterator[str]:
    """A folder with a shorter path than a test's own."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


def folder_of(num_bytes: int, parent: str) -> str:
    folder = os.path.join(parent, "é".ljust(num_bytes - len(os.fsencode(parent)) - 2, "x"))
    os.mkdir(folder)
    assert len(os.fsencode(folder)) == num_bytes
    return folder


def test_the_limit_is_the_kernels(short_path: str) -> None:
    below = "s" * 20
    fits = next(size for size in range(107, 0, -1) if is_accepted(size, below))
    for size, is_too_long in ((fits, False), (fits + 1, True)):
        path = os.path.join(folder_of(size, short_path), below)
        with socket.socket(socket.AF_UNIX) as listener:
            if is_too_long:
                with pytest.raises(OSError, match="too long"):
                    listener.bind(path)
            else:
                listener.bind(path)


def is_accepted(num_bytes: int, below: str) -> bool:
    try:
        check_socket_path("x" * num_bytes, below)
    except TemporaryFolderError:
        return False
    return True


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("how", ["too long", "a file", "not to be made"])
def test_ray_is_not_started_where_it_cannot_run(
    how: str, variable: str, short_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    (Path(short_path) / "file").touch()
    folders = {
        "too long": folder_of(55, short_path),
        "a file": os.path.join(short_path, "file"),
        "not to be made": "/proc/none",
    }
    monkeypatch.setenv(variable, folders[how])

    with pytest.raises(TemporaryFolderError, match=f"^{variable}: [^\n]*{folders[how]}[^\n]*; [^\n]*set ") as caught:
        LocalRay(2).joined()

    assert (caught.value.exit_code, caught.value.cause) == (5, "environment")
    assert logs_path() == f"{folders[how]}/ray/session_latest/logs"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_an_empty_variable_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(variable, "")
    with pytest.raises(TemporaryFolderError, match=f"^{variable}: must not be empty; unset it, or set it to a folder$"):
        LocalRay(2).joined()


@pytest.mark.parametrize(("platform", "variable"), [("linux", "TMPDIR"), ("darwin", "RAY_TMPDIR")])
def test_the_variable_that_ray_reads_there_is_named(
    platform: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(temporary_folder, "_MAX_SOCKET_BYTES", 20)
    with pytest.raises(TemporaryFolderError, match=f"^{variable}: must be a path of at most "):
        LocalRay(2).joined()


@pytest.mark.parametrize("name", ["a b", "none yet", "é"])
def test_any_other_folder_will_do(name: str, short_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", os.path.join(short_path, name))

    with LocalRay(2).joined():
        assert os.listdir(os.path.join(short_path, name)) == []


def fill(folder: Path) -> None:
    with (folder / "filler").open("ab") as file:
        file.write(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize))


def test_a_full_disk_is_told_with_the_variable(
    full_disk: Path, short_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink(full_disk, os.path.join(short_path, "disk"))
    monkeypatch.setenv("RAY_TMPDIR", os.path.join(short_path, "disk"))
    fill(full_disk)

    with pytest.raises(
        TemporaryFolderError, match="^RAY_TMPDIR: cannot write to .*: No space left on device; make room"
    ):
        LocalRay(2).joined()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_python_says_of_its_folder_is_told_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    calls: list[Callable[[], object]] = [make_own_folder, lambda: refuse()]
    for call in calls:
        with pytest.raises(TemporaryFolderError) as caught, in_temporary_folder():
            call()
        assert str(caught.value) == (
            f"TMPDIR: cannot write to {tmp_path}: {os.strerror(number)}; make room there, or set TMPDIR to another "
            "folder that can be written to"
        )
