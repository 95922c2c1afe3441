import errno
import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import jobs
from cluster.errors import StorageError
from jobs.components.targets import Builder
from jobs.data import BadSample, LabelledImages, digits, image_folder, read_image, synthetic_images
from jobs.images.indexed_images import IndexedImages
from jobs.images.indexing.index_files import IndexFiles, use_index_files
from launcher.config.description import load
from tests.images import make_image_folder

pytestmark = pytest.mark.usefixtures("own_indexes")
JOBS = Path(jobs.__file__).parent


def samples(dataset: LabelledImages | IndexedImages) -> list[tuple[torch.Tensor, int]]:
    return [dataset[index] for index in range(len(dataset))]


def pixels(dataset: LabelledImages | IndexedImages) -> list[bytes]:
    return [image_CHW.contiguous().numpy().tobytes() for image_CHW, _ in samples(dataset)]


def listed_again(*args: Any, **options: Any) -> IndexedImages:
    """An image folder as a new process finds it."""
    use_index_files(IndexFiles())
    return image_folder(*args, **options)


def digest(dataset: LabelledImages | IndexedImages) -> str:
    """SHA-256 over all samples, in order."""
    return hashlib.sha256(dataset.targets.numpy().tobytes() + b"".join(pixels(dataset))).hexdigest()


class TestDigits:
    def test_the_splits_are_all_the_scans_that_scikit_learn_loads(self) -> None:
        from sklearn.datasets import load_digits

        scans = load_digits()
        both = [digits("train", image_size=8), digits("val", image_size=8)]

        ours = sorted((label, *image.flatten().tolist()) for split in both for image, label in samples(split))
        theirs = sorted((int(label), *(row / 16).tolist()) for row, label in zip(scans.data, scans.target))
        assert ours == theirs
        assert [len(split) for split in both] == [1437, 360]

    def test_the_split_is_fixed(self) -> None:
        assert digest(digits("train", image_size=8))[:16] == "0a319425ce4fcebb"
        assert digest(digits("val", image_size=8))[:16] == "308abf6ecb2d046d"

    def test_the_split_is_stratified(self) -> None:
        assert digits("val").targets.bincount().tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]

    def test_a_sample_is_a_gray_image_and_a_label(self) -> None:
        dataset = digits("train")
        image_CHW, label = dataset[5]

        assert (image_CHW.shape, image_CHW.dtype) == ((1, 32, 32), torch.float32)
        assert 0 <= image_CHW.min() < image_CHW.max() <= 1
        assert type(label) is int
        assert label == dataset.targets[5]
        assert dataset.targets.dtype == torch.int64
        assert dataset.classes == tuple("0123456789")

    def test_parity_is_another_question_about_the_same_scans(self) -> None:
        for split in ("train", "val"):
            by_digit, by_parity = digits(split), digits(split, labels="parity")  # type: ignore[arg-type]

            assert by_parity.classes == ("even", "odd")
            assert by_parity.targets.tolist() == [digit % 2 for digit in by_digit.targets.tolist()]
            assert pixels(by_parity) == pixels(by_digit)

    def test_it_does_not_draw_from_the_global_generators(self) -> None:
        torch.manual_seed(1)
        first = digest(digits("val"))
        torch.manual_seed(2)
        state = torch.get_rng_state()

        assert digest(digits("val")) == first
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_random_transform_is_a_function_of_the_seed_and_leaves_the_scans_alone(self) -> None:
        dataset = digits("train", transform=v2.RandomAffine(degrees=10, translate=(0.1, 0.1)))

        def draw(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return dataset[0][0]

        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        assert digest(digits("train")) == digest(digits("train"))

    def test_normalisation_comes_last(self) -> None:
        plain = digits("val", transform=v2.RandomInvert(p=1.0))
        normalised = digits("val", transform=v2.RandomInvert(p=1.0), mean=[0.3], std=[0.5])

        assert torch.equal(normalised[3][0], (plain[3][0] - 0.3) / 0.5)

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: digits("test"), "split must be train or val, got 'test'"),  # type: ignore[arg-type]
            (lambda: digits("val", labels="odd"), "labels must be digit or parity, got 'odd'"),  # type: ignore[arg-type]
            (lambda: digits("val", image_size=0), "image_size must be at least 1 pixel, got 0; "),
            (lambda: digits("val", mean=[0.1, 0.2, 0.3]), "mean must hold a finite number for each of 1 channels, got"),
            (lambda: digits("val", std=[float("nan")]), "std must hold a finite number for each of 1 channels, got"),
            (lambda: digits("val", std=[0.0]), "std must hold numbers above 0, got [0.0]"),
        ],
    )
    def test_errors(self, build: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            build()


class TestImageFolder:
    def test_labels_count_the_folders_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        for name in ("cat", "ant", "bee"):
            make_image_folder(tmp_path / name, num_classes=1, per_class=2)  # a folder deeper, which is found as well

        dataset = image_folder(tmp_path)

        assert dataset.classes == ("ant", "bee", "cat")
        assert dataset.targets.tolist() == [0, 0, 1, 1, 2, 2]
        assert [label for _, label in samples(dataset)] == [0, 0, 1, 1, 2, 2]

    def test_a_sample_is_an_rgb_image_in_0_to_1(self, tmp_path: Path) -> None:
        image_CHW, label = image_folder(make_image_folder(tmp_path / "root", 2, 2, size=24))[0]

        assert (image_CHW.shape, image_CHW.dtype, type(label)) == ((3, 24, 30), torch.float32, int)
        assert 0 <= image_CHW.min() < image_CHW.max() <= 1
        assert image_CHW.max() > 1 / 255

    def test_transforms_see_bytes_and_normalisation_comes_last(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", 2, 2)
        seen: list[torch.Tensor] = []

        def crop(image_CHW: torch.Tensor) -> torch.Tensor:
            seen.append(image_CHW[:, :8, :9])
            return seen[-1]

        mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
        image_CHW, _ = image_folder(root, transform=crop, mean=mean, std=std)[0]

        assert seen[0].dtype == torch.uint8
        floats_CHW = seen[0].float() / 255
        assert torch.equal(image_CHW, (floats_CHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))

    def test_the_transforms_of_the_shipped_descriptions_are_functions_of_the_seed(self, tmp_path: Path) -> None:
        transform = v2.Compose([v2.RandomResizedCrop(size=32), v2.RandomHorizontalFlip()])
        dataset = image_folder(make_image_folder(tmp_path / "root", 2, 2), transform=transform)

        def draw(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return dataset[1][0]

        assert draw(1).shape == (3, 32, 32)
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))

    def test_the_split_by_hash_is_disjoint_complete_and_fixed(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=10, per_class=20, size=8)
        train, val, everything = (image_folder(root, split) for split in ("train", "val", None))

        assert len(everything) == len(set(pixels(everything))) == 200
        assert sorted(pixels(train) + pixels(val)) == sorted(pixels(everything))
        assert train.classes == val.classes == everything.classes
        assert val.targets.bincount().tolist() == [2, 2, 0, 1, 1, 3, 3, 3, 4, 2]

    def test_the_split_follows_names_alone(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=4, per_class=20, size=8)
        moved = shutil.copytree(root, tmp_path / "elsewhere")
        before = image_folder(root, "val", val_fraction=0.3)
        assert digest(image_folder(moved, "val", val_fraction=0.3)) == digest(before)

        for path in (moved / "class_000").iterdir():
            path.unlink()
        Image.new("RGB", (8, 8)).save(moved / "class_000" / "new.png")
        after = listed_again(moved, "val", val_fraction=0.3)
        others_before, others_after = before.targets[before.targets > 0], after.targets[after.targets > 0]
        assert torch.equal(others_before, others_after)

    def test_a_larger_fraction_only_adds_validation_images(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=3, per_class=40, size=8)

        small, large = (set(pixels(image_folder(root, "val", val_fraction=fraction))) for fraction in (0.2, 0.5))

        assert small < large

    def test_folders_named_train_and_val_are_the_splits(self, tmp_path: Path) -> None:
        make_image_folder(tmp_path / "train", num_classes=3, per_class=4)
        make_image_folder(tmp_path / "val", num_classes=3, per_class=2)
        shutil.rmtree(tmp_path / "val" / "class_001")

        train, val = image_folder(tmp_path, "train", num_classes=3), image_folder(tmp_path, "val", num_classes=3)

        assert train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert val.targets.tolist() == [0, 0, 2, 2]  # the label of class_002 is that of train
        assert val.classes == train.classes

    def test_other_files_and_hidden_folders_are_passed_over(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        (root / ".cache").mkdir()
        (root / "README.md").touch()
        (root / "class_000" / "Thumbs.db").touch()
        Image.new("RGB", (8, 8)).save(root / "class_001" / "UPPER.JPG")

        dataset = image_folder(root, num_classes=2)

        assert dataset.targets.tolist() == [0, 0, 1, 1, 1]

    def test_what_systems_and_tools_leave_is_passed_over_at_every_depth(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        (root / "class_000" / "deeper").mkdir()
        Image.new("RGB", (8, 8)).save(root / "class_000" / "deeper" / "image.png")
        left = [
            ".ipynb_checkpoints", "__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN",
            "System Volume Information", "lost+found", ".git", ".Trashes", "__pycache__",
        ]  # fmt: skip
        for folder in (root, root / "class_000", root / "class_000" / "deeper"):
            for name in left:
                (folder / name).mkdir()
                Image.new("RGB", (8, 8)).save(folder / name / "image.png")
            for name in ("._image_0000.jpg", ".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
                (folder / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")

        dataset = image_folder(root)

        assert (dataset.classes, dataset.targets.tolist()) == (("class_000", "class_001"), [0, 0, 0, 1, 1])
        assert len(samples(dataset)) == 5  # each can be decoded

    @pytest.mark.parametrize("target", [".", "..", "../..", "../class_000", "../class_001", "inner"])
    def test_a_folder_counts_once_whatever_links_lead_to_it(self, tmp_path: Path, target: str) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        (root / "class_000" / "inner").mkdir()
        shutil.move(root / "class_000" / "image_0000.jpg", root / "class_000" / "inner")
        before = image_folder(root)
        for place in ("class_000/again", "class_000/another", "class_000/inner/again"):
            (root / place).symlink_to((root / "class_000" / target).absolute())
        (root / "again").symlink_to(".")

        after = listed_again(root)

        assert (after.classes, digest(after)) == (before.classes, digest(before))

    def test_links_to_elsewhere_are_followed_once(self, tmp_path: Path) -> None:
        pool = make_image_folder(tmp_path / "pool", num_classes=3, per_class=2)
        in_pool = pixels(image_folder(pool))
        (tmp_path / "root" / "cat").mkdir(parents=True)
        (tmp_path / "root" / "dog").symlink_to(pool / "class_000")  # a class that is a link
        for name in ("b", "a"):  # two links to one folder
            (tmp_path / "root" / "cat" / name).symlink_to(pool / "class_001")
        (tmp_path / "root" / "cat" / "one.jpg").symlink_to(pool / "class_002" / "image_0000.jpg")
        (pool / "class_000" / "home").symlink_to(tmp_path / "root")

        dataset = image_folder(tmp_path / "root")

        assert (dataset.classes, dataset.targets.tolist()) == (("cat", "dog"), [0, 0, 0, 1, 1])
        assert pixels(dataset) == [*in_pool[2:5], *in_pool[:2]]

    def test_the_order_is_not_that_of_the_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=3, per_class=3)
        pool = make_image_folder(tmp_path / "pool", num_classes=1, per_class=2, seed=1)
        for name in ("x", "y"):
            (root / "class_001" / name).symlink_to(pool / "class_000")
        before, scandir = image_folder(root), os.scandir

        class Backwards:
            def __init__(self, folder: object) -> None:
                with scandir(folder) as listed:  # type: ignore[call-overload]
                    self._entries = sorted(listed, key=lambda entry: entry.name, reverse=True)

            def __enter__(self) -> list:
                return self._entries

            def __exit__(self, *_: object) -> None:
                pass

        monkeypatch.setattr(os, "scandir", Backwards)
        after = listed_again(root)

        assert (after.classes, digest(after)) == (before.classes, digest(before))

    @pytest.mark.parametrize(
        ("link", "target", "message"),
        [
            ("class_000/gone.jpg", "nowhere.jpg", "root/class_000/gone.jpg is a link that leads nowhere; repair or"),
            ("class_000/gone", "nowhere", "root/class_000/gone is a link that leads nowhere; repair or remove it"),
            ("class_002", "nowhere", "root/class_002 is a link that leads nowhere; repair or remove it"),
            ("class_000/self", "self", "root/class_000/self is a link that leads nowhere; repair or remove it"),
            ("class_002", "class_001", "root/class_002 and {tmp}/root/class_001 are the same folder, in two classes; "),
        ],
    )
    def test_links_that_lose_images_are_errors(self, tmp_path: Path, link: str, target: str, message: str) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        (root / link).symlink_to(target)

        with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/{message.format(tmp=tmp_path)}")):
            image_folder(root)

    def test_links_from_two_classes_to_one_folder_are_an_error(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        pool = make_image_folder(tmp_path / "pool", num_classes=1, per_class=2)
        for name in ("class_000", "class_001"):
            (root / name / "more").symlink_to(pool / "class_000")

        expected = f"{root}/class_001/more and {root}/class_000/more are the same folder, in two classes; remove one"
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            image_folder(root)

    def test_a_folder_that_cannot_be_read_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        (root / "class_001" / "inner").mkdir()
        scandir = os.scandir

        def refused(folder: Path) -> object:
            if folder == root / "class_001" / "inner":
                raise PermissionError(13, "Permission denied", str(folder))
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", refused)  # root may read everything

        with pytest.raises(ValueError, match=r"class_001/inner cannot be read, Permission denied; correct that, or"):
            image_folder(root)

    def test_pipes_are_no_images(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        os.mkfifo(root / "class_000" / "pipe")
        assert len(image_folder(root)) == 4

        os.mkfifo(root / "class_000" / "pipe.png")
        with pytest.raises(ValueError, match=r"class_000/pipe\.png is no file; repair or remove it$"):
            listed_again(root)

    @pytest.mark.parametrize("names", [["train"], ["train", "valid"], ["Train", "Val", "test"]])
    def test_misnamed_splits_are_no_classes(self, tmp_path: Path, names: list[str]) -> None:
        for name in names:
            make_image_folder(tmp_path / name, num_classes=2, per_class=2)

        expected = f"{tmp_path} must hold train/ and val/, or a folder per class, got {', '.join(sorted(names))}; "
        with pytest.raises(ValueError, match="^" + re.escape(expected)):
            image_folder(tmp_path, "train")

    def test_excluded_folders_are_no_classes(self, tmp_path: Path) -> None:
        root = make_image_folder(tmp_path / "root", num_classes=3, per_class=2)

        dataset = image_folder(root, exclude=["class_000", "not_there"], num_classes=2)

        assert dataset.classes == ("class_001", "class_002")
        assert dataset.targets.tolist() == [0, 0, 1, 1]

    def test_names_need_not_be_ascii(self, tmp_path: Path) -> None:
        (tmp_path / "été").mkdir()
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "été" / "日本.png")

        assert image_folder(tmp_path)[0][0][:, 0, 0].tolist() == [1, 0, 0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"root": "nowhere"}, "root must be a folder that holds a folder per class, got "),
            ({"root": "root/class_000/image_0000.jpg"}, "root must be a folder that holds a folder per class, got "),
            (
                {"root": "root/class_000"},
                "{tmp}/root/class_000 must hold a folder of images per class, got no folder; ",
            ),
            ({"root": "hollow"}, "{tmp}/hollow/a must hold images, got none; add some, or name it in exclude"),
            ({"root": "root", "num_classes": 101}, "{tmp}/root must hold num_classes=101 classes, got 2; set num_"),
            ({"root": "root", "split": "test"}, "split must be train or val, got 'test'"),
            (
                {"root": "root", "split": "val", "val_fraction": 1e-9},
                "{tmp}/root: none of its 4 samples is drawn for split=",
            ),
            ({"root": "root", "val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0; "),
            ({"root": "root", "exclude": "cats"}, "exclude must be a list of folder names, got 'cats'; write [cats]"),
            ({"root": "root", "std": [0.5]}, "std must hold a finite number for each of 3 channels, got [0.5]"),
            ({"root": "divided"}, "split must be train or val, got None; {tmp}/divided holds both as folders"),
            ({"root": "divided", "split": "val"}, "{tmp}/divided/val must hold classes of train/ only, got class_001;"),
        ],
    )
    def test_errors_say_where_what_and_what_to_do(self, tmp_path: Path, arguments: dict, message: str) -> None:
        make_image_folder(tmp_path / "root", num_classes=2, per_class=2)
        make_image_folder(tmp_path / "divided" / "train", num_classes=1, per_class=1)
        make_image_folder(tmp_path / "divided" / "val", num_classes=2, per_class=1)
        (tmp_path / "hollow" / "a").mkdir(parents=True)

        message = message.format(tmp=tmp_path)
        with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
            image_folder(**{**arguments, "root": tmp_path / arguments["root"]})
        assert "\n" not in str(error.value)


class TestReadImage:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
    def test_rgb(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"image.{suffix}"
        Image.new("RGB", (6, 4), (200, 100, 50)).save(path)

        image_CHW = read_image(path)

        assert (image_CHW.shape, image_CHW.dtype) == ((3, 4, 6), torch.uint8)
        assert np.allclose(image_CHW[:, 0, 0], [200, 100, 50], atol=3)  # JPEG and WebP are lossy

    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_gray_fills_the_three_channels(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"image.{suffix}"
        Image.new("L", (6, 4), 77).save(path)

        assert torch.equal(read_image(path), torch.full((3, 4, 6), 77, dtype=torch.uint8))

    def test_a_palette_becomes_its_colours(self, tmp_path: Path) -> None:
        image = Image.new("P", (6, 4), 1)
        image.putpalette([0, 0, 0, 9, 8, 7])
        image.save(tmp_path / "palette.png")
        image.save(tmp_path / "transparent.png", transparency=b"\x00\x80")

        for name in ("palette.png", "transparent.png"):
            assert read_image(tmp_path / name)[:, 0, 0].tolist() == [9, 8, 7]

    @pytest.mark.parametrize(("mode", "colour"), [("RGBA", (9, 8, 7, 128)), ("LA", (9, 128)), ("1", 1)])
    def test_alpha_is_dropped(self, tmp_path: Path, mode: str, colour: tuple[int, ...] | int) -> None:
        Image.new(mode, (6, 4), colour).save(tmp_path / "image.png")

        expected = {"RGBA": [9, 8, 7], "LA": [9, 9, 9], "1": [255, 255, 255]}[mode]
        assert read_image(tmp_path / "image.png")[:, 3, 5].tolist() == expected

    def test_cmyk_becomes_rgb(self, tmp_path: Path) -> None:
        Image.new("CMYK", (6, 4)).save(tmp_path / "image.jpg")

        assert torch.equal(read_image(tmp_path / "image.jpg"), torch.full((3, 4, 6), 255, dtype=torch.uint8))

    def test_an_image_lying_on_its_side_is_turned_upright(self, tmp_path: Path) -> None:
        image = Image.new("RGB", (6, 4))
        exif = image.getexif()
        exif[0x0112] = 6  # Orientation: the camera was held turned
        image.save(tmp_path / "image.jpg", exif=exif)

        assert read_image(tmp_path / "image.jpg").shape == (3, 6, 4)

    def test_16_bit_pixels_are_an_error(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(tmp_path / "image.png")

        with pytest.raises(ValueError, match=r"image\.png: must have 8 bits a channel, got I;16; convert the file$"):
            read_image(tmp_path / "image.png")

    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_a_broken_file_is_named(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        whole = path.read_bytes()

        for broken in (whole[: len(whole) // 2], whole[:9], b"", b"no image"):
            path.write_bytes(broken)
            with pytest.raises(
                ValueError, match=rf"image\.{suffix}: cannot be decoded, [^<]*; repair or remove"
            ) as error:
                read_image(path)
            assert "\n" not in str(error.value)

    def test_a_file_that_is_gone_is_bad_and_one_that_this_host_cannot_read_is_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(BadSample, match=r"gone\.jpg: cannot be read, No such file or directory; repair or remove"):
            read_image(tmp_path / "gone.jpg")
        with pytest.raises(BadSample, match=r"cannot be read, Is a directory; repair or remove"):
            read_image(tmp_path)

        def fail(_: Path) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(Path, "read_bytes", fail)
        with pytest.raises(StorageError, match=r"a\.jpg: cannot be read, Input/output error; check the disk, and who"):
            read_image(tmp_path / "a.jpg")


class TestSyntheticImages:
    def test_a_sample_is_a_function_of_its_index(self) -> None:
        dataset = synthetic_images(length=20, num_classes=7, image_size=16, channels=2)
        image_CHW, label = dataset[9]

        assert (image_CHW.shape, image_CHW.dtype, label) == ((2, 16, 16), torch.float32, 2)
        assert 0 <= image_CHW.min() < image_CHW.max() <= 1
        assert digest(dataset) == digest(synthetic_images(20, 7, 16, 2))
        assert digest(dataset) != digest(synthetic_images(20, 7, 16, 2, seed=1))
        assert len(set(pixels(dataset))) == 20
        assert len(dataset.classes) == 7

    @pytest.mark.parametrize("argument", ["length", "num_classes", "image_size", "channels"])
    def test_errors(self, argument: str) -> None:
        with pytest.raises(ValueError, match=rf"^{argument} must be at least 1, got 0$"):
            synthetic_images(**{"length": 8, argument: 0})


class TestShippedDescriptions:
    @pytest.mark.parametrize(
        ("name", "on_disk", "shape"),
        [
            ("digits", False, (1, 32, 32)),
            ("finetune", False, (1, 32, 32)),
            ("caltech101", True, (3, 224, 224)),
            ("resnet50", True, (3, 224, 224)),
        ],
    )
    def test_their_data_suits_their_model(self, tmp_path: Path, name: str, on_disk: bool, shape: tuple) -> None:
        overrides = []
        if on_disk:
            make_image_folder(tmp_path / "train", num_classes=2, per_class=2)
            make_image_folder(tmp_path / "val", num_classes=2, per_class=2)
            overrides = [f"data.train.root={tmp_path}", "model.num_classes=2"]
        spec = load(JOBS / f"{name}.yaml", overrides).spec
        model = Builder().build(spec.model, "model").eval()

        for key, target in (("data.train", spec.data.train), ("data.val", spec.data.val)):
            assert target is not None
            dataset = Builder().build(target, key)
            image_CHW, _ = dataset[0]
            assert (image_CHW.shape, image_CHW.dtype) == (shape, torch.float32)
            assert image_CHW.min() < 0 < image_CHW.max() < 3  # normalised
            assert model(image_CHW[None]).shape == (1, len(dataset.classes))


def test_datasets_travel_to_loader_processes(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "root", num_classes=2, per_class=2)

    for dataset in (digits("val"), image_folder(root), synthetic_images(4, 2, 16)):
        assert digest(pickle.loads(pickle.dumps(dataset))) == digest(dataset)  # noqa: S301


def test_samples_collate(tmp_path: Path) -> None:
    dataset = image_folder(make_image_folder(tmp_path / "root", 2, 2, size=24))

    images_NCHW, labels_N = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))

    assert (images_NCHW.shape, labels_N.tolist()) == ((4, 3, 24, 30), [0, 0, 1, 1])
    assert labels_N.dtype == torch.int64


def test_image_folders_of_tests_are_fixed(tmp_path: Path) -> None:
    first = image_folder(make_image_folder(tmp_path / "first", num_classes=3, per_class=2))
    second = image_folder(make_image_folder(tmp_path / "second", num_classes=3, per_class=2))
    other = image_folder(make_image_folder(tmp_path / "other", num_classes=3, per_class=2, seed=1))

    assert digest(first) == digest(second) != digest(other)
