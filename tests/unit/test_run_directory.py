"""What lies where in a run's directory."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
from sleeping import replace_sleep

from cluster.errors import StorageError
from cluster.run.lease import SupersededError
from cluster.run.run_directory import RunDirectory, list_runs
from cluster.storage.store import MissingObject, Store
from tests import saved


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "runs" / "digits"))


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
    """The pauses asked for, none of them made."""
    asked: list[float] = []
    replace_sleep(monkeypatch, asked.append)
    return asked


def test_every_name_of_a_run(run):
    run.take_lease()
    run.write_job("name: digits\n")
    run.write_environment({"torch": "2.13"})
    run.write_status({"step": 5})
    run.write_tracker_id("abc")
    assert run.write_picture("curves", b"png") == f"{run.url}/curves.png"
    run.write_matrix("val-confusion", {"step": 5})
    run.write_log(0, 12, b"hello")
    part = run.checkpoints.write_part(5, ("model", 0), b"1")
    for log in (run.metrics(), run.events()):
        log.append({"step": 5})
        log.flush()
        log.publish()
    names = [re.sub("00000001-[0-9a-f]{8}", "CLAIM", name) for name in run.store.names()]
    assert names == [
        "checkpoints/fences/CLAIM-after-00000000", f"checkpoints/{part.object}", "curves.png", "drivers/CLAIM.json",
        "environment.json", "events.jsonl", "events/CLAIM-00000000-from-00000000.jsonl", "events/CLAIM-00000002.jsonl",
        "job.yaml", "logs/attempt-000-worker-012.log", "matrices/val-confusion.json", "metrics.jsonl",
        "metrics/CLAIM-00000000-from-00000000.jsonl", "metrics/CLAIM-00000002.jsonl", "tracker.json",
    ]  # fmt: skip
    assert (run.name, run.read_job(), run.read_environment()) == ("digits", "name: digits\n", {"torch": "2.13"})
    status = run.read_status()
    assert (status["step"], status["pid"], run.read_tracker_id()) == (5, os.getpid(), "abc")
    assert run.events().read() == [{"seq": 0, "step": 5}]


def test_a_run_that_is_not_there(run, tmp_path):
    assert not run.exists()
    assert (run.read_status(), run.read_tracker_id(), run.read_environment()) == (None, None, {})
    assert (run.log_names(), run.metrics().read(), run.checkpoints.steps()) == ([], [], [])
    assert run.read_matrices() == {}
    with pytest.raises(MissingObject, match=f"is no run, it has no job.yaml; see `launcher list {tmp_path}/runs`"):
        run.read_job()


def test_what_belongs_to_a_description_counts_once_that_is_written(run, monkeypatch):
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    told = []
    for text, code in (("seed: 0\n", "a"), ("seed: 1\n", "b"), ("seed: 0\n", "c")):
        with monkeypatch.context() as killed:
            killed.setattr(RunDirectory, "write_job", kill)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    run.write_description(text, {"code": code})
        told.append(run.read_environment())
        run.write_description(text, {"code": code})
        told.append(run.read_environment())
    assert told == [{}, {"code": "a"}, {"code": "a"}, {"code": "b"}, {"code": "b"}, {"code": "c"}]
    run.write_description("seed: 0\n", {"code": "d"})
    assert run.read_environment() == {"code": "d"}, "of the same description"
    run.write_job("seed: 2\n")
    assert run.read_environment() == {"code": "d"}, "a person has changed the description"


def test_a_document_torn_for_a_moment_is_read_again(run, monkeypatch):
    run.take_lease()
    (claim,) = run.store.names("drivers")
    run.store.write(claim, b'{"st')
    replace_sleep(monkeypatch, lambda seconds: run.write_status({"step": 6}))  # noqa: ARG005
    assert run.read_status()["step"] == 6


def test_a_status_from_before_drivers_had_claims_is_carried_on(run):
    run.store.write("status.json", b'{"status": "stopped", "step": 7, "host": "a", "pid": 1}')
    assert run.read_status()["step"] == 7
    run.take_lease()
    status = run.read_status()
    assert (status["status"], status["step"], status["pid"]) == ("running", 7, os.getpid())


def test_a_document_that_stays_torn_is_not_known(run, pauses):
    for name in ("status.json", "environment.json", "tracker.json"):
        run.store.write(name, b'{"id')
    assert (run.read_status(), run.read_environment(), run.read_tracker_id()) == (None, {}, None)
    assert sum(pauses) < 1


def test_what_a_run_began_with_is_not_forgotten_because_it_is_torn(run, pauses):
    run.write_description("seed: 0\n", {"code": "a"})
    run.store.write("environment.json", b'{"co')
    with pytest.raises(StorageError, match=r"/environment.json: is torn, .*; restore it, or delete it and submit"):
        run.read_environment()
    with pytest.raises(StorageError, match="is torn"):
        run.write_description("seed: 1\n", {"code": "b"})
    run.store.delete(["environment.json"])
    assert run.read_environment() == {}, "a person has decided"
    assert sum(pauses) < 2


def test_a_first_description_that_is_written_while_it_is_looked_for(run, monkeypatch):
    reader = RunDirectory(run.url)

    def write_first() -> bool:
        run.write_description("seed: 0\n", {"code": "a"})
        return run.exists()

    monkeypatch.setattr(reader, "exists", write_first)
    assert reader.read_environment() == {"code": "a"}


def test_a_driver_comes_after_those_whose_claims_a_person_removed(run):
    for number in range(3):
        run.take_lease()
        log = run.events()
        log.append({"number": number})
        log.flush()
        run.store.delete(run.store.names("drivers"))
    assert [row["number"] for row in run.events().read()] == [0, 1, 2]


class TestLostClaim:
    def test_it_is_written_again_with_the_newest_status(self, run):
        run.take_lease()
        run.write_status({"status": "running", "step": 7})
        claims = run.store.names("drivers")
        run.store.delete(claims)
        run.check_lease()
        assert run.store.names("drivers") == claims
        assert run.read_status()["step"] == 7

    def test_it_is_not_written_again_where_nothing_of_the_run_is(self, run, tmp_path):
        run.take_lease()
        (tmp_path / "runs").rename(tmp_path / "unmounted")
        with pytest.raises(StorageError, match="holds nothing of this driver any more; mount the store again"):
            run.check_lease()
        assert not (tmp_path / "runs").exists()
        (tmp_path / "unmounted").rename(tmp_path / "runs")
        run.check_lease()

    def test_it_is_not_written_again_in_an_older_copy_of_the_run(self, run, tmp_path):
        run.take_lease()
        shutil.copytree(tmp_path / "runs", tmp_path / "older")
        taken_over = RunDirectory(run.url)
        taken_over.take_lease()
        (tmp_path / "runs").rename(tmp_path / "unmounted")
        (tmp_path / "older").rename(tmp_path / "runs")
        with pytest.raises(StorageError, match="holds nothing of this driver any more"):
            taken_over.check_lease()

    def test_it_is_not_written_again_once_another_driver_has_come(self, run):
        run.take_lease()
        newer = RunDirectory(run.url)
        newer.take_lease()
        run.store.delete(run.store.names("drivers"))
        with pytest.raises(SupersededError, match="another driver has taken the run over"):
            run.check_lease()
        newer.check_lease()
        with pytest.raises(SupersededError, match="process .* has taken the run over at"):
            run.check_lease()

    def test_an_older_claim_that_shows_is_no_later_driver(self, run):
        run.take_lease()
        newer = RunDirectory(run.url)
        newer.take_lease()
        newest = newer.store.names("drivers")
        run.write_status({"status": "running"})  # late
        run.store.delete(newest)
        newer.check_lease()
        assert set(newest) < set(run.store.names("drivers"))


def test_a_description_that_has_not_changed_is_not_written(run, monkeypatch):
    run.write_job("name: digits\n")
    monkeypatch.setattr(Store, "write", lambda *_: pytest.fail("it is written"))
    run.write_job("name: digits\n")


def test_a_driver_begins_with_the_room_that_killed_writers_have_left(run):
    run.take_lease()
    part = run.checkpoints.write_part(5, ("model", 0), b"1")
    left = [run.store.at(*folder).url + f"/.tmp-{number:032x}" for number, folder in enumerate([["drivers"], ["logs"]])]
    left.append(f"{run.checkpoints.url(5)}/.tmp-{5:032x}")
    for path in map(Path, left):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert not any("tmp" in name for name in run.store.names())
    RunDirectory(run.url).take_lease()
    assert not any(map(os.path.exists, left))
    assert f"checkpoints/{part.object}" in run.store.names()


def test_a_driver_goes_on_from_checkpoints_that_a_person_has_copied_alone(run):
    for step in (5, 10):
        run.take_lease()
        saved.save(run.checkpoints, step, {"model": b"m" * step})
        run.store.delete([name for name in run.store.names() if not name.startswith("checkpoints/")])
    assert RunDirectory(run.store).checkpoints.steps() == [5, 10]


def test_the_newest_of_each_matrix_is_kept(run):
    for step, name in ((5, "val-confusion"), (10, "val-confusion"), (10, "val-a.b")):
        run.write_matrix(name, {"step": step, "values": [[1, None]]})
    run.store.write("matrices/val-torn.json", b'{"st')
    matrix = {"step": 10, "values": [[1, None]]}
    assert run.read_matrices() == {"val-a.b": matrix, "val-confusion": matrix}


@pytest.mark.parametrize("stored", [None, b"", b"bundl", b"another one", b"bundle"])
def test_a_bundle_is_written_unless_it_is_there_whole(run, monkeypatch, stored):
    sha256 = hashlib.sha256(b"bundle").hexdigest()
    if stored is not None:
        run.store.write(f"code/{sha256}.zip", stored)
    written = []
    write = Store.write

    def observed(store, name, data):
        written.append(name)
        write(store, name, data)

    monkeypatch.setattr(Store, "write", observed)
    run.write_code(sha256, b"bundle")
    assert run.read_code(sha256) == b"bundle"
    assert written == ([] if stored == b"bundle" else [f"code/{sha256}.zip"])


def test_logs_are_named_by_attempt_and_worker(run):
    for attempt, rank in ((1, 0), (0, 1), (0, 0), (1000, 1)):
        run.write_log(attempt, rank, f"{attempt} {rank}".encode())
    assert run.log_names() == [
        "attempt-000-worker-000.log", "attempt-000-worker-001.log", "attempt-001-worker-000.log",
        "attempt-1000-worker-001.log",
    ]  # fmt: skip
    assert run.log_names(rank=1) == ["attempt-000-worker-001.log", "attempt-1000-worker-001.log"]
    assert [run.read_log(name) for name in run.log_names(attempt=1, rank=0)] == [b"1 0"]


def test_the_runs_of_a_store_are_the_folders_with_a_job(tmp_path):
    store = Store(str(tmp_path))
    for folder in ("b", "a"):
        RunDirectory(store.at(folder)).write_job("x")
    store.write("not-a-run/status.json", b"{}")
    store.write("job.yaml", b"")
    assert [run.name for run in list_runs(store)] == ["a", "b"]
    assert list_runs(store.at("nowhere")) == []
