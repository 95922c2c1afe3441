"""What the README shows can be written."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.errors import LauncherError
from cluster.spec.ray import RayClusterSpec
from cluster.spec.slurm import SlurmClusterSpec
from jobs.components.targets import Builder
from jobs.images.indexed_images import IndexedImages
from launcher.cli import main
from launcher.config.clusters import load_cluster, open_scheduler
from launcher.config.description import parse
from tests.images import make_image_folder
from tests.shards import write_shards
from tests.tables import png, write_parquet

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DECLARED = re.findall(r"^\| [^|]+ \| `([a-z_]+: .+)` \|$", README, flags=re.MULTILINE)
AROUND = """\
name: x
model: a.Model
data: {train: a.data, val: a.data}
loss: MSELoss
"""


def test_there_is_a_table() -> None:
    assert len(DECLARED) >= 14


@pytest.mark.parametrize("line", DECLARED)
def test_a_line_of_the_table_is_a_description(line: str) -> None:
    key = line.partition(":")[0]
    optimizer = f"optimizer: {{_target_: SGD, lr: 1, {line}}}" if key == "groups" else "optimizer: SGD"
    written = [part for part in [*AROUND.splitlines(), optimizer] if part.partition(":")[0] != key]
    spec = parse("\n".join([*written, *([] if key == "groups" else [line])]), "README.md").spec

    assert getattr(spec.optimizer if key == "groups" else spec, key)


def test_the_example_is_a_description() -> None:
    (example,) = re.findall(r"```yaml\n(name: digits\n.+?)```", README, flags=re.DOTALL)
    assert parse(example, "README.md").spec.name == "digits"


@pytest.mark.usefixtures("own_indexes")
@pytest.mark.parametrize("split", ["train", "val"])
def test_each_format_of_images_is_a_line(tmp_path: Path, split: str) -> None:
    make_image_folder(tmp_path / "flowers", num_classes=2, per_class=40, size=8)
    names = [str(path) for path in sorted(tmp_path.rglob("*.jpg"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *[f"{name},{Path(name).parent}" for name in names]]))
    for shard, path in enumerate(write_shards(tmp_path / "shards", num_shards=147, per_shard=1)):
        path.rename(tmp_path / f"s-{shard:03d}.tar")
    write_parquet(tmp_path / "data/train-0.parquet", [png(0)] * 80, label=pa.array(["a", "b"] * 40))
    built: dict[str, Any] = {}
    for line in re.findall(r"^train: \{_target_: jobs\.data\..+\}(?=  +#)", README, flags=re.MULTILINE):
        text = line.replace("s3://bucket", str(tmp_path)).replace("split: train", f"split: {split}")
        spec = parse(AROUND.replace("train: a.data", text) + "optimizer: SGD", "README.md").spec
        built[spec.data.train.path] = Builder().build(spec.data.train, "data.train")
    assert [type(dataset) for dataset in built.values()] == [IndexedImages] * 4
    assert all(0 < len(dataset) < len(dataset.index) for dataset in built.values())


def test_the_file_of_a_cluster_takes_jobs(tmp_path: Path) -> None:
    (text,) = re.findall(r"clusters/lab\.yaml`:\n\n```yaml\n(.+?)```", README, flags=re.DOTALL)
    (tmp_path / "lab.yaml").write_text(text)
    spec, changes = load_cluster(str(tmp_path / "lab.yaml"), [])
    assert isinstance(spec, RayClusterSpec)
    assert (spec.address, spec.venv, len(spec.env), changes) == (
        "http://HEAD:8265", "/opt/venv", 2, ["workers.cpus=8.0", "workers.gpus=1"],
    )  # fmt: skip
    open_scheduler(spec)


def test_the_file_of_a_slurm_cluster_takes_jobs(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(kind: slurm\n.+?)```", README, flags=re.DOTALL)
    (tmp_path / "uni.yaml").write_text(text)
    assert len(text.splitlines()) == 10
    spec, changes = load_cluster(str(tmp_path / "uni.yaml"), [])
    assert isinstance(spec, SlurmClusterSpec)
    assert (spec.nodes.gpus, spec.time, changes) == (4, "4:00:00", ["workers.cpus=8.0", "workers.gpus=1"])
    open_scheduler(spec)


def test_every_verb_has_a_line() -> None:
    told = re.findall(r"^\| (`launcher .+?) \| ", README, flags=re.MULTILINE)
    assert {name for line in told for name in main.commands if f"launcher {name} " in f"{line.replace('`', ' ')} "} == {
        *main.commands
    }


def test_every_exit_code_has_a_line() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \| ", README, flags=re.MULTILINE)}
    assert codes == {0, *(error.exit_code for error in [LauncherError, *LauncherError.__subclasses__()])}


def test_every_place_that_it_names_is_there() -> None:
    places = re.findall(r"`((?:launcher|jobs|cluster|tests)/[\w./]*)`", README)
    assert len(places) > 20
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_its_map_has_every_room_and_no_other() -> None:
    (drawn,) = re.findall(r"## The rooms\n\n```\n(.+?)```", README, flags=re.DOTALL)
    floor, named = "", set()
    for line in drawn.splitlines():
        names = re.findall(r"^([a-z]+)/ |(?<=  )([a-z]+)/(?= )", line)
        for top, room in names:
            floor = top or floor
            named |= {f"{floor}/{room}"} if room else set()
    rooms = {
        str(path.parent.relative_to(ROOT))
        for floor in ("launcher", "jobs", "cluster")
        for path in (ROOT / floor).glob("*/__init__.py")
    }
    assert named == rooms
