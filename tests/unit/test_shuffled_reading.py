"""Reading in the order of ``data.shuffle``: whole blocks, each once, for the price that the plan tells."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.storage.local import SyncedLocalFileSystem
from jobs.data import BadSample, image_folder, tar_shards
from jobs.images import read_cost as costs
from jobs.images.index import IndexBuilder, Source
from jobs.images.index_files import IndexFiles, use_index_files
from jobs.images.indexed_images import IndexedImages, read_ranges
from jobs.images.kept_blocks import KeptBlocks
from jobs.images.read_cost import ReadCost
from jobs.sampling import StepPlan
from jobs.spec import JobSpec, ShuffleSpec, TrainSpec, WorkersSpec
from launcher.planning.shuffle_cost import plan_shuffle
from tests.shards import jpeg, write_shards
from tests.specs import bare_job

PER_SHARD, SAMPLES = 60, 480
SEED = 0


@pytest.fixture(autouse=True)
def _indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "_GAP", 4096)  # between neighbours lie 2 KiB, and an image has 3
    use_index_files(IndexFiles())
    yield
    use_index_files(IndexFiles())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read of a local file so far."""
    read, sizes = SyncedLocalFileSystem.cat_file, list[int]()

    def counted(*args, **kwargs) -> bytes:
        content = read(*args, **kwargs)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(SyncedLocalFileSystem, "cat_file", counted)
    return sizes


@pytest.fixture
def shards(tmp_path: Path) -> IndexedImages:
    write_shards(tmp_path / "shards", SAMPLES // PER_SHARD, PER_SHARD, size=40)
    return tar_shards(f"{tmp_path}/shards/shard-{{000000..{SAMPLES // PER_SHARD - 1:06d}}}.tar")


def described(
    shuffle: ShuffleSpec | None, loaders: int = 0, workers: int = 1, **train: int
) -> tuple[JobSpec, StepPlan]:
    job = bare_job(train=TrainSpec(**{"global_batch": 8, "shards": 2} | train), workers=WorkersSpec(num=workers))
    job = replace(job, data=replace(job.data, shuffle=shuffle, loaders=loaders))
    return job, StepPlan(SAMPLES, job.train.global_batch, job.train.shards, 1, shuffle)


class Numbers:
    """Reads numbers as samples, and keeps what was asked for; sample 5 is bad."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> list[bytes | BadSample]:
        self.asked.append(list(numbers))
        return [BadSample("5 is gone") if number == 5 else str(number).encode() for number in numbers]


class TestKeptBlocks:
    def test_a_block_is_read_once_for_all_its_samples_and_the_last_one_is_shorter(self) -> None:
        kept, read = KeptBlocks(num_samples=10, block=4, most=3), Numbers()

        assert kept.fetch([9, 2], read) == [b"9", b"2"]
        assert kept.fetch([8, 0, 7], read) == [b"8", b"0", b"7"]
        assert kept.fetch([1, 3, 4, 6], read) == [b"1", b"3", b"4", b"6"]

        assert read.asked == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]

    def test_a_sample_is_given_out_once(self) -> None:
        """So what is kept is what is yet to be used."""
        kept, read = KeptBlocks(num_samples=10, block=4, most=3), Numbers()
        for _ in range(2):
            assert kept.fetch([0, 1, 2], read) == [b"0", b"1", b"2"]

        assert read.asked == [[0, 1, 2, 3]] * 2

    def test_too_many_blocks_are_dropped_by_their_last_use(self) -> None:
        kept, read = KeptBlocks(num_samples=20, block=4, most=2), Numbers()
        kept.fetch([0], read)
        kept.fetch([8], read)
        kept.fetch([1], read)
        kept.fetch([12], read)
        read.asked.clear()

        assert kept.fetch([2, 13], read) == [b"2", b"13"]
        assert read.asked == []
        assert kept.fetch([9], read) == [b"9"]
        assert read.asked == [[8, 9, 10, 11]]

    def test_a_bad_sample_is_bad_when_it_is_its_turn(self) -> None:
        kept, read = KeptBlocks(num_samples=10, block=4, most=2), Numbers()

        assert kept.fetch([4], read) == [b"4"]
        (found,) = kept.fetch([5], read)
        assert str(found) == "5 is gone"

    def test_a_copy_for_another_process_holds_no_samples(self) -> None:
        kept, read = KeptBlocks(num_samples=10, block=4, most=2), Numbers()
        kept.fetch([0], read)
        other = copy.deepcopy(kept)

        assert other.fetch([1], read) == [b"1"]
        assert read.asked == [[0, 1, 2, 3]] * 2


def bytes_in(dataset: IndexedImages) -> int:
    """What a process keeps."""
    assert dataset._blocks is not None
    return sum(len(content) for block in dataset._blocks._kept.values() for content in block.values())


class TestPrice:
    @pytest.mark.parametrize(
        ("shuffle", "loaders", "workers"),
        [
            (ShuffleSpec(block=12, buffer=48), 0, 1),
            (ShuffleSpec(block=7, buffer=28), 1, 2),
            (ShuffleSpec(block=6, buffer=24, streams=2), 2, 2),
            (ShuffleSpec(block=12, buffer=48), 2, 2),
        ],
    )
    def test_an_epoch_takes_what_the_plan_tells(
        self, shards: IndexedImages, reads: list[int], shuffle: ShuffleSpec, loaders: int, workers: int
    ) -> None:
        """As torch hands micro-batches to loader processes, each of which has a copy of the dataset."""
        job, steps = described(shuffle, loaders, workers)
        planned = plan_shuffle(shards, steps, job)
        assert planned is not None
        content = shards.fetch(range(SAMPLES))
        reads.clear()

        own_shards, used, kept = steps.shards // workers, 0, 0
        for worker in range(workers):
            block = shards.in_blocks(shuffle.block, shuffle.kept_blocks * own_shards)
            processes = [copy.deepcopy(block) for _ in range(max(1, loaders))]
            for step in range(steps.steps_per_epoch):
                for shard in range(own_shards):
                    numbers = steps.samples(SEED, step, worker * own_shards + shard).tolist()
                    process = processes[(step * own_shards + shard) % len(processes)]
                    assert process.fetch(numbers) == [content[number] for number in numbers]
                    used += sum(len(content[number]) for number in numbers)
                    kept = max(kept, bytes_in(process))

        assert planned.own.requests == pytest.approx(len(reads) / SAMPLES, rel=0.1)
        assert planned.own.read == pytest.approx(sum(reads) / used, rel=0.1)
        assert kept == pytest.approx(planned.kept, rel=0.3)
        assert planned.kept_row_groups == 0

    def test_a_full_shuffle_takes_a_request_for_nearly_each_sample(
        self, shards: IndexedImages, reads: list[int]
    ) -> None:
        job, steps = described(ShuffleSpec(block=12, buffer=48))
        planned, full = plan_shuffle(shards, steps, job), replace(steps, shuffle=None)
        assert planned is not None
        reads.clear()
        for step in range(steps.steps_per_epoch):
            for shard in range(steps.shards):
                shards.fetch(full.samples(SEED, step, shard).tolist())

        assert planned.full.requests == pytest.approx(len(reads) / SAMPLES, rel=0.01)
        assert 0.9 < planned.full.requests <= 1

    @pytest.mark.parametrize(
        ("loaders", "workers", "streams", "readers", "enough"),
        [(0, 1, 1, 1, 1), (1, 2, 1, 1, 1), (4, 2, 1, 4, 4), (4, 2, 4, 1, 4), (4, 1, 1, 2, 2), (3, 2, 2, 3, 3)],
    )
    def test_how_many_processes_read_a_block(
        self, shards: IndexedImages, loaders: int, workers: int, streams: int, readers: int, enough: int
    ) -> None:
        job, steps = described(ShuffleSpec(block=12, buffer=48, streams=streams), loaders, workers)
        planned = plan_shuffle(shards, steps, job)
        assert planned is not None
        assert (planned.readers, planned.streams) == (readers, enough)

    def test_where_each_sample_is_an_object_no_block_is_read(self, tmp_path: Path) -> None:
        for number in range(4):
            path = tmp_path / "images" / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))
        images = image_folder(str(tmp_path / "images"))
        job, _ = described(ShuffleSpec(block=2, buffer=4), global_batch=2)
        planned = plan_shuffle(images, StepPlan(4, 2, 2, 1, job.data.shuffle), job)

        assert images.in_blocks(2, 4) is images
        assert planned is not None
        assert (planned.own.requests, planned.own.read, planned.full.requests) == (None, None, None)

    def test_a_sample_that_replaces_a_bad_one_is_read_alone(self, shards: IndexedImages, reads: list[int]) -> None:
        """So its block stays whole until its own turn comes, and those that are kept stay."""
        in_blocks, content = shards.in_blocks(12, 4), shards.fetch(range(SAMPLES))
        in_blocks.fetch([100])
        reads.clear()

        assert in_blocks.fetch_alone(101) == content[101]
        assert reads == [len(content[101])]
        assert in_blocks.fetch([101, 102]) == content[101:103]
        assert len(reads) == 1

    def test_there_is_none_without_the_key(self, shards: IndexedImages) -> None:
        job, steps = described(None)
        assert plan_shuffle(shards, steps, job) is None

    def test_of_parquet_whole_row_groups_are_read(self, tmp_path: Path) -> None:
        builder = IndexBuilder(Source("parquet", "/data"))
        builder.classes = ["a"]
        for name, rows in (("0.parquet", [3, 5]), ("1.parquet", [4])):
            builder.add_container(
                name, 100, "",
                offsets=np.repeat(np.arange(len(rows)), rows), lengths=np.concatenate([*map(np.arange, rows)]),
                labels=[0] * sum(rows), keys=list(map(str, range(sum(rows)))),
            )  # fmt: skip
        images = IndexedImages(builder.write(tmp_path / "index.arrow"), read_ranges, np.array([0, 1, 2, 4, 5, 9, 10]))

        assert images.read_cost([0, 1, 2]) == ReadCost(requests=1, read=3, used=3, size=38)
        assert images.read_cost([2, 3]) == ReadCost(requests=2, read=8, used=2, size=25)
        assert images.read_cost([6, 3, 4]) == ReadCost(requests=2, read=9, used=3, size=50)
        assert images.kept_row_groups == 200


class TestMixing:
    @pytest.mark.parametrize(
        "shuffle",
        [ShuffleSpec(block=16, buffer=64), ShuffleSpec(block=5, buffer=40, streams=3), ShuffleSpec(block=1, buffer=64)],
    )
    def test_it_is_that_of_whole_epochs(self, shards: IndexedImages, shuffle: ShuffleSpec) -> None:
        """Over 40 epochs some hundred neighbours meet in micro-batches, and more in steps."""
        job, steps = described(shuffle, global_batch=16)
        planned, epochs = plan_shuffle(shards, steps, job), 40
        assert planned is not None
        met = np.zeros(2)
        for batch in range(epochs * steps.steps_per_epoch):
            of_shards = [set(steps.samples(7, batch, shard).tolist()) for shard in range(steps.shards)]
            for place, sets in enumerate((of_shards, [set().union(*of_shards)])):
                met[place] += sum(number + 1 in numbers for numbers in sets for number in numbers)
        in_micro_batch, in_step = met / epochs / (SAMPLES - 1)

        assert planned.own.meet_in_micro_batch == pytest.approx(in_micro_batch, rel=0.25)
        assert planned.own.meet_in_step == pytest.approx(in_step, rel=0.25)

    def test_that_of_a_full_shuffle_is_by_arithmetic(self, shards: IndexedImages) -> None:
        job, steps = described(ShuffleSpec(block=16, buffer=64), global_batch=16)
        planned = plan_shuffle(shards, steps, job)

        assert planned is not None
        assert planned.full.meet_in_micro_batch == pytest.approx(7 / 479)
        assert planned.full.meet_in_step == pytest.approx(15 / 479)
