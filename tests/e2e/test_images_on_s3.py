"""Images on an S3 server, as WebDataset and Hugging Face write them: trained on, resumed and verified there."""

import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.file_systems import file_system_class
from launcher.inspecting.parts import SAMPLES_AT_ONCE
from launcher.inspecting.verified_file import RECORD
from tests.e2e.command import Running, checkpointed, launcher, rows
from tests.faults.injection import Fault, fired
from tests.image_stores import upload
from tests.shards import jpeg, write_shards
from tests.stores import S3Server

pytestmark = pytest.mark.slow

NUM_CLASSES, NUM_SHARDS, PER_SHARD = 3, 4, 24
NUM_SAMPLES = NUM_SHARDS * PER_SHARD
BAD, BAD_VAL = 29, 13
"""Samples of training and validation that are no images."""
JOB = """\
name: images
store: {store}
model: {{_target_: jobs.models.Net, in_channels: 3, num_classes: 3, image_size: 16}}
data:
  train: {train}
  val: {val}
  shuffle: {{block: 4, buffer: 16}}
  on_bad_sample: skip
loss: CrossEntropyLoss
optimizer: {{_target_: SGD, lr: 0.01}}
train: {{epochs: 2, global_batch: 8, shards: 4}}
workers: {{num: 2}}
checkpoint: {{every_steps: 4}}
tracking: {{mode: disabled}}
"""
CROP = "transform: {_target_: torchvision.transforms.v2.RandomCrop, size: 16}"
MINE = f'''\
import time
from functools import partial
from pathlib import Path

import jobs.data


def shards(urls, gate):
    """Tar shards of which only the first samples are read before there is a gate."""
    dataset = jobs.data.tar_shards(urls, classes={NUM_CLASSES})
    dataset.read = partial(read, dataset.read, gate)
    return dataset


def read(of_shards, gate, index, numbers):
    while len(numbers) == {SAMPLES_AT_ONCE} and numbers[0] > 0 and not Path(gate).exists():
        time.sleep(0.02)
    return of_shards(index, numbers)
'''


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder of the server, which this process and its commands reach."""
    for name, value in {**s3.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    file_system_class("s3", "").clear_instance_cache()
    yield f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    file_system_class("s3", "").clear_instance_cache()


def write_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a training and a validation split, as a data set on the Hub has them."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(folder.parent / "hf"))
    hf = pytest.importorskip("datasets")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["cat", "dog", "owl"])})
    for split, bad, parts in (("train", BAD, NUM_SHARDS), ("validation", BAD_VAL, 1)):
        num = NUM_SAMPLES if split == "train" else PER_SHARD
        content = [b"no image" if number == bad else jpeg(number, 20) for number in range(num)]
        columns = {
            "image": [{"bytes": each, "path": f"{number}.jpg"} for number, each in enumerate(content)],
            "label": [number % NUM_CLASSES for number in range(num)],
        }
        whole = hf.Dataset.from_dict(columns, features=features)
        for part in range(parts):
            path = folder / f"{split}-{part:05}-of-{parts:05}.parquet"
            whole.shard(parts, part, contiguous=True).to_parquet(path, batch_size=10)


def spoil(shard: Path, number: int) -> None:
    """Overwrites an image of a shard."""
    content = shard.read_bytes()
    assert content.count(jpeg(number, 20)) == 1
    shard.write_bytes(content.replace(jpeg(number, 20), b"0" * len(jpeg(number, 20))))


@pytest.fixture(params=["tar", "parquet"])
def home(request: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job file, with data of one format in the bucket."""
    data, home = tmp_path / "data", tmp_path / "home"
    if request.param == "tar":
        (data / "val").mkdir(parents=True)
        spoil(write_shards(data / "train", NUM_SHARDS, PER_SHARD, NUM_CLASSES, size=20)[BAD // PER_SHARD], BAD)
        spoil(write_shards(data / "val", 1, PER_SHARD, NUM_CLASSES, size=20)[0], BAD_VAL)
        dataset = f"{{_target_: jobs.data.tar_shards, urls: '{bucket}/%s/shard-*.tar', {CROP}}}"
    else:
        data.mkdir()
        write_parquet(data, monkeypatch)
        dataset = f"{{_target_: jobs.data.parquet_images, urls: '{bucket}/*.parquet', split: %s, {CROP}}}"
    upload(data, bucket)
    home.mkdir()
    job = JOB.format(store=tmp_path / "store", train=dataset % "train", val=dataset % "val")
    (home / "images.yaml").write_text(job)
    return home


def test_two_workers_that_are_killed_give_the_bits_of_one(home: Path, make_plan: Any) -> None:
    run = home.parent / "store/images"
    undisturbed = launcher("run", "images.yaml", "name=undisturbed", "workers.num=1", "--json", cwd=home)
    assert undisturbed.exit_code == 0, undisturbed.stderr
    assert "is bad and skipped" in undisturbed.stderr

    plan = make_plan(Fault(kind="hold", doing="forward", step=11, rank=1))
    running = Running(["run", "images.yaml"], home)
    running.wait_until(lambda: checkpointed(run, 8)() and fired(plan).keys() == {0})
    running.signal_group(signal.SIGKILL)
    running.wait()
    make_plan()
    resumed = launcher("resume", run, "data.loaders=1", "--json", cwd=home)

    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.document["attempts"] == 2
    assert resumed.document["state_sha256"] == undisturbed.document["state_sha256"]
    assert rows(run) == rows(run.parent / "undisturbed")
    assert skipped(run, home) == skipped(run.parent / "undisturbed", home) == {("train", BAD), ("val", BAD_VAL)}


def skipped(run: Path, home: Path) -> set[tuple[str, int]]:
    """What ``launcher status`` lists; the URL of each is told."""
    document = launcher("status", run, "--json", cwd=home).document["skipped_samples"]
    assert document["count"] == len(document["first"])
    assert all("s3://" in each["reason"] and "cannot be decoded" in each["reason"] for each in document["first"])
    return {(each["split"], each["number"]) for each in document["first"]}


def test_a_verification_goes_on_and_names_what_has_vanished(bucket: str, tmp_path: Path) -> None:
    """Of three shards, one is cut off and one deleted after the listing of the second command."""
    shards = write_shards(tmp_path / "data", 3, SAMPLES_AT_ONCE, NUM_CLASSES)
    store = upload(tmp_path / "data", bucket)
    (tmp_path / "mine.py").write_text(MINE)
    gate = tmp_path / "gate"
    own = f"{{_target_: mine.shards, urls: '{bucket}/shard-{{000000..000002}}.tar', gate: {gate}}}"
    (tmp_path / "images.yaml").write_text(JOB.format(store=tmp_path / "store", train=own, val="null"))
    command = ["data", "images.yaml", "--sample", 2, "--verify", "--json"]

    running = Running(command, tmp_path)
    kept = tmp_path / "cache/launcher/verified"
    running.wait_until(lambda: sum(path.stat().st_size for path in kept.glob("*")) == SAMPLES_AT_ONCE * RECORD.itemsize)
    running.signal_group(signal.SIGINT)
    interrupted = running.wait()
    assert interrupted.exit_code == 130, interrupted.stderr
    assert interrupted.document["verified"] == {"read": SAMPLES_AT_ONCE, "samples": 3 * SAMPLES_AT_ONCE}

    running = Running(command, tmp_path)
    running.wait_until(lambda: f"verifying  0/{3 * SAMPLES_AT_ONCE} images" in running.stderr)
    content = shards[1].read_bytes()
    store.write(shards[1].name, content[: content.index(jpeg(SAMPLES_AT_ONCE + 40)) + 10])
    store.delete([shards[2].name])
    gate.touch()
    ended = running.wait()

    assert ended.exit_code == 1, ended.stderr
    assert ended.document["verified"]["resumed"] == SAMPLES_AT_ONCE
    verified = ended.document["verified"]["datasets"]["train"]
    assert verified["samples"] == 3 * SAMPLES_AT_ONCE
    assert [(each["url"], each["problem"]) for each in verified["broken"]] == [
        *(
            (f"{bucket}/{shards[1].name}#{number:05}", "its object ends before it does; restore it")
            for number in range(SAMPLES_AT_ONCE + 40, 2 * SAMPLES_AT_ONCE)
        ),
        *(
            (f"{bucket}/{shards[2].name}#{number:05}", "is gone; restore it")
            for number in range(2 * SAMPLES_AT_ONCE, 3 * SAMPLES_AT_ONCE)
        ),
    ]
