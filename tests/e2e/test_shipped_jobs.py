"""The other shipped descriptions, on a small generated image folder of 101 classes."""

import re
from pathlib import Path

import pytest

from tests.e2e.command import JOBS, launcher
from tests.images import make_image_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "photos", num_classes=101, per_class=2, size=64)


@pytest.mark.slow
def test_caltech101_at_full_size(images: Path, tmp_path: Path) -> None:
    ended = launcher(
        "run", JOBS / "caltech101.yaml", f"data.train.root={images}", "train.global_batch=8", "train.max_steps=2",
        "tracking.mode=disabled", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.stderr
    assert ended.document["step"] == 2
    assert ended.document["metrics"]["lr/0"] == 0.001


def test_resnet50_in_bf16_with_ema_and_warm_up(images: Path, tmp_path: Path) -> None:
    small = [
        f"data.train.root={images}", "model.num_classes=101", "data.loaders=1", "train.global_batch=16",
        "train.shards=4", "train.epochs=1", "train.max_steps=2", "workers.num=2", "workers.gpus=0", "workers.cpus=0.5",
        "data.train.transform.transforms[0].size=64", "data.val.transform.transforms[0].size=64",
        "data.val.transform.transforms[1].size=64", "tracking.mode=disabled",
    ]  # fmt: skip
    planned = launcher("plan", JOBS / "resnet50.yaml", *small, cwd=tmp_path)
    assert re.search(r"type:BatchNorm\*\s+106\s+53,120", planned.stdout), planned.stdout + planned.stderr
    ended = launcher("run", JOBS / "resnet50.yaml", *small, "--json", cwd=tmp_path)
    assert ended.exit_code == 0, ended.stderr
    result = ended.document
    assert result["step"] == 2
    assert 0 < result["metrics"]["lr/0"] < 0.4, "the rate is warming up"
