"""Samples by their keys: read together, the same bits as one by one, and what comes in place of a bad one."""

import itertools
import random
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.errors import StorageError, TrainingError
from cluster.process.data_messages import SampleSkipped
from jobs.data import BadSample
from jobs.data.loader import KeyedDataset, LoadedBatch, single_samples, training_batches, validation_batches
from jobs.sampling import StepPlan
from launcher.driver.skipped_samples import SkippedSamples

SAMPLES, SEED = 20, 7
PLAN = StepPlan(num_samples=SAMPLES, global_batch=6, shards=2, epochs=2)
CPU = torch.device("cpu")


class Noise:
    """A sample is its number and three draws."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        drawn = torch.tensor([number, random.random(), np.random.random(), torch.rand(()).item()])
        if number in self.bad:
            raise BadSample(f"data/{number}.jpg:\ncannot be decoded")
        return drawn, number


class Fetched(Noise):
    """The same, from samples that are read together."""

    def __init__(self, *bad: int, gone: Sequence[int] = (), length: int = SAMPLES) -> None:
        super().__init__(*bad)
        self.gone, self.length = gone, length
        self.reads: list[list[int]] = []

    def __len__(self) -> int:
        return self.length

    def fetch(self, numbers: Sequence[int]) -> list[bytes | BadSample]:
        self.reads.append(list(numbers))
        random.random()  # as a retry might
        return [
            BadSample(f"data/{number}.jpg: is gone") if number in self.gone else str(number).encode()
            for number in numbers
        ]

    def fetch_alone(self, number: int) -> bytes | BadSample:
        (content,) = self.fetch([number])
        return content

    def decoded(self, number: int, content: bytes | BadSample) -> tuple[Tensor, int]:
        if isinstance(content, BadSample):
            raise content
        assert content == str(number).encode()
        return super().__getitem__(number)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        raise AssertionError("samples are read together")


class Away(Fetched):
    def fetch(self, numbers: Sequence[int]) -> list[bytes | BadSample]:
        raise StorageError(f"s3://bucket/data: cannot read {numbers[0]}.jpg: reset, tried for 100 s; check the network")


def trained(dataset: Any, **options: Any) -> list[LoadedBatch]:
    return list(
        training_batches(
            dataset, steps=PLAN, seed=SEED, block=range(2), start=0, end=6, loaders=0, device=CPU, **options
        )
    )  # fmt: skip


def validated(
    dataset: Any, rank: int = 0, world_size: int = 1, most: int | None = None, **options: Any
) -> list[LoadedBatch]:
    batches = validation_batches(
        dataset, batch_size=3, seed=SEED, rank=rank, world_size=world_size, loaders=0, device=CPU, **options
    )
    return list(itertools.islice(batches, most))


def bits(batches: Sequence[LoadedBatch]) -> list[list[Any]]:
    return [batch.inputs.tolist() for batch in batches]


def test_samples_that_are_read_together_have_the_same_bits() -> None:
    fetched = Fetched()
    assert bits(trained(fetched)) == bits(trained(Noise()))
    order = [PLAN.samples(SEED, batch, shard).tolist() for batch in range(6) for shard in range(2)]
    assert fetched.reads == order  # each micro-batch in one read, in order
    assert bits(validated(Fetched())) == bits(validated(Noise()))
    assert KeyedDataset(Fetched(), SEED)[1, 4][0].tolist() == KeyedDataset(Noise(), SEED)[1, 4][0].tolist()


@pytest.mark.parametrize("dataset", [Noise(3, 5), Fetched(3, gone=(5,))], ids=["one by one", "together"])
def test_a_bad_sample_is_replaced_by_one_that_its_key_chooses(dataset: Noise) -> None:
    whole, skipping = trained(Noise()), trained(dataset, on_bad_sample="skip")
    skipped = [each for batch in skipping for each in batch.skipped]
    assert {(each.split, each.number) for each in skipped} == {("train", 3), ("train", 5)}
    assert {each.epoch for each in skipped} == {0, 1}
    assert all("\n" not in each.reason and each.reason.startswith("data/") for each in skipped)

    changed = {0: set[tuple[int, int]](), 1: set[tuple[int, int]]()}
    for number, (before, after) in enumerate(zip(whole, skipping)):
        for one, other in zip(before.inputs.tolist(), after.inputs.tolist()):
            if one[0] in (3, 5):
                assert other[0] not in (3, 5)
                assert one[1:] == other[1:]  # the draws of the key of the bad one
                changed[number // 6].add((int(one[0]), int(other[0])))
            else:
                assert one == other
        assert after.inputs.shape == before.inputs.shape
        assert after.target.tolist() == [int(each[0]) for each in after.inputs.tolist()]
    assert changed[0]
    assert changed[0] != changed[1]  # another one in another epoch


def test_what_replaces_a_bad_sample_may_be_bad_too() -> None:
    keyed = KeyedDataset(Noise(), SEED)
    first = keyed.replacement((0, 3), 0)
    (single,) = single_samples(
        Fetched(3, first), [3], split="train", seed=SEED, loaders=0, on_bad_sample="skip"
    )  # fmt: skip
    assert single.number == keyed.replacement((0, 3), 1)
    assert [each.number for each in single.skipped] == [3, first]


def test_targets_are_weighed_as_they_are_after_the_replacement() -> None:
    batches = trained(Noise(3, 5), on_bad_sample="skip", weigh=lambda target: float(target.sum()))
    assert [batch.weight for batch in batches] == [float(batch.target.sum()) for batch in batches]


def test_no_sample_is_tried_twice_in_place_of_a_bad_one() -> None:
    keyed = KeyedDataset(Noise(), SEED)
    orders = [[keyed.replacement(key, tried) for tried in range(SAMPLES - 1)] for key in ((0, 3), (1, 3), (0, 0))]
    assert [sorted(order) for order in orders] == [
        [number for number in range(SAMPLES) if number != bad] for bad in (3, 3, 0)
    ]
    assert orders[0] != orders[1]
    assert KeyedDataset(Noise(), SEED + 1).replacement((0, 3), 0) != orders[0][0]


@pytest.mark.parametrize(
    ("samples", "tried"), [(1, "there is no other one"), (4, "so are 3 others, tried in"), (200, "so are 100 others, ")]
)
def test_where_nothing_is_good_the_run_ends(samples: int, tried: str) -> None:
    bad = Fetched(gone=range(samples), length=samples)
    with pytest.raises(
        TrainingError, match=rf"^data.train: sample \d+ is bad, and {tried}.*; the last: data/\d+.jpg: is gone; repair"
    ):
        next(
            training_batches(
                bad, steps=StepPlan(samples, 1, 1, 1), seed=SEED, block=range(1), start=0, end=1, loaders=0, device=CPU,
                on_bad_sample="skip",
            )
        )  # fmt: skip
    read = [number for numbers in bad.reads for number in numbers]
    assert len(set(read)) == len(read) == min(samples, 101)


def test_the_keys_of_a_validation_take_no_memory() -> None:
    class Many(Noise):
        def __len__(self) -> int:
            return 500_000

    tracemalloc.start()
    try:
        batches = validated(Many(), most=2)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert [batch.target.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]


def test_a_validation_leaves_bad_samples_out_of_batches_that_stay_the_same() -> None:
    whole, skipping = validated(Noise()), validated(Fetched(1, 9, 10, 11), on_bad_sample="skip")
    assert [batch.is_empty for batch in skipping] == [number == 3 for number in range(7)]
    for before, after in zip(whole, skipping):
        if not after.is_empty:
            assert after.inputs.tolist() == [each for each in before.inputs.tolist() if each[0] != 1]
    assert [each.number for batch in skipping for each in batch.skipped] == [1, 9, 10, 11]
    halves = [validated(Noise(1, 9, 10, 11), rank, 2, on_bad_sample="skip") for rank in range(2)]
    assert [len(half) for half in halves] == [4, 3]
    assert bits([batch for batch in halves[0] if not batch.is_empty]) == bits(skipping[::2])


@pytest.mark.parametrize("dataset", [Noise(3), Fetched(gone=[3])], ids=["one by one", "together"])
def test_without_skip_the_error_names_it_in_one_line(dataset: Noise) -> None:
    with pytest.raises(BadSample, match=r"^data.val: sample 3: data/3.jpg: .*; or data.on_bad_sample: skip leaves it"):
        validated(dataset)
    with pytest.raises(BadSample, match=r"^data.train: sample 3: data/3.jpg: [^\n]*skip replaces it by another one$"):
        trained(dataset)


def test_a_store_that_does_not_answer_is_no_bad_sample() -> None:
    with pytest.raises(StorageError, match="^s3://bucket/data: cannot read"):
        trained(Away(), on_bad_sample="skip")


def test_an_iteration_that_the_data_set_ends_is_an_error() -> None:
    class Ending(Noise):
        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        trained(Ending())


def test_a_sample_that_is_met_again_is_counted_once() -> None:
    first, other = SampleSkipped("train", 0, 3, "data/3.jpg: is gone"), SampleSkipped("val", 0, 3, "val/3.jpg: is gone")
    skipped = SkippedSamples([])
    added = [skipped.add(each) for each in (first, SampleSkipped("train", 1, 3, "data/3.jpg: is gone"), other)]
    assert added == [True, False, True]
    assert [each["reason"] for each in skipped.document()["first"]] == ["data/3.jpg: is gone", "val/3.jpg: is gone"]
    for number in range(200):
        skipped.add(SampleSkipped("train", 0, number, "bad"))
    assert (skipped.document()["count"], len(skipped.document()["first"])) == (201, 100)
