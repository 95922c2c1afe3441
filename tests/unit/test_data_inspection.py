"""The parts of ``launcher data``: documents from indexes and labels, equal content, the contact sheet."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cluster.errors import DescriptionError, StorageError
from jobs.data.loader import training_batches
from jobs.images.decoding import BadSample
from jobs.images.indexing.index import Index, IndexBuilder, Source
from jobs.images.inspection import ImageFacts
from jobs.images.labelled_images import LabelledImages
from jobs.sampling import StepPlan
from jobs.spec import JobSpec
from launcher.config.description import parse
from launcher.display.contact_sheet import draw_sheet
from launcher.display.data_text import data_text
from launcher.inspecting.duplicates import HashedDataset, find_duplicates
from launcher.inspecting.inspect import has_broken
from launcher.inspecting.sheet import make_sheet, to_pixels
from launcher.inspecting.summary import InspectedImage, summarise_index, summarise_labels
from launcher.inspecting.verified_file import RECORD
from launcher.planning.built_index import place_of


def make_index(folder: Path, labels: Sequence[int], classes: Sequence[str] = ("cat", "dog"), size: int = 5) -> Index:
    builder = IndexBuilder(Source("test", "s3://bucket/images", {"root": 1}))
    builder.classes = classes
    names = [f"{number}.jpg" for number in range(len(labels))]
    builder.add_files(names, [size] * len(labels), [""] * len(labels), labels)
    builder.pass_over("hidden", "b/.x")
    builder.pass_over("hidden", "a/.y")
    return builder.write(folder / f"{len(list(folder.iterdir()))}.arrow")


class TestSummary:
    def test_of_an_index(self, tmp_path: Path) -> None:
        index = make_index(tmp_path, [0, 1, 1, 1, 0])
        inspected = [
            InspectedImage(1, 100, ImageFacts("JPEG", "RGB", 10, 20, 1, 1)),
            InspectedImage(2, 300, ImageFacts("JPEG", "L", 30, 40, 1, 6)),
            InspectedImage(3, 200, ImageFacts("GIF", "P", 20, 20, 5, 1), "is torn; mend it"),
            InspectedImage(4, 9, None, "is gone; restore it"),
        ]
        document = summarise_index(index, np.array([1, 2, 3, 4]), inspected)
        assert document["source"] == {
            "format": "test", "url": "s3://bucket/images", "place": "s3://bucket/images", "options": {"root": 1}
        }  # fmt: skip
        assert document["samples"] == 4
        assert document["classes"] == [{"name": "cat", "count": 1}, {"name": "dog", "count": 3}]
        assert document["imbalance"] == 3
        assert document["passed_over"] == {"hidden": {"count": 2, "first": "a/.y"}}
        assert document["sampled"] == {
            "samples": 4,
            "bytes": {"min": 100, "p25": 150, "median": 200, "p75": 250, "max": 300},
            "width": {"min": 10, "p25": 15, "median": 20, "p75": 25, "max": 30},
            "height": {"min": 20, "p25": 20, "median": 20, "p75": 30, "max": 40},
            "formats": {"JPEG": 2, "GIF": 1},
            "modes": {"L": 1, "P": 1, "RGB": 1},
            "with_frames": 1,
            "rotated": 1,
            "broken": [
                {"url": "s3://bucket/images/3.jpg", "problem": "is torn; mend it"},
                {"url": "s3://bucket/images/4.jpg", "problem": "is gone; restore it"},
            ],
        }

    def test_a_class_without_samples_has_no_ratio(self) -> None:
        document = summarise_labels(np.array([0, 0]), ["cat", "dog"])
        assert document["classes"] == [{"name": "cat", "count": 2}, {"name": "dog", "count": 0}]
        assert document["imbalance"] is None

    def test_labels_without_names_are_their_own(self) -> None:
        document = summarise_labels(np.array([-100, 7, 7]), None)
        assert document["classes"] == [{"name": "-100", "count": 1}, {"name": "7", "count": 2}]

    def test_numbers_to_predict_have_a_range(self) -> None:
        document = summarise_labels(np.array([[0.5, 1.0], [2.5, 0.0]], np.float32), ())
        assert document["classes"] is None
        assert document["targets"] == {"shape": [2], "type": "float32", "min": 0.0, "mean": 1.0, "max": 2.5}

    @pytest.mark.parametrize("labels", [None, np.zeros(0, np.float32)])
    def test_nothing_is_known_of_what_is_not_listed(self, labels: np.ndarray | None) -> None:
        assert summarise_labels(labels, None) == {"classes": None, "imbalance": None, "targets": None}


def record(number: int, content: bytes) -> tuple[int, bytes, int, int]:
    return number, hashlib.sha256(content).digest(), 1, 0


class TestDuplicates:
    def test_leaks_come_first_then_labels_that_differ(self, tmp_path: Path) -> None:
        train, val = make_index(tmp_path, [0, 1, 0, 0, 0, 0]), make_index(tmp_path, [1, 0], classes=("dog", "cat"))
        contents = [b"a", b"a", b"b", b"c", b"c", b"c"]
        found = find_duplicates(
            {
                "train": HashedDataset(train, np.arange(6), np.array([*map(record, range(6), contents)], RECORD)),
                "val": HashedDataset(val, np.arange(2), np.array([record(0, b"b"), record(1, b"x")], RECORD)),
            }
        )
        assert {name: found[name] for name in ("groups", "samples", "in_both", "labels_differ")} == {
            "groups": 3, "samples": 7, "in_both": 1, "labels_differ": 1,
        }  # fmt: skip
        assert [
            [(each["key"], each["url"][-5:], each["label"]) for each in group["samples"]] for group in found["list"]
        ] == [
            [("data.train", "2.jpg", "cat"), ("data.val", "0.jpg", "cat")],
            [("data.train", "0.jpg", "cat"), ("data.train", "1.jpg", "dog")],
            [("data.train", f"{number}.jpg", "cat") for number in (3, 4, 5)],
        ]
        assert [group["sha256"] for group in found["list"]] == [
            hashlib.sha256(content).hexdigest() for content in (b"b", b"a", b"c")
        ]

    def test_only_samples_of_the_dataset_count(self, tmp_path: Path) -> None:
        index = make_index(tmp_path, [0, 0, 0, 0])
        whole = np.array([record(number, b"same") for number in (0, 1, 3)], RECORD)
        halves = {
            "train": HashedDataset(index, np.array([0, 2]), whole),
            "val": HashedDataset(index, np.array([3]), whole),
        }
        (group,) = find_duplicates(halves)["list"]
        assert [each["url"][-5:] for each in group["samples"]] == ["0.jpg", "3.jpg"]

    def test_there_may_be_none(self, tmp_path: Path) -> None:
        index = make_index(tmp_path, [0, 0])
        for whole in (np.zeros(0, RECORD), np.array([record(0, b"a"), record(1, b"b")], RECORD)):
            found = find_duplicates({"train": HashedDataset(index, np.arange(2), whole)})
            assert (found["groups"], found["samples"], found["list"]) == (0, 0, [])

    def test_zero_bytes_at_the_end_of_a_digest_are_kept(self, tmp_path: Path) -> None:
        digest = bytes(range(1, 31)) + b"\0\0"
        whole = np.array([(0, digest, 1, 0), (1, digest, 1, 0)], RECORD)
        found = find_duplicates({"train": HashedDataset(make_index(tmp_path, [0, 0]), np.arange(2), whole)})
        assert found["list"][0]["sha256"] == digest.hex()


SPEC = """\
name: x
seed: 3
model: a.Model
data: {train: a.data}
loss: MSELoss
optimizer: {_target_: SGD, lr: 1}
train: {global_batch: 6, shards: 2, epochs: 2}
"""


def spec() -> JobSpec:
    return parse(SPEC, "x.yaml").spec


def images(num: int = 20) -> LabelledImages:
    """Noisy images, whose noise is their augmentation."""

    def read(number: int) -> Tensor:
        return torch.full((3, 4, 5), number / num)

    def noise(image_CHW: Tensor) -> Tensor:
        return image_CHW * torch.rand(3, 4, 5)

    labels = torch.arange(num) % 3
    return LabelledImages(read, labels, ["cat", "dog", "fox"], noise, mean=[0.5] * 3, std=[0.25] * 3)


class TestSheet:
    def test_it_has_the_tensors_of_training(self) -> None:
        sheet, dataset = make_sheet(images(), spec()), images()
        loaded = list(
            training_batches(
                dataset, steps=StepPlan(20, 6, 2, 2), seed=3, block=range(2), start=0, end=3, loaders=0,
                device=torch.device("cpu"),
            )
        )  # fmt: skip
        inputs_NCHW = torch.cat([batch.inputs for batch in loaded])[:16]
        expected = ((inputs_NCHW * 0.25 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        assert np.array_equal(np.stack([tile.pixels for tile in sheet.tiles if tile.pixels is not None]), expected)
        labels = torch.cat([batch.target for batch in loaded])[:16].tolist()
        assert [tile.caption for tile in sheet.tiles] == [dataset.classes[label] for label in labels]
        assert (len(sheet.tiles), sheet.last_step, sheet.scaling) == (16, 3, "mean and std undone")

    def test_a_short_epoch_gives_fewer(self) -> None:
        assert len(make_sheet(images(13), spec()).tiles) == 12

    def test_a_broken_sample_is_an_empty_tile(self) -> None:
        dataset = images()
        read, broken = dataset._read, make_sheet(dataset, spec()).numbers[1]

        def fails(number: int) -> Tensor:
            if number == broken:
                raise BadSample("it is torn")
            return read(number)

        dataset._read = fails
        sheet = make_sheet(dataset, spec())
        assert (sheet.tiles[1].pixels, sheet.tiles[1].caption) == (None, "broken")
        assert sum(tile.pixels is None for tile in sheet.tiles) == 1
        assert sheet.broken == ({"url": f"sample {broken}", "problem": "it is torn"},)

        skipping = parse(SPEC, "x.yaml", ["data.on_bad_sample=skip"]).spec
        sheet = make_sheet(dataset, skipping)
        assert all(tile.pixels is not None for tile in sheet.tiles)
        assert (sheet.numbers[1] == broken, len(sheet.broken)) == (False, 1)

    def test_samples_that_are_all_broken_are_empty_tiles(self) -> None:
        dataset = images()

        def fails(number: int) -> Tensor:
            raise BadSample("is  torn", f"s3://b/evil  two/{number}.jpg")

        dataset._read = fails
        for on_bad_sample in ("error", "skip"):
            sheet = make_sheet(dataset, parse(SPEC, "x.yaml", [f"data.on_bad_sample={on_bad_sample}"]).spec)
            assert [tile.pixels for tile in sheet.tiles] == [None] * 16
            assert sheet.broken[0] == {"url": f"s3://b/evil  two/{sheet.numbers[0]}.jpg", "problem": "is torn"}

    def test_a_store_that_does_not_answer_is_no_wrong_description(self) -> None:
        dataset = images()

        def fails(number: int) -> Tensor:
            raise StorageError(f"s3://b: does not answer to read {number}.jpg; look there")

        dataset._read = fails
        with pytest.raises(StorageError, match="s3://b: does not answer"):
            make_sheet(dataset, spec())

    @pytest.mark.parametrize(
        ("sample", "problem"),
        [
            (
                (torch.zeros(7), 1),
                r"draws inputs that are images, \[channels, height, width\], got \[7\] torch.float32",
            ),
            (("text", 1), "got str of data.train"),
            (torch.zeros(3), "data.train: sample [0-9]+ raised ValueError"),
        ],
    )
    def test_what_is_no_image_is_an_error(self, sample: Any, problem: str) -> None:
        with pytest.raises(DescriptionError, match=problem):
            make_sheet([sample] * 20, spec())

    def test_large_images_are_reduced(self) -> None:
        tiles = make_sheet([(torch.zeros(1, 300, 600, dtype=torch.uint8), 0.25)] * 20, spec()).tiles
        assert tiles[0].pixels is not None
        assert (tiles[0].pixels.shape, tiles[0].caption) == ((128, 256, 3), "0.25")

    @pytest.mark.parametrize(
        ("image", "pixel", "scaling"),
        [
            (torch.full((3, 1, 2), 51, dtype=torch.uint8), [51, 51, 51], "values as they are"),
            (torch.full((1, 1, 2), 0.2), [51, 51, 51], "values as they are"),
            (torch.full((4, 1, 2), 0.2), [51, 51, 51], "values as they are"),
            (torch.tensor([[[-1.0, 4.0]]] * 3), [0, 0, 0], "each stretched from its smallest to its largest value"),
            (torch.full((2, 1, 2), 9.0), [0, 0, 0], "each stretched from its smallest to its largest value"),
            (torch.tensor([[[2.0, float("nan")]]]), [255] * 3, "each stretched from its smallest to its largest value"),
        ],
    )
    def test_values_become_pixels(self, image: Tensor, pixel: list[int], scaling: str) -> None:
        (pixels,), told = to_pixels([image], None, None)
        assert pixels is not None
        assert (pixels.shape, pixels[0, 0].tolist(), told) == ((1, 2, 3), pixel, scaling)

    def test_every_tile_is_drawn(self) -> None:
        colours = [(16 * number, 255 - 16 * number, 128) for number in range(16)]
        tiles = [
            (np.full((4, 6, 3), colour, np.uint8), f"class $_{number} \u4e00") for number, colour in enumerate(colours)
        ]
        with Image.open(io.BytesIO(draw_sheet([*tiles[:-1], (None, "broken")], "the title"))) as image:
            drawn = {colour for _, colour in image.convert("RGB").getcolors(2**24) or ()}
        assert set(colours[:-1]) <= drawn
        assert colours[-1] not in drawn


def document(**changes: Any) -> dict[str, Any]:
    """Of a dataset without an index."""
    return {
        "key": "data.train", "dataset": "mine.data", "source": None, "samples": 1200, "classes": None,
        "imbalance": None, "targets": None, "passed_over": {}, "sampled": {"samples": 200, "broken": []},
        "shapes": {"input": {"[3, 4, 5] torch.float32": 200}},
    } | changes  # fmt: skip


def text(dataset: dict[str, Any], **changes: Any) -> str:
    return data_text({"datasets": {"train": dataset}, "verified": None, "duplicates": None, "sheet": None} | changes)


@pytest.mark.parametrize("where", ["sampled", "verified", "sheet"])
def test_a_broken_sample_counts_wherever_it_was_found(where: str) -> None:
    broken = [{"url": "s3://b/1.jpg", "problem": "is gone"}]
    found = {name: broken if name == where else [] for name in ("sampled", "verified", "sheet")}
    whole = {
        "datasets": {"train": document(sampled={"samples": 1, "broken": found["sampled"]})},
        "verified": {"resumed": 0, "datasets": {"train": {"samples": 9, "broken": found["verified"]}}},
        "sheet": {"url": "a.png", "scaling": "as it is", "samples": [1] * 16, "broken": found["sheet"]},
        "duplicates": None,
    }
    assert has_broken(whole)
    assert data_text(whole).count("s3://b/1.jpg: is gone") == 1
    broken.clear()
    assert not has_broken(whole)


class TestText:
    def test_of_data_of_ones_own(self) -> None:
        assert text(document()) == (
            "data.train  mine.data\n"
            "samples     1,200\n"
            "targets     not listed\n"
            "sampled     200\n"
            "input       [3, 4, 5] torch.float32 200"
        )

    def test_of_many_classes_the_largest_and_the_smallest(self) -> None:
        classes = [{"name": f"n{number:03}", "count": number} for number in range(100)]
        shown = text(document(classes=classes)).split("\n\n")[1].splitlines()
        assert len(shown) == 1 + 10 + 1 + 10
        assert shown[1].split() == ["n099", "99", "#" * 30]
        assert shown[11].strip() == "... 80 more"
        assert shown[12].split() == ["n009", "9", "###"]
        assert shown[-2].split() == ["n001", "1", "#"]
        assert shown[-1].split() == ["n000", "0"]

    def test_of_what_is_broken_the_first(self) -> None:
        broken = [{"url": f"s3://b/{number}", "problem": "is gone"} for number in range(25)]
        shown = text(document(sampled={"samples": 200, "broken": broken})).split("\n\n")[-1].splitlines()
        assert shown[0] == "data.train: 25 broken of 200 sampled"
        assert shown[1] == "s3://b/0: is gone"
        assert shown[-1] == "... and 5 more, which --json lists"

    def test_of_a_verification(self) -> None:
        verified = {"resumed": 0, "datasets": {"train": {"samples": 1200, "broken": []}}}
        assert "verified    all 1,200: 0 broken" in text(document(), verified=verified)
        assert "data.train is not verified" in text(document(), verified={"resumed": 0, "datasets": {}})
        broken = [{"url": f"s3://b/{number}", "problem": "is gone"} for number in range(2)]
        both = {"resumed": 0, "datasets": {"train": {"samples": 1200, "broken": broken[:1]}}}
        assert text(document(sampled={"samples": 200, "broken": broken}), verified=both).endswith(
            "data.train: 1 broken of all\ns3://b/0: is gone\n\n"
            "data.train: 1 broken of 200 sampled, but whole when verified\ns3://b/1: is gone"
        )
        resumed = verified | {"resumed": 700, "resumed_since": "2026-01-02T03:04:05+00:00"}
        assert text(document(), verified=resumed).endswith(
            "700 samples were not read again: earlier commands found them whole, the first at "
            "2026-01-02T03:04:05+00:00, and their objects have not changed since"
        )

    def test_of_a_sheet_with_broken_tiles(self) -> None:
        sheet = {"url": "a.png", "scaling": "values as they are", "samples": [1] * 16}
        broken = [{"url": "s3://b/1.jpg", "problem": "is gone"}]
        assert text(document(), sheet=sheet | {"broken": broken}).endswith(
            "contact sheet: a.png (values as they are)\n\n"
            "data.train: 1 broken of those for the 16 tiles\ns3://b/1.jpg: is gone"
        )

    def test_of_targets_that_are_not_one_for_each_sample(self) -> None:
        assert "targets     not counted: 7 are listed, not a number for each sample" in text(document(unused_targets=7))

    def test_of_duplicates(self) -> None:
        samples = [{"key": f"data.{split}", "url": f"s3://b/{split}", "label": "cat"} for split in ("train", "val")]
        group = {"sha256": "ab", "in_both": True, "labels_differ": False, "samples": samples}
        found = {"groups": 1, "samples": 2, "in_both": 1, "labels_differ": 0, "list": [group]}
        assert text(document(), duplicates=found).endswith(
            "duplicates: 2 samples in 1 group of equal content: 1 in data.train and data.val, 0 with different labels\n"
            "in both: data.train s3://b/train (cat), data.val s3://b/val (cat)"
        )
        none = {"groups": 0, "samples": 0, "in_both": 0, "labels_differ": 0, "list": []}
        assert text(document(), duplicates=none).endswith("duplicates: none")


@pytest.mark.parametrize(
    ("urls", "place"),
    [
        (["train-{0..9}.tar"], "s3://bucket/train-{0..9}.tar"),
        (["a.tar", "b/*.tar", "c.tar"], "s3://bucket/a.tar, b/*.tar and 1 more"),
        ([""], "s3://bucket"),
    ],
)
def test_two_sources_below_one_url_are_told_apart(urls: list[str], place: str) -> None:
    assert place_of(Source("tar", "s3://bucket", {"urls": urls})) == place
