"""Reading in the order of ``data.shuffle``: whole blocks, each once, for the price that the plan tells."""

import copy
import itertools
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from jobs.data import BadSample, image_folder, tar_shards
from jobs.images import read_cost as costs
from jobs.images.indexed_images import IndexedImages, read_ranges
from jobs.images.indexing.index import Index, IndexBuilder, Source
from jobs.images.kept_blocks import KeptBlocks
from jobs.images.read_cost import ReadCost
from jobs.sampling import StepPlan
from jobs.shard_blocks import shard_blocks
from jobs.spec import JobSpec, ShuffleSpec, TrainSpec, WorkersSpec
from jobs.stream_readers import stream_readers
from launcher.planning.shuffle_cost import plan_shuffle
from tests.shards import jpeg, write_shards
from tests.specs import bare_job

pytestmark = pytest.mark.usefixtures("own_indexes")
PER_SHARD, SAMPLES = 60, 480
SEED = 0


@pytest.fixture(autouse=True)
def _gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_GAP", 4096)  # between neighbours lie 2 KiB, and an image has 3


@pytest.fixture
def shards(tmp_path: Path) -> IndexedImages:
    write_shards(tmp_path / "shards", SAMPLES // PER_SHARD, PER_SHARD, size=40)
    return tar_shards(f"{tmp_path}/shards/shard-{{000000..{SAMPLES // PER_SHARD - 1:06d}}}.tar")


def described(
    shuffle: ShuffleSpec | None, loaders: int = 0, workers: int | tuple[int, int] = 1, **train: int
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
        kept, read = KeptBlocks(num_samples=10, block=4, most=12), Numbers()

        assert kept.fetch([9, 2], read) == [b"9", b"2"]
        assert kept.fetch([8, 0, 7], read) == [b"8", b"0", b"7"]
        assert kept.fetch([1, 3, 4, 6], read) == [b"1", b"3", b"4", b"6"]

        assert read.asked == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]

    def test_a_sample_is_forgotten_when_it_is_returned(self) -> None:
        """So what is kept is what is yet to be used."""
        kept, read = KeptBlocks(num_samples=10, block=4, most=12), Numbers()
        for _ in range(2):
            assert kept.fetch([0, 1, 2], read) == [b"0", b"1", b"2"]

        assert read.asked == [[0, 1, 2, 3]] * 2

    def test_blocks_are_dropped_by_their_last_use_before_there_are_too_many_samples(self) -> None:
        kept, read = KeptBlocks(num_samples=20, block=4, most=6), Numbers()
        kept.fetch([0], read)
        kept.fetch([8], read)
        kept.fetch([1], read)
        kept.fetch([12], read)
        read.asked.clear()

        assert kept.fetch([2, 13], read) == [b"2", b"13"]
        assert read.asked == []
        assert kept.fetch([9], read) == [b"9"]
        assert read.asked == [[8, 9, 10, 11]]

    def test_while_it_reads_it_holds_what_it_may_keep_and_what_is_asked_for(self) -> None:
        kept, held = KeptBlocks(num_samples=400, block=4, most=10), list[int]()

        def read(numbers: Sequence[int]) -> list[bytes | BadSample]:
            held.append(sum(map(len, kept._kept.values())) + len(numbers))
            return [b""] * len(numbers)

        for number in range(0, 400, 4):
            kept.fetch([number, (number + 5) % 400], read)
            assert sum(map(len, kept._kept.values())) <= 10
        assert max(held) <= 12
        kept.fetch(range(80, 160, 4), read)  # it can do without none of these blocks
        assert held[-1] == 80

    def test_a_bad_sample_is_bad_when_it_is_its_turn(self) -> None:
        kept, read = KeptBlocks(num_samples=10, block=4, most=8), Numbers()

        assert kept.fetch([4], read) == [b"4"]
        (found,) = kept.fetch([5], read)
        assert str(found) == "5 is gone"

    def test_a_copy_for_another_process_holds_no_samples(self) -> None:
        kept, read = KeptBlocks(num_samples=10, block=4, most=8), Numbers()
        kept.fetch([0], read)
        other = copy.deepcopy(kept)

        assert other.fetch([1], read) == [b"1"]
        assert read.asked == [[0, 1, 2, 3]] * 2

    @pytest.mark.parametrize("streams", [1, 3])
    @pytest.mark.parametrize(
        ("block", "buffer", "micro_batch"),
        [(1, 20, 3), (16, 16, 5), (7, 15, 2), (16, 320, 40), (64, 200, 150), (100, 2000, 8)],
    )
    def test_the_only_reader_of_streams_reads_each_block_of_them_once(
        self, block: int, buffer: int, micro_batch: int, streams: int
    ) -> None:
        """In both epochs, though it drops what it has of blocks that other streams use."""
        shuffle = ShuffleSpec(block=block, buffer=buffer, streams=streams)
        steps = StepPlan(3 * 7 * 150 + 11, 3 * micro_batch, 3, 2, shuffle)
        kept, read, used = KeptBlocks(steps.num_samples, block, 2 * streams * shuffle.kept_samples), list[int](), set()

        def read_blocks(numbers: Sequence[int]) -> list[bytes | BadSample]:
            read.extend({number // block for number in numbers})
            return [b""] * len(numbers)

        for batch, shard in itertools.product(range(steps.total_steps), range(2)):
            numbers = steps.samples(SEED, batch, shard).tolist()
            kept.fetch(numbers, read_blocks)
            stream = steps.stream(batch % steps.steps_per_epoch, shard)[0].number
            used |= {(steps.epoch_of(batch), stream, number // block) for number in numbers}

        assert len(read) <= len(used)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What the processes of all workers did in an epoch."""

    read: int
    """Bytes."""
    used: int
    """Bytes of the samples."""
    held: int
    """The most bytes that a process held."""
    readers: int
    """The most processes that read a stream."""


def read_epoch(dataset: IndexedImages, job: JobSpec, steps: StepPlan, blocks: Sequence[range]) -> Epoch:
    """Reads as torch hands micro-batches to loader processes, each of which has a copy of the dataset."""
    shuffle, used, bytes_read, held = job.data.shuffle, 0, list[int](), list[int]()
    assert shuffle is not None
    readers: dict[tuple[int, int], set[int]] = {}

    def watch(process: IndexedImages) -> None:
        kept, read = process._blocks, process.read
        assert kept is not None

        def watched(index: Index, numbers: Sequence[int]) -> list[bytes | BadSample]:
            found = read(index, numbers)
            bytes_read.append(sum(map(len, found)))
            held.append(bytes_read[-1] + sum(len(each) for own in kept._kept.values() for each in own.values()))
            return found

        process.read = watched

    for block in blocks:
        own_streams = stream_readers(len(block), shuffle.streams, job.data.loaders).streams
        in_blocks = dataset.in_blocks(shuffle.block, shuffle.kept_samples * own_streams)
        processes = [copy.deepcopy(in_blocks) for _ in range(max(1, job.data.loaders))]
        for process in processes:
            watch(process)
        for turn, (step, shard) in enumerate(itertools.product(range(steps.steps_per_epoch), block)):
            contents = processes[turn % len(processes)].fetch(steps.samples(SEED, step, shard).tolist())
            used += sum(map(len, contents))
            readers.setdefault((shard, step % shuffle.streams), set()).add(turn % len(processes))
    return Epoch(sum(bytes_read), used, max(held), max(map(len, readers.values())))


def in_one_object(folder: Path, num_samples: int) -> IndexedImages:
    """Samples of 10 bytes that take no time to read."""
    builder = IndexBuilder(Source("tar", "/data"))
    builder.classes = ["a"]
    builder.add_container(
        "0.tar", 10 * num_samples, "", offsets=10 * np.arange(num_samples), lengths=np.full(num_samples, 10),
        labels=[0] * num_samples, keys=[""] * num_samples,
    )  # fmt: skip
    return IndexedImages(builder.write(folder / "index.arrow"), lambda _, numbers: [b"0123456789"] * len(numbers))


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
        self, shards: IndexedImages, local_reads: list[int], shuffle: ShuffleSpec, loaders: int, workers: int
    ) -> None:
        job, steps = described(shuffle, loaders, workers)
        planned = plan_shuffle(shards, steps, job)
        assert planned is not None
        assert planned.kept_bytes is not None
        local_reads.clear()
        epoch = read_epoch(shards, job, steps, shard_blocks(steps.shards, [workers]))

        assert planned.own.requests == pytest.approx(len(local_reads) / SAMPLES, rel=0.1)
        assert planned.own.read == pytest.approx(sum(local_reads) / epoch.used, rel=0.1)
        assert 0.4 * planned.kept_bytes < epoch.held < 1.02 * planned.kept_bytes  # images differ in size
        assert (planned.row_group_bytes, planned.processes) == (0, max(1, loaders))

    @pytest.mark.parametrize(
        ("shuffle", "loaders", "workers", "shards", "micro_batch"),
        [
            (ShuffleSpec(block=16, buffer=128), 0, 1, 2, 8),
            # Several readers, and workers with different numbers of shards.
            (ShuffleSpec(block=16, buffer=128), 2, 3, 4, 8),
            (ShuffleSpec(block=16, buffer=128), 3, 3, 8, 8),
            (ShuffleSpec(block=16, buffer=64, streams=2), 4, 3, 8, 8),
            (ShuffleSpec(block=16, buffer=128), 2, 4, 8, 8),
            # Micro-batches of several rounds, and rounds of several micro-batches.
            (ShuffleSpec(block=8, buffer=64), 8, 1, 1, 32),
            (ShuffleSpec(block=4, buffer=64), 8, 1, 1, 4),
        ],
    )
    def test_an_epoch_of_processes_that_share_blocks_takes_it_too(
        self, tmp_path: Path, shuffle: ShuffleSpec, loaders: int, workers: int, shards: int, micro_batch: int
    ) -> None:
        samples = in_one_object(tmp_path, 6000)
        job, _ = described(shuffle, loaders, workers, shards=shards, global_batch=shards * micro_batch)
        steps = StepPlan(len(samples), job.train.global_batch, shards, 1, shuffle)
        planned = plan_shuffle(samples, steps, job)
        assert planned is not None
        assert planned.kept_bytes is not None
        epoch = read_epoch(samples, job, steps, shard_blocks(shards, [workers]))

        assert planned.own.read == pytest.approx(epoch.read / epoch.used, rel=0.1)
        assert planned.readers == epoch.readers
        assert 0.5 * planned.kept_bytes < epoch.held <= planned.kept_bytes

    def test_a_full_shuffle_takes_a_request_for_nearly_each_sample(
        self, shards: IndexedImages, local_reads: list[int]
    ) -> None:
        job, steps = described(ShuffleSpec(block=12, buffer=48))
        planned, full = plan_shuffle(shards, steps, job), replace(steps, shuffle=None)
        assert planned is not None
        local_reads.clear()
        for step in range(steps.steps_per_epoch):
            for shard in range(steps.shards):
                shards.fetch(full.samples(SEED, step, shard).tolist())

        assert planned.full.requests == pytest.approx(len(local_reads) / SAMPLES, rel=0.01)
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

    @pytest.mark.parametrize("loaders", [0, 2, 3, 4, 6])
    @pytest.mark.parametrize("num", [3, 5, 7, (1, 4), (3, 7)])
    def test_the_streams_that_it_names_are_enough_on_any_hosts(self, loaders: int, num: int | tuple[int, int]) -> None:
        """Whichever number of workers there is, and so whichever number of shards a worker has."""
        for shards in (7, 8, 12):
            job, steps = described(
                ShuffleSpec(block=2, buffer=16), loaders, num, shards=shards, global_batch=2 * shards
            )
            planned = plan_shuffle(object(), steps, job)
            assert planned is not None
            lengths = {
                len(block)
                for workers in range(job.workers.least, job.workers.most + 1)
                for first in range(1, workers + 1)
                for block in shard_blocks(shards, [first, workers - first] if first < workers else [workers])
            }
            of = {
                streams: max(stream_readers(length, streams, loaders).readers for length in lengths)
                for streams in range(1, planned.streams + 1)
            }
            assert planned.readers >= of[1]
            assert of[planned.streams] == 1

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
        assert planned.kept_bytes is None

    def test_a_sample_that_replaces_a_bad_one_is_read_alone(
        self, shards: IndexedImages, local_reads: list[int]
    ) -> None:
        """So its block stays whole until its own turn comes, and those that are kept stay."""
        in_blocks, content = shards.in_blocks(12, 4), shards.fetch(range(SAMPLES))
        in_blocks.fetch([100])
        local_reads.clear()

        assert in_blocks.fetch_alone(101) == content[101]
        assert local_reads == [len(content[101])]
        assert in_blocks.fetch([101, 102]) == content[101:103]
        assert len(local_reads) == 1

    def test_while_blocks_are_read_no_sample_is_in_memory_twice(self, tmp_path: Path) -> None:
        """So what the plan tells is enough for the first read, which fills the whole buffer."""
        length, block, blocks = 20_000, 8, 64
        (tmp_path / "all.bin").write_bytes(bytes(blocks * (block + 1) * length))  # each block before a gap
        builder = IndexBuilder(Source("tar", str(tmp_path)))
        builder.classes = ["a"]
        offsets = [(number + number // block) * length for number in range(blocks * block)]
        builder.add_container(
            "all.bin", blocks * (block + 1) * length, "", offsets=offsets, lengths=[length] * len(offsets),
            labels=[0] * len(offsets), keys=list(map(str, offsets)),
        )  # fmt: skip
        images = IndexedImages(builder.write(tmp_path / "index.arrow"), read_ranges).in_blocks(block, len(offsets))
        images.fetch([0])
        tracemalloc.start()
        try:
            images.fetch(range(block, len(offsets), block))
            assert tracemalloc.get_traced_memory()[1] < 1.25 * length * len(offsets)
        finally:
            tracemalloc.stop()

    def test_there_is_none_without_the_key(self, shards: IndexedImages) -> None:
        job, steps = described(None)
        assert plan_shuffle(shards, steps, job) is None

    def test_of_parquet_whole_row_groups_are_read(self, tmp_path: Path) -> None:
        builder = IndexBuilder(Source("parquet", "/data"))
        builder.classes = ["a"]
        for name, rows in (("0.parquet", [3, 5]), ("1.parquet", [4])):
            builder.add_container(
                name, 10 * sum(rows), "",
                offsets=np.repeat(np.arange(len(rows)), rows), lengths=np.concatenate([*map(np.arange, rows)]),
                labels=[0] * sum(rows), keys=list(map(str, range(sum(rows)))),
            )  # fmt: skip
        images = IndexedImages(builder.write(tmp_path / "index.arrow"), read_ranges, np.array([0, 1, 2, 4, 5, 9, 10]))

        assert images.read_cost([[0, 1, 2]]) == ReadCost(requests=1, read=30, used=30)
        assert images.read_cost([[2, 3]]) == ReadCost(requests=2, read=80, used=20)
        assert images.read_cost([[6, 3, 4], [0]]) == ReadCost(requests=3, read=120, used=40)
        assert images.row_group_bytes == 2 * 120  # those that are kept, and those that are being read

    def test_the_price_of_many_micro_batches_of_parquet_takes_no_time_for_each_row(self, tmp_path: Path) -> None:
        """Each micro-batch touches all files."""
        builder, rows, files = IndexBuilder(Source("parquet", "/data")), 20_000, 5
        builder.classes = ["a"]
        for name in range(files):
            builder.add_container(
                f"{name}.parquet", rows, "version", offsets=np.arange(rows) // 100, lengths=np.arange(rows) % 100,
                labels=[0] * rows, keys=[""] * rows,
            )  # fmt: skip
        images = IndexedImages(builder.write(tmp_path / "index.arrow"), read_ranges)
        batches = np.arange(rows * files).reshape(files, rows)[:, :400].T.tolist()
        looked_up = list[int]()

        class Counted(np.ndarray):
            def __getitem__(self, key: Any) -> Any:
                found = super().__getitem__(key)
                looked_up.append(np.size(found))
                return found

        whole = images.index.offsets.view(Counted)
        with mock.patch.object(Index, "offsets", whole):
            cost = images.read_cost(batches)

        assert cost == ReadCost(requests=5 * 400, read=5 * 400 * 100, used=5 * 400)
        assert sum(looked_up) < 2 * len(whole)


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
