"""Data that an index lists: listed once by a command, the same for every worker, compared when a run goes on."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import Ended, Running, checkpointed, events, launcher, rows
from tests.faults.injection import Fault, fired
from tests.images import make_image_folder
from tests.schedulers import FOLDER_VARIABLE, URL, LocalScheduler, local_scheduler

MINE = '''\
import os
from functools import partial

from torch import nn

from jobs.images.indexing.index import Source
from jobs.images.indexing.index_files import open_index
from jobs.images.indexed_images import IndexedImages, read_ranges
from cluster.storage.store import Store


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 16 * 20, 3))


def images(root, proof=None):
    """As the data sets of the launcher do; notes in a file who lists the images."""
    return IndexedImages(open_index(Source("test", Store(root).url), partial(build, proof)), read_ranges)


def build(proof, store, builder):
    if proof is not None:
        with open(proof, "a") as file:
            file.write(f"{os.getpid()}\\n")
    builder.classes = store.folders()
    for label, name in enumerate(builder.classes):
        listed = (each for _, page in store.pages([name]) for each in page.objects)
        found = sorted(listed, key=lambda each: each.name)
        names = [f"{name}/{each.name}" for each in found]
        builder.add_files(names, [each.size for each in found], [each.version for each in found], [label] * len(found))
'''
JOB = """\
name: images
store: {store}
model: mine.Net
data: {{train: {{_target_: mine.images, root: {root}, proof: {proof}}}}}
loss: CrossEntropyLoss
optimizer: {{_target_: SGD, lr: 0.01}}
train: {{epochs: 3, global_batch: 8, shards: 4}}
workers: {{num: 2}}
checkpoint: {{every_steps: 4}}
tracking: {{mode: disabled}}
"""
NUM_IMAGES = 48


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the job file, with its images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "home"
    make_image_folder(folder / "images", num_classes=3, per_class=NUM_IMAGES // 3, size=16)
    (folder / "mine.py").write_text(MINE)
    root, proof = folder / "images", tmp_path / "listed"
    (folder / "images.yaml").write_text(JOB.format(store=tmp_path / "store", root=root, proof=proof))
    return folder


def listings(home: Path) -> int:
    """How often a process has listed the images."""
    return len((home.parent / "listed").read_text().splitlines())


def indexes(run: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (run / "indexes").iterdir()}


def recorded(run: Path) -> list[list[str]]:
    """The digests that each driver of a run has recorded."""
    attempts = json.loads((run / "environment.json").read_text())["attempts"]
    return [[*attempt["indexes"].values()] for attempt in attempts]


def killed(home: Path, make_plan: Any) -> Path:
    """A run whose driver is killed after a training process was; returns its directory."""
    plan = make_plan(
        Fault(kind="kill", doing="forward", step=5, rank=1), Fault(kind="hold", doing="forward", step=10, rank=0)
    )
    run = home.parent / "store/images"
    running = Running(["run", "images.yaml"], home)
    running.wait_until(lambda: checkpointed(run, 8)() and fired(plan).keys() == {0, 1})
    running.signal_group(signal.SIGKILL)
    running.wait()
    make_plan()
    assert len(events(run, "worker_lost")) == 1
    return run


def test_it_is_listed_once_and_a_killed_run_goes_on_with_the_same_bits(home: Path, make_plan: Any) -> None:
    undisturbed = launcher("run", "images.yaml", "name=undisturbed", "workers.num=1", "--json", cwd=home)
    assert undisturbed.exit_code == 0, undisturbed.stderr
    assert listings(home) == 1

    run = killed(home, make_plan)
    assert listings(home) == 2, "the dry run's; no worker lists, and none that comes after it"
    (digest,) = indexes(run)
    assert recorded(run) == [[digest]]

    resumed = launcher("resume", run, "workers.num=3", "--json", cwd=home)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.document["state_sha256"] == undisturbed.document["state_sha256"]
    assert rows(run) == rows(run.parent / "undisturbed")
    assert listings(home) == 3
    assert (indexes(run), recorded(run)) == ({digest}, [[digest]] * 2)


def error_of(ended: Ended) -> str:
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_changed_data_is_named_and_may_be_accepted(home: Path, make_plan: Any) -> None:
    run = killed(home, make_plan)
    (before,) = indexes(run)
    folder = home / "images/class_001"
    (folder / "new.jpg").write_bytes((folder / "image_0000.jpg").read_bytes())
    (folder / "image_0003.jpg").unlink()
    smaller = (home / "images/class_002/image_0000.jpg").read_bytes()
    (home / "images/class_000/image_0001.jpg").write_bytes(smaller + b"0")

    refused = launcher("resume", run, "--json", cwd=home)
    assert refused.exit_code == 2
    assert error_of(refused) == (
        f"error: {run}/job.yaml: data has changed since the run began: {home / 'images'}: "
        "1 sample added: class_001/new.jpg; 1 sample removed: class_001/image_0003.jpg; "
        "1 sample changed: class_000/image_0001.jpg; restore it, or resume with --force"
    )
    assert (indexes(run), recorded(run)) == ({before}, [[before]])

    (run / f"indexes/{before}.arrow.zst").rename(home / "aside")
    for cached in (home.parent / "cache/launcher/indexes").iterdir():
        cached.unlink()
    without = launcher("resume", run, "--json", cwd=home)
    assert without.exit_code == 2
    assert "what is not known, since the index of the run cannot be read: " in error_of(without)
    (home / "aside").rename(run / f"indexes/{before}.arrow.zst")

    branched = launcher("resume", run, "--as", "branch", "--json", cwd=home)
    assert branched.exit_code == 2
    assert "1 sample added: class_001/new.jpg" in error_of(branched)

    forced = launcher("resume", run, "--force", "--json", cwd=home)
    assert forced.exit_code == 0, forced.stderr
    assert forced.document["status"] == "completed"
    (after,) = recorded(run)[-1]
    assert (indexes(run), recorded(run)[0], after != before) == ({before, after}, [before], True)


def test_a_branch_has_its_own(home: Path) -> None:
    run = home.parent / "store/images"
    assert launcher("run", "images.yaml", "train.max_steps=4", cwd=home).exit_code == 0
    branched = launcher("resume", run, "--as", "branch", "train.max_steps=6", "--json", cwd=home)
    assert branched.exit_code == 0, branched.stderr
    (digest,) = indexes(run)
    assert (indexes(run.parent / "branch"), recorded(run.parent / "branch")[-1]) == ({digest}, [digest])


def test_a_plan_tells_of_it_without_its_content(home: Path) -> None:
    planned = launcher("plan", "images.yaml", "--json", cwd=home)
    (index,) = planned.document["indexes"]
    assert {name: index[name] for name in ("url", "num_samples", "num_objects", "num_classes", "passed_over")} == {
        "url": str(home / "images"), "num_samples": NUM_IMAGES, "num_objects": NUM_IMAGES, "num_classes": 3,
        "passed_over": {},
    }  # fmt: skip
    assert "content" not in index
    text = launcher("plan", "images.yaml", cwd=home).stdout
    assert f"{home / 'images'}: {NUM_IMAGES} samples of 3 classes\n" in text


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalScheduler]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cluster"))
    with local_scheduler(tmp_path / "cluster") as scheduler:
        yield scheduler


def test_images_that_are_submitted_with_the_code(home: Path, cluster: LocalScheduler) -> None:
    """Every process has a copy of them in a folder of its own."""
    job_file, own = home / "images.yaml", "data: {train: {_target_: jobs.data.image_folder, root: images}}"
    job_file.write_text(re.sub("data: .*", own, job_file.read_text()))
    ended = launcher("submit", "images.yaml", "--cluster", URL, "--json", cwd=home)
    assert ended.exit_code == 0, ended.stderr
    job, run = ended.document["job"], home.parent / "store/images"
    assert cluster.wait(job).exit_code == 0, cluster.log(job)
    (digest,) = indexes(run)
    assert recorded(run) == [[digest]]
