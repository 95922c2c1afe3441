"""Going back to a step and branching at one, in the store."""

import hashlib

import fsspec
import pytest
from crashing_file_system import CrashingFileSystem, Killed, copy_of_store, fresh_faults, restore

from cluster.errors import CheckpointError, DescriptionError
from cluster.run.lease import SupersededError
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from launcher.driver.pending_writes import event_row
from launcher.runs.rewind import branch_directory, copy_run, first_workers, go_back, good_checkpoint_at
from tests import saved

STEPS = [5, 10, 15]
CODE = hashlib.sha256(b"zip").hexdigest()


@pytest.fixture
def run() -> RunDirectory:
    """A run that has completed; a part of every checkpoint lies in the folder of the first."""
    fresh_faults()
    run = open_run("old")
    run.take_lease()
    frozen = run.checkpoints.write_part(5, ("frozen.bin", 0), b"frozen")
    for step in STEPS:
        files = saved.write_files(run.checkpoints, step, {"model.bin": b"m" * step})
        again = run.checkpoints.write_part(step, ("frozen.bin", 0), b"frozen", before=frozen)
        run.checkpoints.commit(saved.manifest_of(step, files | {"frozen.bin": saved.FileEntry((again,))}))
    run.write_environment({"data_fingerprint": "ab"})
    status = {"status": "completed", "step": 15, "state_sha256": "ab", "error": "no", "seconds": 9.0}
    run.write_status(status | {"best": {"metric": "val/loss", "value": 0.1, "step": 15}})
    metrics = run.metrics()
    for step in range(1, 16):
        metrics.append({"step": step})
    metrics.flush()
    run.write_job("name: old\n")
    return run


def open_run(name: str) -> RunDirectory:
    return RunDirectory(Store(f"crash://runs/{name}", patience_s=0))


def rows(run: RunDirectory) -> list[int]:
    return [row["step"] for row in run.metrics().read()]


def back(run: RunDirectory, step: int) -> None:
    """As a driver goes back, which has claimed the run."""
    run.take_lease()
    go_back(run, good_checkpoint_at(run, step, STEPS))


def branch(run: RunDirectory, steps: list[int]) -> tuple[RunDirectory, list[str]]:
    new, warnings = open_run("new"), list[str]()
    copy_run(run, new, "name: new\n", steps, None, warnings.append)
    return new, warnings


def spoil(run: RunDirectory, step: int) -> None:
    name = run.checkpoints.manifest(step).part(("model.bin", 0)).object
    run.store.at("checkpoints").write(name, b"others")


class TestGoingBack:
    def test_what_lies_beyond_is_gone(self, run):
        back(run, 10)
        assert (run.checkpoints.steps(), rows(run)) == ([5, 10], [*range(1, 11)])
        assert run.checkpoints.read(10)[1] == {"model.bin": b"m" * 10, "frozen.bin": b"frozen"}
        status = run.read_status()
        assert (status["status"], status["step"], status["best"], status["seconds"]) == ("running", 10, None, 9.0)
        (event,) = run.events().read()
        assert (event["kind"], event["step"], event["discarded"]) == ("went_back", 10, [15])

    def test_nothing_is_lost_if_the_target_went_before_the_run_was_claimed(self, run):
        manifest = good_checkpoint_at(run, 10, STEPS)
        other = open_run("old")
        other.take_lease()
        list(other.checkpoints.retain(15, 1))
        status = run.read_status()
        run.take_lease()
        with pytest.raises(CheckpointError, match="step-00000010: its manifest is missing"):
            go_back(run, manifest)
        assert (open_run("old").checkpoints.steps(), rows(run)) == ([15], [*range(1, 16)])
        assert run.read_status()["step"] == status["step"]

    def test_what_an_earlier_driver_writes_late_never_counts(self, run):
        back(open_run("old"), 10)
        saved.save(run.checkpoints, 15, {"model.bin": b"late"})
        saved.save(run.checkpoints, 20, {"model.bin": b"late"})
        later = open_run("old")
        later.take_lease()
        saved.save(later.checkpoints, 30, {"model.bin": b"m" * 30})
        open_run("old").take_lease()
        assert open_run("old").checkpoints.steps() == [5, 10, 30]

    def test_a_driver_that_was_taken_over_from_deletes_nothing(self, run):
        run.take_lease()
        manifest = run.checkpoints.manifest(10)
        other = open_run("old")
        other.take_lease()
        saved.save(other.checkpoints, 20, {"model.bin": b"m" * 20})
        with pytest.raises(SupersededError):
            go_back(run, manifest)
        assert other.checkpoints.steps()[-1] == 20
        assert other.checkpoints.read(20)

    def test_a_best_one_that_is_left_stays_the_best(self, run):
        best = {"metric": "val/loss", "value": 0.1, "step": 5}
        run.write_status(run.read_status() | {"best": best})
        back(run, 10)
        assert run.read_status()["best"] == best

    @pytest.mark.usefixtures("run")
    @pytest.mark.parametrize("kind", ["before", "torn", "after"])
    def test_a_kill_at_any_call_leaves_a_run_that_goes_on_from_there_once_it_is_fenced(self, kind):
        before = copy_of_store()
        faults = restore(before)
        back(open_run("old"), 10)
        num_calls, fired = len(faults.calls), 0
        for at in range(num_calls):
            faults = restore(before)
            faults.at, faults.kind = at, kind
            with pytest.raises(Killed):
                back(open_run("old"), 10)
            fired += faults.fired
            faults.at = None
            left = open_run("old")
            newest = left.checkpoints.newest_good(lambda step, error: pytest.fail(f"{step}: {error}"))
            is_fenced = any(path.endswith("-after-00000010") for path in copy_of_store())
            assert newest[0].step == (10 if is_fenced else 15)
            status = left.read_status()
            assert newest[0].step == 15 or status["status"] == "running", "a completed run would not go on"
            assert rows(left) in ([*range(1, 11)], [*range(1, 16)])
        assert fired == num_calls > 6

    @pytest.mark.parametrize(("step", "message"), [(7, "has no checkpoint of step 7"), (10, "has 6 bytes")])
    def test_only_to_a_good_one(self, run, step, message):
        spoil(run, 10)
        with pytest.raises(CheckpointError, match=f"{message}.*; there are those of steps 5, 10, 15$"):
            good_checkpoint_at(run, step, STEPS)


class TestBranching:
    def test_a_branch_is_whole_and_needs_nothing_of_the_old_run(self, run):
        before = copy_of_store()
        new, warnings = branch(run, [10])
        assert {path: data for path, data in copy_of_store().items() if "/old/" in path} == before
        old_manifest = run.checkpoints.manifest(10)
        fsspec.filesystem("crash").rm("/runs/old", recursive=True)
        manifest, files = new.checkpoints.read(10)
        assert files == {"model.bin": b"m" * 10, "frozen.bin": b"frozen"}
        assert all(name.startswith("step-00000010/") for name in manifest.objects())
        same = ("state_sha256", "created", "metrics", "versions", "step", "size")
        assert [getattr(manifest, name) for name in same] == [getattr(old_manifest, name) for name in same]
        assert (rows(new), new.read_job(), warnings) == ([*range(1, 11)], "name: new\n", [])
        assert new.read_environment() == {"data_fingerprint": "ab"}
        (event,) = new.events().read()
        assert (event["kind"], event["source"], event["step"]) == ("branched", run.url, 10)
        assert event["state_sha256"] == manifest.state_sha256

    def test_a_branch_knows_the_workers_that_the_old_run_began_on(self, run):
        first, second = ([{"ranks": [0], "gpu": gpu}] for gpu in ("NVIDIA H200", "NVIDIA A100"))
        log = run.events()
        for workers in (first, second):
            log.append(event_row("environment", {"workers": workers}))
        log.flush()
        events = branch(run, [10])[0].events().read()
        assert [event["kind"] for event in events] == ["environment", "branched"]
        assert first_workers(run.events().read()) == first_workers(events) == first

    def test_at_the_newest_good_one(self, run):
        spoil(run, 15)
        new, warnings = branch(run, STEPS)
        assert new.checkpoints.steps() == [10]
        assert new.checkpoints.survey().orphans == ()
        assert len(warnings) == 1
        assert "step-00000015" in warnings[0]

    def test_at_a_bad_one_nothing_is_left_of_it(self, run):
        spoil(run, 10)
        with pytest.raises(CheckpointError, match="has 6 bytes"):
            branch(run, [10])
        assert open_run("new").store.names() == []

    def test_where_no_checkpoint_is_good(self, run):
        for step in STEPS:
            spoil(run, step)
        with pytest.raises(CheckpointError, match="has no good checkpoint to branch from"):
            branch(run, STEPS)
        with pytest.raises(CheckpointError, match="has no good checkpoint to branch from"):
            branch(run, [])
        assert open_run("new").store.names() == [], "its name can be used"

    @pytest.mark.parametrize("has_begun", [True, False])
    def test_a_run_that_began_there_meanwhile_is_left_as_it_is(self, run, has_begun):
        other = open_run("new")
        other.take_lease()
        if has_begun:
            other.write_job("name: new\n")
        before = copy_of_store()
        with pytest.raises(DescriptionError, match="/new: is a run already" if has_begun else "/new: is not empty"):
            branch(run, [10])
        assert copy_of_store() == before
        other.check_lease()

    def test_a_failed_copy_leaves_what_somebody_else_has_written(self, run, monkeypatch):
        """A submission, and its code, which may be the branch's own."""
        run.write_code(CODE, b"zip")
        written = RunDirectory.write_job

        def interrupt(new: RunDirectory, text: str) -> None:
            written(new, text)
            new.store.write("submissions/1.json", b"{}")
            raise KeyboardInterrupt

        monkeypatch.setattr(RunDirectory, "write_job", interrupt)
        with pytest.raises(KeyboardInterrupt):
            copy_run(run, open_run("new"), "name: new\n", [10], CODE, pytest.fail)
        assert open_run("new").store.names() == [f"code/{CODE}.zip", "submissions/1.json"]

    @pytest.mark.parametrize("at", [1, 3])
    def test_a_copy_that_is_deleted_in_part_is_no_run(self, run, monkeypatch, at):
        written, faults, warnings = RunDirectory.write_job, CrashingFileSystem.faults, list[str]()

        def interrupt(new: RunDirectory, text: str) -> None:
            written(new, text)
            faults.at, faults.kind = len(faults.calls) + at, "refused"
            raise KeyboardInterrupt

        monkeypatch.setattr(RunDirectory, "write_job", interrupt)
        with pytest.raises(KeyboardInterrupt):
            copy_run(run, open_run("new"), "name: new\n", [10], None, warnings.append)
        assert (faults.fired, len(warnings)) == (1, 1)
        assert warnings[0].endswith(
            "; delete what is left of the branch, crash://runs/new, or give the next one another name"
        )
        assert open_run("new").store.names()
        assert not open_run("new").exists()

    @pytest.mark.parametrize("kind", ["before", "torn", "after"])
    def test_a_kill_at_any_call_leaves_a_whole_branch_or_no_run(self, run, kind):
        before = copy_of_store()
        faults = restore(before)
        branch(run, [10])
        num_calls, fired = len(faults.calls), 0
        for at in range(num_calls):
            faults = restore(before)
            faults.at, faults.kind = at, kind
            with pytest.raises(Killed):
                branch(run, [10])
            fired += faults.fired
            faults.at = None
            left = open_run("new")
            if left.exists():
                assert at == num_calls - 1
                assert left.checkpoints.read(10)[1]["model.bin"] == b"m" * 10
                assert rows(left) == [*range(1, 11)]
            elif left.store.names():
                with pytest.raises(DescriptionError, match="is not empty"):
                    branch_directory(run, "new")
            assert {path: data for path, data in copy_of_store().items() if "/old/" in path} == before
        assert fired == num_calls > 6

    @pytest.mark.parametrize(
        ("new", "url"), [("new", "crash://runs/new"), ("crash://other/place/new", "crash://other/place/new")]
    )
    def test_where_it_lies(self, run, new, url):
        assert branch_directory(run, new).url == url
        assert CrashingFileSystem.faults.fired == 0

    def test_never_where_a_run_is(self, run):
        with pytest.raises(DescriptionError, match="crash://runs/old: is a run already"):
            branch_directory(run, "old")
