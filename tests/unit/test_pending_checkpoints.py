"""When shares make a checkpoint, and who is named when none comes."""

import pytest

from cluster.process.messages import ShareWritten
from cluster.run.manifest import Part, PartKey, Share
from launcher.driver.pending_checkpoints import Overdue, PendingCheckpoints

INTERVAL = 10


@pytest.fixture
def saves() -> PendingCheckpoints:
    """Those of two workers that have trained for a while from step 0 on, and have made no checkpoint."""
    saves = PendingCheckpoints(INTERVAL)
    saves.attempt_started(2)
    saves.training_began(100.0)
    assert saves.overdue(100.0, step=0, saved_step=0) is None
    return saves


def share(rank: int, step: int, *numbers: int) -> tuple[int, ShareWritten]:
    """A worker, and what it tells when it has written some of the two parts of a checkpoint."""
    parts: dict[PartKey, Part] = {("model", number): Part.of(f"step-{step:08d}/model", b"") for number in numbers}
    content = Share(
        step=step, num_parts={"model": 2}, parts=parts, state_files=["model"], metrics={}, versions={}, created=""
    )
    return rank, ShareWritten(share=content, seconds=1.0, best_step=None, best_metric=None, spent={})


def test_all_shares_make_a_checkpoint(saves: PendingCheckpoints) -> None:
    first, second = share(0, 10, 0), share(1, 10, 1)

    assert saves.share(*first) is None
    whole = saves.share(*second)
    assert whole is not None
    manifest, shares = whole
    assert (manifest.step, shares) == (10, dict([first, second]))


@pytest.mark.parametrize(
    ("seconds", "step", "is_overdue"), [(30.0, 30, True), (29.0, 30, False), (30.0, 29, False)], ids=str
)
def test_three_intervals_are_too_many_if_they_are_more_than_a_moment(
    saves: PendingCheckpoints, seconds: float, step: int, is_overdue: bool
) -> None:
    assert (saves.overdue(100.0 + seconds, step=step, saved_step=0) is not None) is is_overdue


def test_the_time_before_training_does_not_count(saves: PendingCheckpoints) -> None:
    saves.training_began(1000.0)

    assert saves.overdue(1001.0, step=30, saved_step=0) is None


def test_it_is_told_once_until_a_checkpoint_comes(saves: PendingCheckpoints) -> None:
    told = [
        saves.overdue(100.0 + now, step=now, saved_step=saved_step) is not None
        for now, saved_step in ((30, 0), (40, 0), (50, 20), (60, 20), (80, 20), (90, 20))
    ]

    assert told == [True, False, False, False, True, False]


def test_it_is_not_told_again_because_workers_start_again(saves: PendingCheckpoints) -> None:
    assert saves.overdue(200.0, step=30, saved_step=0) is not None
    saves.attempt_started(2)
    saves.training_began(300.0)

    assert saves.overdue(400.0, step=30, saved_step=0) is None


def test_the_workers_are_named_whose_shares_are_missing(saves: PendingCheckpoints) -> None:
    saves.left_out(0, "was slow before")
    saves.share(*share(1, 20, 1))

    assert saves.overdue(200.0, step=30, saved_step=0) == Overdue((0,), "the share of step 20 is not written")


def test_without_any_share_it_is_the_worker_for_which_others_left_one_out(saves: PendingCheckpoints) -> None:
    saves.left_out(1, "too slow")

    assert saves.overdue(200.0, step=30, saved_step=0) == Overdue((1,), "too slow")


def test_what_a_worker_said_before_a_checkpoint_came_says_nothing_of_the_next(saves: PendingCheckpoints) -> None:
    saves.left_out(1, "too slow")
    assert saves.overdue(110.0, step=12, saved_step=10) is None

    assert saves.overdue(200.0, step=40, saved_step=10) == Overdue((), "no worker has written its share of one yet")


def test_no_worker_is_named_for_what_the_driver_has_not_written(saves: PendingCheckpoints) -> None:
    saves.share(*share(0, 10, 0, 1))
    saves.share(*share(1, 10))  # of a worker without parts, when the checkpoint is whole already

    overdue = saves.overdue(200.0, step=30, saved_step=0)
    assert overdue == Overdue((), "the store has not taken the manifest of step 10")
    assert saves.overdue(200.0, step=40, saved_step=10) is None
    assert saves.overdue(300.0, step=40, saved_step=10) == Overdue((), "no worker has written its share of one yet")


def test_shares_of_processes_that_are_gone_count_no_more(saves: PendingCheckpoints) -> None:
    """They may have been whole: the next attempt falls back, and saves the same step again."""
    assert saves.share(*share(0, 20, 0, 1)) is not None
    saves.attempt_started(2)

    assert saves.share(*share(0, 20, 0)) is None
    assert saves.share(*share(1, 20, 1)) is not None
