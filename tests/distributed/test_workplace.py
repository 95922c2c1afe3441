"""A call in a worker's place: its environment, working directory and code, and how long it may take."""

import os
import threading
from pathlib import Path

import pytest

from cluster.capacity import WorkerResources
from cluster.errors import ClusterError
from cluster.process import fork_server
from cluster.process.orders import Task
from cluster.process.workplace import Call, call_here

HERE = __name__


@pytest.fixture(autouse=True)
def server() -> None:
    fork_server.start([])


def call_of(entry: str, working_directory: Path, *import_paths: Path, timeout_s: float | None = None) -> Call:
    return Call(
        task=Task(
            entry=f"{HERE}:{entry}",
            run_url="",
            import_paths=tuple(map(str, import_paths)),
            working_directory=str(working_directory),
            on_gpu=True,
        ),
        modules=(),
        resources=WorkerResources(cpus=1.0, gpus=0, accelerator=None),
        wait_s=1.0,
        start_timeout_s=1.0,
        timeout_s=timeout_s,
    )


def look_around(task: Task) -> tuple[str, str | None, str, bool]:
    import mine_alone

    return os.getcwd(), os.environ.get("GIVEN_TO_A_WORKER"), mine_alone.NAME, task.on_gpu


def wait_for_ever(_: Task) -> None:
    threading.Event().wait()


def test_it_finds_what_a_worker_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "mine_alone.py").write_text("NAME = 'mine'\n")
    monkeypatch.setenv("GIVEN_TO_A_WORKER", "a GPU")  # the fork server, which was started before, does not have it

    found = call_here(call_of("look_around", tmp_path / "work", tmp_path))

    assert found == (str(tmp_path / "work"), "a GPU", "mine", True)


def test_a_host_without_the_working_directory_is_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="the job cannot run on this host: .*No such file.*gone") as caught:
        call_here(call_of("look_around", tmp_path / "gone"))

    assert caught.value.cause == "environment"


def test_it_does_not_take_for_ever(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"^has not returned within 0.1 s$"):
        call_here(call_of("wait_for_ever", tmp_path, timeout_s=0.1))
