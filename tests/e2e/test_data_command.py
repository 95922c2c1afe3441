"""``launcher data``: what a person sees of the data of a job before a run."""

import io
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launcher.inspecting.parts import SAMPLES_AT_ONCE
from launcher.inspecting.verified_file import RECORD
from tests.e2e.command import Ended, Running, launcher
from tests.images import make_image_folder

NUM_CLASSES, PER_CLASS = 3, SAMPLES_AT_ONCE
NUM_IMAGES = NUM_CLASSES * PER_CLASS
MINE = f'''\
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

import jobs.data
from cluster.errors import StorageError


def images(root, gate, **arguments):
    """A folder of images of which only the first part is verified before there is a gate, or which fails there."""
    dataset = jobs.data.image_folder(root, **arguments)
    dataset.read = partial(read, dataset.read, gate)
    return dataset


def read(of_folder, gate, index, numbers):
    is_verified = len(numbers) == {SAMPLES_AT_ONCE}
    while is_verified and numbers[0] > 0 and not Path(gate).exists():
        if gate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if gate == "away":
            raise StorageError("s3://bucket: does not answer; look there")
        time.sleep(0.02)
    return of_folder(index, numbers)


def points(length):
    return [([number, 0.5], number / length) for number in range(length)]


def labelled(length):
    return Labelled(length)


def rounded(length, listed):
    dataset = Labelled(length)
    dataset.targets = torch.arange(listed).to(torch.bfloat16) / 2
    return dataset


class Away:
    def __len__(self):
        return 100

    def __getitem__(self, number):
        raise StorageError("s3://bucket: does not answer; look there")


class Labelled:
    classes = ["even", "odd", "never"]

    def __init__(self, length):
        self.length, self.targets = length, [number % 2 for number in range(length)]

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        if number == 3:
            raise OSError("disk on fire")
        return jobs.data.digits("val")[number]
'''
JOB = """\
name: photos
model: {{_target_: jobs.models.Net, in_channels: 3, num_classes: 3, image_size: 16}}
data:
  train:
    _target_: jobs.data.image_folder
    root: {root}
    split: train
    transform: {{_target_: torchvision.transforms.v2.RandomCrop, size: 16}}
    mean: [0.5, 0.5, 0.5]
    std: [0.25, 0.25, 0.25]
  val: {{_target_: jobs.data.image_folder, root: {root}, split: val}}
loss: CrossEntropyLoss
optimizer: {{_target_: SGD, lr: 0.01}}
train: {{global_batch: 8, shards: 4}}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the job file, with images of training and of validation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    make_image_folder(root / "train", NUM_CLASSES, PER_CLASS, size=16)
    make_image_folder(root / "val", NUM_CLASSES, 4, size=20, seed=1)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "photos.yaml").write_text(JOB.format(root=root))
    return tmp_path


def data(home: Path, *arguments: object) -> Ended:
    return launcher("data", "photos.yaml", *arguments, cwd=home)


def test_a_folder_of_images(home: Path) -> None:
    root = home / "images" / "train"
    (root / "class_000" / "._image_0000.jpg").write_text("left by a desktop")
    (root / "class_001" / "image_0000.jpg").write_text("<html>404</html>")
    Image.new("L", (8, 30)).save(root / "class_002" / "image_0000.png")

    ended = data(home, "--json", "--sample", 1000)
    assert ended.exit_code == 1, "a sample is broken"
    train, val = ended.document["datasets"]["train"], ended.document["datasets"]["val"]
    assert (train["key"], train["dataset"]) == ("data.train", "jobs.data.image_folder")
    assert train["source"]["url"] == str(home / "images")
    assert (train["samples"], val["samples"]) == (NUM_IMAGES + 1, 4 * NUM_CLASSES)
    assert [each["count"] for each in train["classes"]] == [PER_CLASS, PER_CLASS, PER_CLASS + 1]
    assert train["imbalance"] == (PER_CLASS + 1) / PER_CLASS
    assert sum(each["count"] for each in train["passed_over"].values()) == 1
    sampled = train["sampled"]
    assert sampled["samples"] == NUM_IMAGES + 1
    assert (sampled["width"]["min"], sampled["width"]["max"], sampled["height"]["max"]) == (8, 20, 30)
    assert sampled["formats"] == {"JPEG": NUM_IMAGES - 1, "PNG": 1}
    assert sampled["modes"] == {"RGB": NUM_IMAGES - 1, "L": 1}
    (broken,) = sampled["broken"]
    assert broken["url"] == str(root / "class_001" / "image_0000.jpg")
    assert broken["problem"].startswith("cannot be decoded")
    assert val["sampled"]["broken"] == []

    ended = data(home, "--split", "val")
    assert ended.exit_code == 0, ended.stderr
    assert ended.stdout.splitlines()[0].split() == ["data.val", "jobs.data.image_folder"]
    assert "data.train" not in ended.stdout


def test_an_interrupted_verification_goes_on(home: Path) -> None:
    broken = home / "images" / "train" / "class_002" / "image_0007.jpg"
    broken.write_bytes(broken.read_bytes()[:-100])
    gate = home / "gate"
    arguments = (
        f"data.train={{_target_: mine.images, root: {home / 'images'}, split: train, gate: {gate}}}",
        "--split", "train", "--sample", 2, "--verify", "--json",
    )  # fmt: skip

    running = Running(("data", "photos.yaml", *arguments), home)
    running.wait_until(
        lambda: sum(kept.stat().st_size for kept in kept_files(home)) == SAMPLES_AT_ONCE * RECORD.itemsize
    )
    running.signal_group(signal.SIGINT)
    ended = running.wait()
    assert ended.exit_code == 130, ended.stderr
    assert ended.document["status"] == "interrupted"
    assert ended.document["verified"] == {"read": SAMPLES_AT_ONCE, "samples": NUM_IMAGES}
    assert "the same command goes on" in ended.stderr

    gate.touch()
    ended = data(home, *arguments)
    assert ended.exit_code == 1, ended.stderr
    verified = ended.document["verified"]
    assert verified["resumed"] == SAMPLES_AT_ONCE
    assert verified["datasets"]["train"]["samples"] == NUM_IMAGES
    assert [each["url"] for each in verified["datasets"]["train"]["broken"]] == [str(broken)]
    assert verified["resumed_since"] is not None
    assert kept_files(home) == [], "the next verification reads all"


@pytest.mark.parametrize(
    ("gate", "exit_code", "problem"),
    [("killed", 1, "was killed by SIGKILL; is there enough memory?"), ("away", 4, "s3://bucket: does not answer")],
)
def test_a_verification_that_fails_says_why(home: Path, gate: str, exit_code: int, problem: str) -> None:
    train = f"data.train={{_target_: mine.images, root: {home / 'images'}, split: train, gate: {gate}}}"
    ended = data(home, train, "--split", "train", "--sample", 2, "--verify", "--json")
    assert ended.exit_code == exit_code, ended.stderr
    assert problem in ended.document["error"]


def kept_files(home: Path) -> list[Path]:
    folder = home / "cache" / "launcher" / "verified"
    return list(folder.iterdir()) if folder.exists() else []


def test_equal_images_are_found(home: Path) -> None:
    train, val = home / "images" / "train", home / "images" / "val"
    shutil.copy(train / "class_000" / "image_0001.jpg", val / "class_000" / "leaked.jpg")
    shutil.copy(train / "class_000" / "image_0002.jpg", train / "class_001" / "elsewhere.jpg")
    shutil.copy(train / "class_000" / "image_0003.jpg", train / "class_000" / "again.jpg")

    of_its_own = f"data.val={{_target_: jobs.data.image_folder, root: {val}}}"  # another index
    ended = data(home, of_its_own, "--duplicates", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert ended.document["verified"]["datasets"]["train"] == {"samples": NUM_IMAGES + 2, "broken": []}
    found = ended.document["duplicates"]
    assert [found[name] for name in ("groups", "samples", "in_both", "labels_differ")] == [3, 6, 1, 1]
    leaked, elsewhere, again = found["list"]
    assert leaked["in_both"]
    assert [(each["key"], each["url"]) for each in leaked["samples"]] == [
        ("data.train", str(train / "class_000" / "image_0001.jpg")),
        ("data.val", str(val / "class_000" / "leaked.jpg")),
    ]
    assert [each["label"] for each in elsewhere["samples"]] == ["class_000", "class_001"]
    assert elsewhere["labels_differ"]
    assert (again["in_both"], again["labels_differ"]) == (False, False)


def test_the_contact_sheet_shows_the_first_step(home: Path) -> None:
    sheet = home / "sheets" / "first.png"
    ended = data(home, "--sheet", sheet, "--sample", 1, "--verify", "--json", "train.global_batch=16")
    assert ended.exit_code == 0, ended.stderr
    verified = ended.document["verified"]["datasets"]
    assert {split: each["samples"] for split, each in verified.items()} == {"train": NUM_IMAGES, "val": 12}
    document = ended.document["sheet"]
    assert (document["url"], document["last_step"]) == (str(sheet), 1)
    assert len(document["samples"]) == len(document["labels"]) == 16
    assert document["scaling"] == "mean and std undone"
    with Image.open(io.BytesIO(sheet.read_bytes())) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 1000
    assert pixels.shape[1] > 1000


def test_data_of_ones_own(home: Path) -> None:
    own = ("data.train={_target_: mine.points, length: 10}", "data.val={_target_: mine.labelled, length: 9}")
    ended = data(home, *own, "--json")
    assert ended.exit_code == 1, "a sample raises"
    points, labelled = ended.document["datasets"]["train"], ended.document["datasets"]["val"]
    assert (points["source"], points["classes"], points["targets"]) == (None, None, None)
    assert points["shapes"] == {"input": {"list": 10}, "target": {"float": 10}}
    assert [(each["name"], each["count"]) for each in labelled["classes"]] == [("even", 5), ("odd", 4), ("never", 0)]
    assert labelled["shapes"] == {"input": {"[1, 32, 32] torch.float32": 8}, "target": {"int": 8}}
    assert labelled["sampled"]["broken"] == [{"url": "sample 3", "problem": "OSError: disk on fire"}]

    ended = data(home, *own, "--verify")
    assert ended.exit_code == 2
    assert "--verify and --duplicates" in ended.stderr

    rounded = [
        f"data.{split}={{_target_: mine.rounded, length: 9, listed: {listed}}}"
        for split, listed in (("train", 9), ("val", 8))
    ]
    whole, short = data(home, *rounded, "--json").document["datasets"].values()
    assert (whole["targets"]["type"], whole["targets"]["max"], whole["unused_targets"]) == ("float32", 4.0, None)
    assert (short["targets"], short["classes"], short["unused_targets"]) == (None, None, 8)


@pytest.mark.parametrize("arguments", [[], ["--sheet", "a.png"]])
def test_a_store_that_does_not_answer_is_said(home: Path, arguments: list[str]) -> None:
    ended = data(home, "data.train={_target_: mine.Away}", "data.val=null", *arguments)
    assert (ended.exit_code, ended.stdout) == (4, "")
    assert "s3://bucket: does not answer; look there" in ended.stderr.splitlines()[-1]


def test_what_the_sheet_finds_broken_counts(home: Path) -> None:
    images = home / "images" / "train"
    (images / "class_001").rename(images / "class  one")
    for path in images.glob("*/*.jpg"):
        path.write_bytes(b"no image")
    ended = data(home, "--split", "train", "--sample", 1, "--sheet", "a.png", "--json")
    assert ended.exit_code == 1
    sheet = ended.document["sheet"]
    assert (sheet["labels"], len(sheet["broken"])) == (["broken"] * 16, 16)
    named = [each for each in sheet["broken"] if "class  one" in each["url"]]
    assert named
    assert all(Path(each["url"]).exists() for each in sheet["broken"])
    assert all(each["problem"].startswith("cannot be decoded") for each in sheet["broken"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["data.val=null", "--split", "val"], "data.val must be a dataset for --split val"),
        (["--split", "val", "--sheet", "a.png"], "leave --split val out"),
        (["--sheet", "a.jpg"], "--sheet must end in .png"),
        (["data.train.root=nowhere"], "data.train"),
        (["train.global_batch=800", "train.shards=8", "--sheet", "a.png"], "train.global_batch must be at most"),
    ],
)
def test_what_cannot_be_shown_is_said(home: Path, arguments: list[str], problem: str) -> None:
    ended = data(home, *arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert problem in ended.stderr.splitlines()[-1]
