"""Whether the nodes of a cluster reach the store of the submitter: told by what each side finds of the other's."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.capacity import Capacity
from cluster.errors import ClusterError, StorageError
from cluster.inspection import store as store_check
from cluster.inspection.nodes import store_error
from cluster.inspection.store import inspect_cluster
from cluster.scheduler import ClusterReport, Job, JobRequest, Needs, NodeReport, Scheduler
from cluster.storage.store import Store


class Nodes(Scheduler):
    """Nodes that each see a store of their own choice at the URL of the submitter.

    Attributes:
        places: The folder of each node, by its id; None: that node claims to have no trouble, and does nothing.
        seen: What there was in the submitter's store once all had answered.
    """

    def __init__(self, places: dict[str, Path | None], silent: tuple[str, ...] = ()) -> None:
        self.places, self.silent, self.seen = places, silent, list[str]()

    def inspect(self, needs: Needs) -> ClusterReport:
        reports = []
        for node, place in self.places.items():
            own = Needs(store=str(place), variables=(), check=needs.check)
            error = "" if place is None else store_error(own, node).replace(str(place), needs.store)
            reports.append(NodeReport(id=node, address=node, versions={}, missing=(), store_error=error))
        self.seen = Store(needs.store).names()
        return ClusterReport(capacity=Capacity(nodes=(), limits=None), nodes=reports, silent=self.silent)

    def report(self, job_id: str) -> ClusterReport:
        raise NotImplementedError

    starts_at_once = True

    def begin(self, request: JobRequest) -> Job:
        raise NotImplementedError

    def script(self, request: JobRequest) -> str:
        raise NotImplementedError

    def read(self, job_id: str) -> Job | None:
        raise NotImplementedError

    def jobs(self) -> list[Job]:
        raise NotImplementedError

    def stop(self, job_id: str) -> None:
        raise NotImplementedError

    def log(self, job_id: str) -> str:
        raise NotImplementedError


def errors(nodes: Nodes, store: Path) -> list[str]:
    return [node.store_error for node in inspect_cluster(nodes, Store(str(store)), ()).nodes]


@pytest.mark.parametrize("is_there", [True, False])
def test_nodes_that_share_the_store(tmp_path: Path, is_there: bool) -> None:
    store = tmp_path / "all/runs"
    if is_there:
        store.mkdir(parents=True)
    nodes = Nodes({"a": store, "b": store})
    assert errors(nodes, store) == ["", ""]
    (folder,) = {Path(name).parent.name for name in nodes.seen}
    assert nodes.seen == [f"{folder}/a", f"{folder}/b", f"{folder}/submitter"]
    assert list(tmp_path.rglob("*")) == ([store.parent, store] if is_there else [])


def test_a_folder_that_each_node_has_for_itself(tmp_path: Path) -> None:
    (tmp_path / "of-b").mkdir()
    store = tmp_path / "runs"
    message = f"{store}: is a folder of its own there, not the one here"
    nodes = Nodes({"a": store, "b": tmp_path / "of-b", "c": tmp_path / "of-c", "d": None})
    assert errors(nodes, store) == ["", message, message, message]
    assert list(tmp_path.rglob("*")) == [tmp_path / "of-b"]


def test_an_answer_must_be_the_text_that_was_written(tmp_path: Path) -> None:
    class Liar(Nodes):
        def inspect(self, needs: Needs) -> ClusterReport:
            Store(needs.store).write(f"{needs.check}/a", b"anything")
            return super().inspect(needs)

    assert errors(Liar({"a": None}), tmp_path / "runs") == [
        f"{tmp_path}/runs: is a folder of its own there, not the one here"
    ]


def test_what_a_node_could_not_do_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Store) -> None:
        raise StorageError("/s: cannot delete probe-1: Permission denied; check")

    monkeypatch.setattr(Store, "probe", refuse)
    assert errors(Nodes({"a": tmp_path / "runs"}), tmp_path / "runs") == [
        "/s: cannot delete probe-1: Permission denied; check"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ClusterError, KeyboardInterrupt])
def test_nothing_is_left_of_an_inspection_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    class Failing(Nodes):
        def inspect(self, needs: Needs) -> ClusterReport:
            super().inspect(needs)
            raise error("it fails")

    store = tmp_path / "runs"
    with pytest.raises(error):
        errors(Failing({"a": store}), store)
    assert list(tmp_path.iterdir()) == []


def test_what_others_write_meanwhile_stays(tmp_path: Path) -> None:
    store = tmp_path / "all/runs"

    class Busy(Nodes):
        def inspect(self, needs: Needs) -> ClusterReport:
            Store(needs.store).write("other/job.yaml", b"")
            return super().inspect(needs)

    assert errors(Busy({"a": store}), store) == [""]
    assert Store(str(store)).names() == ["other/job.yaml"]
    assert [path.name for path in store.iterdir()] == ["other"]


def test_a_node_that_answers_too_late_leaves_nothing(tmp_path: Path) -> None:
    """It is not among the reports, and may have written all the same."""
    store = tmp_path / "runs"

    class Late(Nodes):
        def inspect(self, needs: Needs) -> ClusterReport:
            store_check.answer(Store(needs.store), needs.check, "late")
            return super().inspect(needs)

    assert errors(Late({"a": store}, silent=("late",)), store) == [""]
    assert list(tmp_path.iterdir()) == []


def test_what_killed_submitters_and_late_nodes_have_left_is_deleted_by_a_later_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "all/runs"
    store = Store(str(runs))

    class Killed(Nodes):
        def inspect(self, needs: Needs) -> ClusterReport:
            store.write(f"{needs.check}/late", b"")
            store.write(f"{needs.check}-of-a-person/x", b"")
            monkeypatch.setattr(store_check, "_delete", lambda *_: None)
            return super().inspect(needs)

    now, delete = time.time(), store_check._delete
    monkeypatch.setattr(store_check, "time", SimpleNamespace(time=lambda: now))
    assert errors(Killed({"a": runs}), runs) == [""]
    monkeypatch.setattr(store_check, "_delete", delete)
    left = store.names()
    assert len(left) == 4
    now += 3600.0
    assert errors(Nodes({"a": runs}), runs) == [""]
    assert store.names() == left, "it may be going on"
    now += 24 * 3600.0
    assert errors(Nodes({"a": runs}), runs) == [""]
    (kept,) = store.names()
    assert kept.endswith("-of-a-person/x")
    assert [path.name for path in runs.iterdir()] == [kept.partition("/")[0]]


def test_a_check_does_not_fail_for_what_others_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Store) -> list[str]:
        raise StorageError("/s: cannot list it: Permission denied; check")

    monkeypatch.setattr(Store, "folders", refuse)
    assert errors(Nodes({"a": tmp_path / "runs"}), tmp_path / "runs") == [""]


def test_requests_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def method(*arguments: object) -> object:
            calls.append(name)
            return call(*arguments)

        return method

    nodes = Nodes({"a": tmp_path, "b": tmp_path})
    for name in ("read", "write", "delete", "names", "folders"):
        monkeypatch.setattr(Store, name, counted(name, getattr(Store, name)))
    assert errors(nodes, tmp_path) == ["", ""]
    of_a_node = ["read", "write", "read", "delete", "write"]
    assert calls == ["write", *of_a_node, *of_a_node, "names", "read", "read", "names", "delete", "folders"]
