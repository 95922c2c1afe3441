"""From a laptop to a cluster: what is submitted runs there with the code that the bucket holds, and nothing else."""

import json
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.inspection.nodes import without_report
from cluster.run.run_directory import RunDirectory
from tests.e2e.command import Ended, Running, checkpointed, events, launcher, rows
from tests.e2e.test_own_parts import JOB, MINE
from tests.faults.injection import Fault, fired, release
from tests.schedulers import FOLDER_VARIABLE, URL, LocalScheduler, local_scheduler

CLUSTER = ("--cluster", URL)
SLOW = """
import time


class Slowly(Points):
    def __getitem__(self, number):
        time.sleep(0.03)
        return super().__getitem__(number)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalScheduler]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cluster"))
    with local_scheduler(tmp_path / "cluster") as scheduler:
        yield scheduler


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    """The folder of the job file; the store lies elsewhere."""
    folder = tmp_path / "laptop"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE + SLOW)
    (folder / "own.yaml").write_text(JOB + f"store: {tmp_path / 'store'}\ncheckpoint: {{every_steps: 4}}\n")
    return folder


@pytest.fixture
def undisturbed(laptop: Path) -> dict[str, Any]:
    """The same run, of the laptop alone."""
    ended = launcher("run", "own.yaml", "name=undisturbed", "--json", cwd=laptop)
    assert ended.exit_code == 0, ended.stderr
    return ended.document


def submit(laptop: Path, *more: str) -> Ended:
    return launcher("submit", "own.yaml", *more, *CLUSTER, "--json", cwd=laptop)


def hide(laptop: Path) -> None:
    """What a host far away sees of a laptop."""
    laptop.rename(laptop.with_name("gone"))


def wait_until_held(cluster: LocalScheduler, job_id: str, run: Path, plan: Path, *, saved_at: int) -> None:
    """Returns when the first fault of a plan holds the run of a job, and a checkpoint is committed."""
    while not (checkpointed(run, saved_at)() and 0 in fired(plan)):
        assert cluster.read(job_id).status == "running", cluster.log(job_id)
        time.sleep(0.05)


def store_of(laptop: Path, name: str = "own") -> Path:
    return laptop.parent / "store" / name


def test_the_code_comes_from_the_bucket_and_the_bits_are_those_of_a_run_in_place(laptop, cluster, undisturbed):
    with cluster.held():
        ended = submit(laptop)
        hide(laptop)
    assert ended.exit_code == 0, ended.stderr
    run, job_id = store_of(laptop), ended.document["job"]
    assert ended.document == {
        "run": str(run), "job": job_id, "cluster": URL, "status": "submitted",
    }  # fmt: skip
    assert cluster.wait(job_id).exit_code == 0, cluster.log(job_id)
    status = launcher("status", run, "--json", cwd=laptop.parent).document
    assert (status["status"], status["state_sha256"]) == ("completed", undisturbed["state_sha256"])
    assert rows(run) == rows(store_of(laptop, "undisturbed"))
    (environment,) = events(run, "environment")
    assert [*environment["workers"][0]["code"]] == ["mine"]
    unpacked = cluster.folder / "home/.cache/launcher/code"
    assert unpacked.stat().st_mode & 0o777 == 0o700
    (folder,) = unpacked.iterdir()
    assert (folder / "mine.py").read_text() == MINE + SLOW
    assert not any((cluster.folder / "work").iterdir()), "nothing is left where it was called"


def test_a_plan_is_made_for_the_cluster_and_nothing_is_handed_over(laptop, cluster):
    ended = launcher("plan", "own.yaml", *CLUSTER, "--json", cwd=laptop)
    assert ended.exit_code == 0, ended.stderr
    assert (ended.document["num_workers"], cluster.jobs(), store_of(laptop).exists()) == (2, [], False)
    refused = launcher("plan", "own.yaml", "workers.cpus=1000000", *CLUSTER, cwd=laptop)
    assert refused.exit_code == 5
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "workers.num must be at most 0 on this cluster" in line


def test_a_wait_ends_as_the_run_does(laptop, cluster):
    ended = submit(laptop, "--wait")
    assert ended.exit_code == 0, ended.stderr
    assert (ended.document["status"], ended.document["step"]) == ("completed", 24)
    assert ended.document["job"] == cluster.jobs()[0].id
    again = submit(laptop, "--wait")
    assert (again.exit_code, again.document["status"], len(cluster.jobs())) == (0, "completed", 1)
    assert "is complete; nothing to do" in again.stderr


def test_a_wait_ends_with_the_exit_code_of_the_run(laptop, cluster):
    ended = submit(laptop, "data.train.broken_at=100", "data.train.repaired=/dev/full/x", "--wait")
    assert ended.exit_code == 1, ended.stderr
    assert ended.document["status"] == "failed"
    assert cluster.jobs()[0].exit_code == 1


def test_ctrl_c_ends_the_wait_and_not_the_run(laptop, cluster):
    waiting = Running(
        ("submit", "own.yaml", "data.train._target_=mine.Slowly", *CLUSTER, "--wait", "--json"), cwd=laptop
    )
    run = store_of(laptop)
    waiting.wait_until(checkpointed(run, 4))
    waiting.signal_group(signal.SIGINT)
    ended = waiting.wait()
    assert ended.exit_code == 130
    assert f"goes on without this terminal; stop it with `launcher stop {run}`" in ended.stderr
    assert ended.document["status"] == "running"
    (job,) = cluster.jobs()
    assert cluster.wait(job.id).exit_code == 0
    assert launcher("status", run, "--json", cwd=laptop).document["step"] == 24


@pytest.mark.usefixtures("undisturbed")
def test_two_who_submit_at_once_have_one_run(laptop, cluster):
    other = laptop.with_name("other")
    other.mkdir()
    (other / "own.yaml").write_text((laptop / "own.yaml").read_text())
    (other / "mine.py").write_text((laptop / "mine.py").read_text() + "# the same, and another file\n")
    both = [Running(("submit", "own.yaml", *CLUSTER, "--json"), cwd=folder) for folder in (laptop, other)]
    ended = [running.wait() for running in both]
    assert [each.exit_code for each in ended] == [0, 0], [each.stderr for each in ended]
    # Both jobs stood by. If each was handed its submission in the very moment of the other, the second ends by itself.
    codes = {job.metadata["submission"]: cluster.wait(job.id).exit_code for job in cluster.jobs()}
    assert {each.document["job"] for each in ended} <= {job.id for job in cluster.jobs()}
    run = RunDirectory(str(store_of(laptop)))
    assert len(events(store_of(laptop), "attempt_started")) == 1
    assert rows(store_of(laptop)) == rows(store_of(laptop, "undisturbed"))
    (taken,) = [report.id for report in run.submissions.reports() if report.state == "taken"]
    assert codes.pop(taken) == 0
    assert codes.keys()
    assert 0 not in codes.values()
    assert run.read_environment()["code"] == run.submissions.read(taken).code_sha256


def test_a_job_that_was_killed_is_begun_again_by_the_next_submit(laptop, cluster, undisturbed, make_plan):
    # Each job is held until the test has looked at it.
    plan = make_plan(*(Fault(kind="hold", doing="forward", step=step) for step in (6, 8)))
    first = submit(laptop).document["job"]
    run = store_of(laptop)
    wait_until_held(cluster, first, run, plan, saved_at=4)
    meanwhile = submit(laptop)
    assert (meanwhile.exit_code, meanwhile.document["job"], meanwhile.document["status"]) == (0, first, "running")
    assert f"is there already, job {first} is running" in meanwhile.stderr

    cluster.signal(first, signal.SIGKILL)
    cluster.wait(first)
    second = submit(laptop)
    assert second.exit_code == 0, second.stderr
    assert second.document["job"] not in (None, first)
    assert second.document["status"] in ("submitted", "running")
    release(plan, 1)
    assert cluster.wait(second.document["job"]).exit_code == 0, cluster.log(second.document["job"])
    assert len(events(run, "attempt_started")) == 2
    assert rows(run) == rows(store_of(laptop, "undisturbed"))
    status = launcher("status", run, "--json", cwd=laptop).document
    assert status["state_sha256"] == undisturbed["state_sha256"]


def test_a_run_that_was_stopped_goes_on_anywhere_with_the_code_from_the_bucket(
    laptop, cluster, undisturbed, make_plan, tmp_path, monkeypatch
):
    plan = make_plan(Fault(kind="hold", doing="forward", step=6))
    job_id = submit(laptop).document["job"]
    run = store_of(laptop)
    wait_until_held(cluster, job_id, run, plan, saved_at=4)
    stopping = Running(("stop", run, "--json"), cwd=laptop)
    stopping.wait_until(lambda: len(events(run, "stop_requested")) == 1)
    release(plan, 0)
    stopped = stopping.wait()
    assert (stopped.exit_code, stopped.document["status"]) == (0, "stopped"), stopped.stderr
    cluster.wait(job_id)
    hide(laptop)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    resumed = launcher("resume", run, "train.max_steps=20", "--json", cwd=tmp_path / "elsewhere")
    assert resumed.exit_code == 0, resumed.stderr
    branched = launcher("resume", run, "--as", "branch", "--json", cwd=tmp_path / "elsewhere")
    assert branched.exit_code == 0, branched.stderr
    assert [path.name for path in (store_of(laptop, "branch") / "code").iterdir()] == [
        path.name for path in (run / "code").iterdir()
    ]
    assert resumed.document["step"] == 20
    assert branched.document["step"] == 24
    refused = launcher("resume", run, "--at", 4, *CLUSTER, cwd=tmp_path / "elsewhere")
    assert (refused.exit_code, len(cluster.jobs())) == (2, 1)
    ended = launcher("resume", run, *CLUSTER, "--wait", "--json", cwd=tmp_path / "elsewhere")
    assert ended.exit_code == 0, ended.stderr
    assert "changed train.max_steps: 20 -> null" in ended.stderr
    assert ended.document["job"] == cluster.jobs()[1].id
    assert ended.document["state_sha256"] == undisturbed["state_sha256"]
    assert rows(run) == rows(store_of(laptop, "undisturbed"))


DAMAGES = {
    "damaged": lambda bundle: bundle.write_bytes(bundle.read_bytes().replace(b"power=2.0", b"power=3.0")),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_bundle_that_is_damaged_is_one_line_before_a_worker_starts(laptop, cluster, what):
    with cluster.held():
        job_id = submit(laptop).document["job"]
        run = store_of(laptop)
        (bundle,) = (run / "code").iterdir()
        DAMAGES[what](bundle)
    assert cluster.wait(job_id).exit_code == 4
    (line,) = [line for line in cluster.log(job_id).splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {run}: code/{bundle.name}, the code of the run, is {what}; ")
    assert events(run, "attempt_started") == []


def test_a_job_that_dies_before_the_run_begins_ends_the_wait(laptop, cluster):
    with cluster.held():
        waiting = Running(("submit", "own.yaml", *CLUSTER, "--wait", "--json"), cwd=laptop)
        waiting.wait_until(lambda: any((store_of(laptop) / "submissions").glob("*.json")))
        (bundle,) = (store_of(laptop) / "code").iterdir()
        bundle.unlink()
    ended = waiting.wait()
    assert ended.exit_code == 5
    assert "ended before the run began, with exit code 4: error: " in ended.stderr
    assert "is missing; restore it, or submit the run again" in ended.stderr
    assert ended.document["status"] == "failed"
    again = submit(laptop)
    assert cluster.wait(again.document["job"]).exit_code == 0
    assert len(cluster.jobs()) == 2


def test_a_job_that_is_stopped_while_it_plans_says_so_in_the_bucket(laptop, cluster, tmp_path):
    slow, began = tmp_path / "slow", tmp_path / "began"
    wait = f"""
import pathlib, time
while pathlib.Path({str(slow)!r}).exists():
    pathlib.Path({str(began)!r}).touch()
    time.sleep(0.05)
"""
    (laptop / "mine.py").write_text(wait + MINE)
    with cluster.held():
        job_id = submit(laptop).document["job"]
        slow.touch()
    while not began.exists():
        assert cluster.read(job_id).status in ("pending", "running"), cluster.log(job_id)
        time.sleep(0.05)
    cluster.stop(job_id)
    cluster.wait(job_id)
    run = store_of(laptop)
    while (status := launcher("status", run, "--json", cwd=tmp_path).document)["status"] == "submitted":
        time.sleep(0.05)  # the shell of the job ends before its command
    assert status["status"] == "failed"
    assert f"job {job_id} ended before the run began: it was stopped before the run began" in status["error"]
    assert not run.joinpath("job.yaml").exists()


def test_a_job_that_is_begun_late_leaves_a_run_at_its_last_step(laptop, cluster):
    with cluster.held():
        job_id = submit(laptop, "train.max_steps=8").document["job"]
        ran = launcher("run", "own.yaml", "train.max_steps=8", "--json", cwd=laptop)
        assert (ran.exit_code, ran.document["step"]) == (0, 8)
    assert cluster.wait(job_id).exit_code == 0, cluster.log(job_id)
    assert "has reached train.max_steps=8" in cluster.log(job_id)
    assert launcher("status", store_of(laptop), "--json", cwd=laptop).document["step"] == 8


def test_a_run_that_waits_for_its_cluster_is_known_by_its_submission(laptop, cluster, tmp_path):
    run = store_of(laptop)
    with cluster.held():
        job_id = submit(laptop).document["job"]
        told = launcher("status", run, "--json", cwd=tmp_path).document
        assert (told["status"], told["step"], told["job"]) == ("submitted", 0, job_id)
        text = launcher("status", run, cwd=tmp_path).stdout
        assert "is submitted at step 0" in text
        assert f"job        {job_id} on {URL}" in text
        (listed,) = launcher("list", tmp_path / "store", "--json", cwd=tmp_path).document
        assert listed["status"] == "submitted"
        stopped = launcher("stop", run, cwd=tmp_path)
        assert (stopped.exit_code, len(stopped.stderr.strip().splitlines())) == (5, 1)
        assert f"has not begun yet; it waits as job {job_id} on " in stopped.stderr
        told = launcher("status", run, *CLUSTER, "--json", cwd=tmp_path).document
        assert (told["status"], told["job"], told["job_status"]) == ("submitted", job_id, "pending")
        (tmp_path / "other-store").mkdir()
        for store in ("store", "other-store"):
            (listed,) = launcher("list", tmp_path / store, *CLUSTER, "--json", cwd=tmp_path).document
            assert (listed["run"], listed["status"], listed["job_status"]) == (str(run), "submitted", "pending")
        assert launcher("list", tmp_path / "other-store", "--json", cwd=tmp_path).document == []
        again = submit(laptop, "workers.num=1")
        assert (again.exit_code, again.document["job"], again.document["status"]) == (0, job_id, "submitted")
        assert "not changed: workers.num" in again.stderr
    assert cluster.wait(job_id).exit_code == 0
    assert len(cluster.jobs()) == 1


def test_a_job_that_dies_before_the_run_begins_is_told_by_its_url_and_its_cluster(laptop, cluster, tmp_path):
    run = store_of(laptop)
    with cluster.held():
        job_id = submit(laptop).document["job"]
        (bundle,) = (run / "code").iterdir()
        bundle.unlink()
    cluster.wait(job_id)
    hide(laptop)
    told = launcher("status", run, "--json", cwd=tmp_path).document
    assert (told["status"], told["job"]) == ("failed", job_id)
    assert f"job {job_id} ended before the run began: {run}: code/" in told["error"]
    told = launcher("status", run, *CLUSTER, "--json", cwd=tmp_path).document
    assert (told["status"], told["job_status"]) == ("failed", "failed")
    assert f"job {job_id} ended before the run began, with exit code 4: error: {run}: code/" in told["error"]
    assert f"`launcher logs {run} --cluster {URL}` shows its log" in told["error"]
    logs = launcher("logs", run, *CLUSTER, "--follow", cwd=tmp_path)
    assert (logs.exit_code, logs.stdout) == (0, without_report(cluster.log(job_id)))
    assert launcher("logs", run, cwd=tmp_path).stdout == ""
    (listed,) = launcher("list", run.parent, *CLUSTER, "--json", cwd=tmp_path).document
    assert listed["status"] == "failed"


def test_a_job_that_waits_is_stopped_from_anywhere_and_the_next_submit_begins_the_run(laptop, cluster, tmp_path):
    run = store_of(laptop)
    with cluster.held():
        first = submit(laptop).document["job"]
        stopped = launcher("stop", run, *CLUSTER, "--json", cwd=tmp_path)
        assert (stopped.exit_code, stopped.document["status"]) == (0, "stopped"), stopped.stderr
        assert cluster.read(first).status == "stopped"
        assert launcher("status", run, "--json", cwd=tmp_path).document["status"] == "stopped"
    assert events(run, "attempt_started") == []
    again = submit(laptop, "--wait")
    assert (again.exit_code, again.document["status"], again.document["step"]) == (0, "completed", 24), again.stderr
    assert again.document["job"] != first


def test_a_run_is_followed_from_anywhere_to_its_end(laptop, cluster, tmp_path):
    with cluster.held():
        job_id = submit(laptop, "data.train.length=64", "train.epochs=1").document["job"]
        run = store_of(laptop)
        following = Running(("logs", run, "--follow", *CLUSTER), cwd=tmp_path)
    assert cluster.wait(job_id).exit_code == 0, cluster.log(job_id)
    followed = following.wait()
    assert (followed.exit_code, f"--- job {job_id}" in followed.stderr) == (0, True)
    assert f"resuming {run}" in followed.stdout
    last = cluster.log(job_id).splitlines()[-1]
    assert json.loads(last)["status"] == "completed", "what it says after the end of the run"
    assert followed.stdout.splitlines().count(last) == 1, "the workers' logs may come after it"
    assert launcher("logs", run, *CLUSTER, cwd=tmp_path).stdout.endswith(without_report(cluster.log(job_id)))


def test_who_dies_before_the_job_begins_is_replaced_by_the_next(laptop, cluster):
    with cluster.held():
        job_id = submit(laptop).document["job"]
        cluster.signal(job_id, signal.SIGKILL)
    cluster.wait(job_id)
    shutil.rmtree(cluster.folder / "jobs" / job_id)  # the cluster never heard of it
    again = submit(laptop)
    assert again.document["job"] == job_id
    assert cluster.wait(job_id).exit_code == 0


@pytest.mark.usefixtures("cluster")
def test_code_that_was_repaired_goes_with_the_next_submit(laptop):
    broken = submit(laptop, "data.train.broken_at=100", "--wait")
    assert broken.exit_code == 1
    (laptop / "mine.py").write_text((MINE + SLOW).replace("raise OSError", "print"))
    repaired = submit(laptop, "data.train.broken_at=100", "--wait")
    assert (repaired.exit_code, repaired.document["step"]) == (0, 24), repaired.stderr
    assert len([*(store_of(laptop) / "code").iterdir()]) == 2


def test_modules_of_the_working_directory_travel_too(laptop, cluster):
    (laptop / "jobs-of-mine").mkdir()
    (laptop / "jobs-of-mine/own.yaml").write_text((laptop / "own.yaml").read_text())
    (laptop / "own.yaml").unlink()
    ended = launcher("submit", "jobs-of-mine/own.yaml", *CLUSTER, "--json", cwd=laptop)
    hide(laptop)
    assert ended.exit_code == 0, ended.stderr
    assert cluster.wait(ended.document["job"]).exit_code == 0, cluster.log(ended.document["job"])
    (bundle,) = (store_of(laptop) / "code").iterdir()
    assert zipfile.ZipFile(bundle).namelist() == ["mine.py", "own.yaml"]


@pytest.mark.parametrize("has_such_a_folder", [False, True])
def test_relative_paths_lead_to_what_was_submitted_and_to_no_folder_of_the_same_name(
    laptop, cluster, has_such_a_folder
):
    (laptop / "mine.py").write_text(
        MINE
        + """

class Listed(Points):
    def __init__(self, length, names):
        super().__init__(length)
        self.x += float(Path(names).read_text())
"""
    )
    (laptop / "offset.txt").write_text("0.5")
    with cluster.held():
        change = "data.train={_target_: mine.Listed, length: 256, names: offset.txt}"
        ended = submit(laptop, change, "data.loaders=1")
        if has_such_a_folder:
            (laptop / "offset.txt").write_text("of somebody else")
        else:
            hide(laptop)
    assert ended.exit_code == 0, ended.stderr
    assert cluster.wait(ended.document["job"]).exit_code == 0, cluster.log(ended.document["job"])


def test_a_module_that_git_ignores_is_missed_before_anything_is_written(laptop, cluster):
    (laptop / ".gitignore").write_text("mine.py\n")
    ended = submit(laptop)
    assert ended.exit_code == 2
    assert "mine would be missing on the cluster" in ended.stderr
    assert store_of(laptop).exists() is False
    (job,) = cluster.jobs()
    assert cluster.wait(job.id).status == "stopped"


@pytest.mark.usefixtures("cluster")
def test_a_laptop_of_two_cores_submits_for_more(laptop):
    cores = len(os.sched_getaffinity(0))
    ended = submit(laptop, f"workers.cpus={cores + 1}")
    assert ended.exit_code == 0, ended.stderr
    assert RunDirectory(str(store_of(laptop))).submissions.newest().number == 0
