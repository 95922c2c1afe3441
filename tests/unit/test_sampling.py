"""Which sample belongs to which step and shard."""

from collections import Counter

import numpy as np
import pytest

from jobs.sampling import StepPlan, draw_key, permute


def positions(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.uint64)


class TestPermute:
    @pytest.mark.parametrize("length", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4096, 4097, 65537])
    def test_it_is_a_bijection(self, length: int) -> None:
        for key in range(3):
            assert np.array_equal(np.sort(permute(positions(length), length, key)), np.arange(length))

    def test_it_is_a_bijection_where_no_list_of_samples_would_fit(self) -> None:
        length = 10**9
        # From one end of the range to the other.
        spread = positions(100_000) * np.uint64(9_973)

        values = permute(spread, length, key=5)

        assert len(np.unique(values)) == len(spread)
        assert 0 <= values.min() < length / 1000
        assert length * 0.999 < values.max() < length

    def test_it_is_a_pure_function_of_each_position(self) -> None:
        whole = permute(positions(1000), 1000, key=1)

        assert [int(permute(np.array([position], dtype=np.uint64), 1000, 1)[0]) for position in (0, 17, 999)] == [
            whole[0], whole[17], whole[999],
        ]  # fmt: skip

    def test_it_leaves_its_argument_alone(self) -> None:
        given = positions(10)
        permute(given, 10, key=1)

        assert np.array_equal(given, positions(10))

    def test_every_place_gets_every_sample_equally_often(self) -> None:
        """5 samples over 2,000 keys: a place has each 400 times; six standard deviations are 107."""
        draws = np.stack([permute(positions(5), 5, key) for key in range(2_000)])

        for place in draws.T:
            assert abs(np.bincount(place, minlength=5) - 400).max() < 107

    def test_its_bits_are_fixed(self) -> None:
        """Else a run that is resumed with a newer version would see other samples."""
        assert permute(positions(10), 10, draw_key("order", 0, 0)).tolist() == [8, 3, 1, 5, 6, 2, 0, 4, 9, 7]
        assert draw_key("dropout", 1, 2, 3) == 218467678805035754
        assert StepPlan(100, 8, 2, 2).samples(0, 15, 1).tolist() == [40, 55, 41, 98]


class TestDrawKey:
    def test_it_is_a_63_bit_number_that_every_argument_shows_in(self) -> None:
        keys = [
            draw_key(purpose, seed, step)
            for purpose in ("order", "dropout")
            for seed in range(20)
            for step in range(20)
        ]

        assert len(set(keys)) == len(keys)
        assert min(keys) >= 0
        assert max(keys) < 2**63

    def test_numbers_do_not_run_into_one_another(self) -> None:
        assert draw_key("step", 1, 12) != draw_key("step", 11, 2)


class TestStepPlan:
    def test_an_epoch_holds_every_sample_at_most_once_over_all_shards_and_steps(self) -> None:
        plan = StepPlan(num_samples=53, global_batch=12, shards=4, epochs=3)

        for epoch in range(plan.epochs):
            seen = Counter(epoch_samples(plan, epoch))
            assert len(seen) == plan.steps_per_epoch * plan.global_batch == 48
            assert set(seen.values()) == {1}
            assert set(seen) <= set(range(53))

    def test_when_batches_divide_the_samples_an_epoch_holds_them_all(self) -> None:
        plan = StepPlan(num_samples=48, global_batch=12, shards=3, epochs=1)

        assert sorted(epoch_samples(plan, 0)) == list(range(48))

    def test_epochs_and_seeds_have_orders_of_their_own(self) -> None:
        plan = StepPlan(num_samples=48, global_batch=12, shards=3, epochs=4)
        orders = [tuple(epoch_samples(plan, epoch, seed)) for epoch in range(4) for seed in range(4)]

        assert len(set(orders)) == 16

    def test_the_global_batch_is_the_same_whatever_the_shards(self) -> None:
        batches = [
            np.concatenate([StepPlan(100, 12, shards, 1).samples(0, 3, shard) for shard in range(shards)]).tolist()
            for shards in (1, 2, 3, 4, 6, 12)
        ]

        assert all(batch == batches[0] for batch in batches)

    def test_steps_lie_in_epochs(self) -> None:
        plan = StepPlan(num_samples=50, global_batch=12, shards=4, epochs=3)

        assert (plan.micro_batch, plan.steps_per_epoch, plan.total_steps) == (3, 4, 12)
        assert [plan.epoch_of(batch) for batch in range(plan.total_steps)] == [0] * 4 + [1] * 4 + [2] * 4
        assert [step for step in range(1, 13) if plan.ends_epoch(step)] == [4, 8, 12]

    def test_a_batch_of_all_samples_is_an_epoch(self) -> None:
        plan = StepPlan(num_samples=12, global_batch=12, shards=12, epochs=2)

        assert (plan.micro_batch, plan.steps_per_epoch, plan.total_steps) == (1, 1, 2)
        assert sorted(epoch_samples(plan, 1)) == list(range(12))

    def test_too_few_samples_make_no_step(self) -> None:
        plan = StepPlan(num_samples=11, global_batch=12, shards=4, epochs=2)

        assert (plan.steps_per_epoch, plan.total_steps) == (0, 0)

    def test_any_step_of_a_billion_samples_is_there_at_once(self) -> None:
        """Within the time limit of a test, though an epoch has 15 million steps."""
        plan = StepPlan(num_samples=10**9, global_batch=64, shards=4, epochs=90)
        batches = [plan.samples(0, plan.total_steps - 1 - number * 1_000_003, shard=3) for number in range(100)]

        assert all(len(set(batch.tolist())) == 16 and batch.min() >= 0 and batch.max() < 10**9 for batch in batches)


def epoch_samples(plan: StepPlan, epoch: int, seed: int = 0) -> list[int]:
    return [
        number
        for batch in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        for shard in range(plan.shards)
        for number in plan.samples(seed, batch, shard).tolist()
    ]
