"""The processes that verify images: what they do not read again, and what is told of one that hangs."""

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import Interrupted, TrainingError
from cluster.process import fork_server
from cluster.process.orders import Task
from jobs.data import BadSample, image_folder
from jobs.images.indexed_images import IndexedImages, read_ranges
from jobs.images.indexing.index import Index
from launcher.config.description import parse
from launcher.inspecting import readers
from launcher.inspecting.facts import IndexedSamples, IndexReader, Question
from launcher.inspecting.parts import SAMPLES_AT_ONCE
from launcher.inspecting.verification import VerifiedIndex, verify
from tests.images import make_image_folder

JOB = """\
name: x
model: a.Model
data: {{train: {train}}}
loss: MSELoss
optimizer: {{_target_: SGD, lr: 1}}
"""
NUM = 3 * SAMPLES_AT_ONCE
LIMIT_S = 60.0


@dataclass(frozen=True)
class Gated:
    """Reads the first part at once, and others when there is a file ``gate``; each leaves a file with what it is."""

    folder: Path

    def __call__(self, index: Index, numbers: Sequence[int]) -> list[bytes | BadSample]:
        (self.folder / f"read-{numbers[0]}").write_text(Path("/proc/self/oom_score_adj").read_text())
        deadline = time.monotonic() + LIMIT_S
        while numbers[0] > 0 and not (self.folder / "gate").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return read_ranges(index, numbers)


@dataclass(frozen=True)
class Short:
    """Returns nothing for the last sample."""

    def __call__(self, index: Index, numbers: Sequence[int]) -> list[bytes | BadSample]:
        return read_ranges(index, numbers)[:-1]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IndexedImages:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_image_folder(tmp_path / "images", num_classes=1, per_class=NUM, size=8)
    fork_server.start([__name__, readers.PROCESS.partition(":")[0]])
    return image_folder(tmp_path / "images")


@pytest.mark.parametrize("with_samples", [True, False])
def test_where_samples_lie_is_sent_only_if_it_is_asked(images: IndexedImages, with_samples: bool) -> None:
    train = f"{{_target_: jobs.data.image_folder, root: {images.index.source.url}}}"
    spec = parse(JOB.format(train=train), "x.yaml").spec
    question = Question(spec=spec, splits=("train",), num_sampled=40, with_samples=with_samples, with_sheet=False)
    answer = fork_server.call("launcher.inspecting.describing:describe", make_task("", question))
    assert answer.datasets["train"].document["sampled"]["formats"] == {"JPEG": 40}
    indexed = answer.datasets["train"].indexed
    assert (indexed.numbers.tolist() if with_samples else indexed) == (list(range(NUM)) if with_samples else None)


def make_task(entry: str, content: Any) -> Task:
    here = str(Path(__file__).parent)
    return Task(entry=entry, run_url="", import_paths=(here,), working_directory=here, content=content)


def verified(
    images: IndexedImages, *datasets: range, read: Any = read_ranges, interrupt_at: int = NUM + 1, **options: Any
) -> VerifiedIndex:
    """What becomes of samples, of which each range is a dataset."""

    def show(num_read: int, _: int) -> None:
        if num_read >= interrupt_at:
            raise KeyboardInterrupt

    reader = IndexReader(images.index.path, pickle.dumps(read))
    parts = [IndexedSamples(reader, np.arange(each.start, each.stop)) for each in datasets]
    callbacks = {"show": show, "tell": lambda _: None, "with_digests": True} | options
    return verify(parts, make_task, **callbacks)[images.index.path]


def test_what_changes_after_it_was_found_whole_is_read_again(images: IndexedImages, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=f"{SAMPLES_AT_ONCE} of {NUM} samples .*the same command goes on with") as how:
        verified(images, range(NUM), read=Gated(tmp_path), interrupt_at=1)
    assert "again" not in str(how.value)
    path = Path(images.index.url_of(7))
    path.write_bytes(bytes(path.stat().st_size))
    found = verified(images, range(NUM))
    assert (found.num_resumed, list(found.broken), len(found.records)) == (SAMPLES_AT_ONCE - 1, [7], NUM - 1)
    assert found.resumed_since is not None
    assert abs(found.resumed_since - time.time()) < 1000
    assert verified(images, range(NUM)).num_resumed == 0, "a verification that ends keeps nothing"


def test_what_is_broken_is_read_again(images: IndexedImages, tmp_path: Path) -> None:
    path = Path(images.index.url_of(7))
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(Interrupted, match=r"goes on with the others, and reads what is broken \(1\) again$"):
        verified(images, range(NUM), read=Gated(tmp_path), interrupt_at=1)
    path.write_bytes(content)
    found = verified(images, range(NUM))
    assert (found.num_resumed, found.broken) == (SAMPLES_AT_ONCE - 1, {})


def test_another_dataset_of_an_index_leaves_what_is_kept(images: IndexedImages, tmp_path: Path) -> None:
    train, val = range(2 * SAMPLES_AT_ONCE), range(2 * SAMPLES_AT_ONCE, NUM)
    with pytest.raises(Interrupted):
        verified(images, train, val, read=Gated(tmp_path), interrupt_at=1)
    assert verified(images, val).num_read == SAMPLES_AT_ONCE
    assert verified(images, train, val).num_resumed == SAMPLES_AT_ONCE


def test_of_a_store_without_versions_nothing_is_kept(
    images: IndexedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unstamped = SAMPLES_AT_ONCE
    with monkeypatch.context() as patched:
        patched.setattr("launcher.inspecting.verification.answers", without_stamps(readers.answers))
        with pytest.raises(Interrupted, match=f"reads {unstamped} of these again, whose store tells neither versions"):
            verified(images, range(NUM), read=Gated(tmp_path), interrupt_at=1)
    assert verified(images, range(NUM)).num_resumed == 0


def without_stamps(answers: Any) -> Any:
    def unstamped(*arguments: Any) -> Any:
        for each in answers(*arguments):
            each.whole["stamp"] = 0
            yield each

    return unstamped


def test_a_part_that_takes_long_is_told_and_the_kernel_takes_its_process_first(
    images: IndexedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LATE_S", 0.5)
    told = list[str]()

    def tell(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            (tmp_path / "gate").touch()

    found = verified(images, range(NUM), read=Gated(tmp_path), tell=tell)
    assert (found.num_read, found.broken) == (NUM, {})
    for begin in (SAMPLES_AT_ONCE, 2 * SAMPLES_AT_ONCE):
        first, last = (images.index.url_of(number) for number in (begin, begin + SAMPLES_AT_ONCE - 1))
        (line,) = [line for line in told if line.startswith(f"{first}: no answer for 0.5 s")]
        assert f"the samples up to {last}; the store is slow" in line
    assert {path.read_text().strip() for path in tmp_path.glob("read-*")} == {"1000"}


def test_a_function_that_reads_too_few_ends_the_verification(images: IndexedImages) -> None:
    with pytest.raises(TrainingError, match="ValueError: zip"):
        verified(images, range(NUM), read=Short())
