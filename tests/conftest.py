"""What holds for the whole suite: it leaves nothing behind, however it ends; one server of a kind a process."""

import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.host.signals import ASKING
from cluster.process import fork_server
from cluster.storage import retrying_calls
from cluster.storage.deadline import Started
from cluster.storage.local import SyncedLocalFileSystem
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from tests.e2e.command import end_all
from tests.faults.injection import Fault, environment, write_plan
from tests.janitor import Janitor
from tests.stores import S3Server, SSHServer, disk_in_memory, s3_server, ssh_server

_JANITOR = pytest.StashKey[Janitor]()
_FORKED_NEEDS = (
    "jobs.training.worker", "jobs.components.metrics", "launcher.planning.dry_run", "launcher.display.plots",
    "matplotlib.backends.backend_agg", "matplotlib.figure", "tests.launcher_without_ray",
)  # fmt: skip
"""What the server that processes are forked from imports, whichever test starts it."""
_SLOW_FIRST = (
    "test_hosts", "test_every_key", "test_crashes", "test_from_a_laptop", "test_fence", "test_storage",
    "test_slurm_runs", "test_kills", "test_room",
)  # fmt: skip
"""Of the slow tier: what takes longest, and beside ``test_hosts`` and ``test_from_a_laptop`` what takes little memory.

A process is given its next file when it begins the last test of one, so ``test_from_a_laptop`` follows ``test_hosts``.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-device", choices=["cuda", "cpu"], default="cuda", help="cpu: try the tests of the GPU tier without a GPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds like Ctrl-C
    if not hasattr(config, "workerinput"):  # the first process, not one of xdist's workers
        config.stash[_JANITOR] = Janitor()
    start: Any = fork_server.start
    replaced: Any = fork_server
    replaced.start = lambda modules: start([*dict.fromkeys([*modules, *_FORKED_NEEDS])])


@pytest.fixture(autouse=True)
def _signals_are_put_back() -> Iterator[None]:
    """A driver that has ended ignores the signals that only ask for a stop, until its process ends."""
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For other tiers, files without a test of the tier: to import them all takes each process ten seconds.

    Some import what a machine that only runs the GPU tier need not have.
    """
    tier = config.option.markexpr
    is_of_tests = collection_path.match("test_*.py") and tier in ("slow", "gpu")
    return True if is_of_tests and f"pytest.mark.{tier}" not in collection_path.read_text() else None


@pytest.hookimpl(tryfirst=True)  # while the slow tests of the default tier are there still
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, so that all of xdist's processes have something to do until the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    unnamed = [path.name for path in slow if "pytest.mark.slow" not in path.read_text()]
    assert not unnamed, f"write pytest.mark.slow in the files of slow tests themselves, in {unnamed}"
    folder = {name: number for number, name in enumerate(("faults", "e2e", "distributed", "contract", "unit"))}
    items.sort(key=lambda item: folder.get(item.path.parent.name, -1))
    if config.option.markexpr == "slow":
        first = {name: number for number, name in enumerate(_SLOW_FIRST)}
        items.sort(key=lambda item: first.get(item.path.stem, len(first)))


def pytest_unconfigure(config: pytest.Config) -> None:
    if _JANITOR in config.stash:
        finish: Any = multiprocessing.util
        finish._run_finalizers()  # while there still is what they remove
        print(config.stash[_JANITOR].finish(), end="")


@pytest.fixture(autouse=True)
def _no_command_outlives_its_test() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def make_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a plan of faults for the commands that follow."""

    def make(*faults: Fault, name: str = "plan.json") -> Path:
        plan = tmp_path / name
        write_plan(faults, plan)
        for variable, value in environment(plan).items():
            monkeypatch.setenv(variable, value)
        return plan

    return make


@pytest.fixture
def calls_in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For stores that never hang: to hand a call to a thread takes ten times as long as the call."""

    def start(function: Callable[[], Any]) -> Started[Any]:
        started: Started[Any] = Started()
        try:
            started.set_result(function())
        except BaseException as error:
            started.set_exception(error)
        return started

    monkeypatch.setattr(retrying_calls, "start", start)


@pytest.fixture
def own_indexes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No index of another test, nor of the user who runs this."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    use_index_files(IndexFiles())
    yield
    use_index_files(IndexFiles())


@pytest.fixture
def local_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of a local file so far."""
    read, sizes = SyncedLocalFileSystem.cat_file, list[int]()

    def counted(*args: Any, **kwargs: Any) -> bytes:
        content: bytes = read(*args, **kwargs)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(SyncedLocalFileSystem, "cat_file", counted)
    return sizes


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    with ssh_server(tmp_path_factory.mktemp("ssh")) as server:
        yield server


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    with disk_in_memory(tmp_path / "disk", "1m") as disk:
        yield disk
