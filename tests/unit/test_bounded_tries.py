"""A batch job is not started again for ever: tries in a row without a newer checkpoint are counted."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.errors import ClusterError, DescriptionError, Requeued, StorageError
from cluster.host.batch_job import EndsEarly
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import Store
from launcher.runs import next_try
from launcher.runs.next_try import bounded_tries
from tests.unit.test_next_try import run, submission_id

__all__ = ["run", "submission_id"]


class TestTriesWithoutProgress:
    @pytest.fixture
    def tried(self, run: RunDirectory, submission_id: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", str(int(time.time()) + 300))
        steps = [0]
        monkeypatch.setattr(next_try, "_newest_step", lambda _: steps[0])

        def tried(why: str | BaseException, *, advances: bool = False) -> None:
            def drive() -> dict[str, Any]:
                steps[0] += advances
                if isinstance(why, BaseException):
                    raise why
                return {"status": "requeued", "requeued": why}

            bounded_tries(run, submission_id, drive)

        return tried

    WHYS = ("on SIGUSR1", "at the time limit of its job", "to go on without node 10.0.0.b")

    @pytest.mark.parametrize("last", WHYS)
    def test_the_third_one_in_a_row_is_the_last(self, tried: Callable[..., None], last: str) -> None:
        for why in self.WHYS[:2]:
            tried(why)
        with pytest.raises(ClusterError) as caught:
            tried(last)
        assert "3 tries of its batch job in a row ended without a newer checkpoint" in str(caught.value)
        assert f"this one {last}; there is none yet; " in str(caught.value)
        assert ("launcher logs" in str(caught.value)) == ("without node" in last)
        tried(last)  # a person has started it again

    @pytest.mark.parametrize("early", [EndsEarly(), Requeued("SIGUSR1 came before training began")], ids=repr)
    def test_one_that_plans_counts_too(self, tried: Callable[..., None], early: BaseException) -> None:
        for _ in range(2):
            with pytest.raises(type(early)):
                tried(early)
        with pytest.raises(ClusterError, match="this one on SIGUSR1 before training began; "):
            tried(early)

    def test_a_newer_checkpoint_clears_the_count(self, tried: Callable[..., None]) -> None:
        for advances in (False, False, True, False, False):
            tried("at the time limit of its job", advances=advances)
        with pytest.raises(ClusterError, match="; the newest is of step 1; "):
            tried("at the time limit of its job")

    def test_so_does_that_of_one_that_was_lost(self, tried: Callable[..., None]) -> None:
        """Such a try, as one whose node fails, counts nothing itself."""
        for _ in range(2):
            tried("at the time limit of its job")
        with pytest.raises(SystemExit):
            tried(SystemExit(137), advances=True)
        for _ in range(2):
            tried("at the time limit of its job")
        with pytest.raises(ClusterError, match="; the newest is of step 1; "):
            tried("at the time limit of its job")

    def test_a_preempted_one_says_nothing_of_the_run(
        self, tried: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for limit in ("", str(int(time.time()) + 3600)):
            monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", limit)
            for _ in range(5):
                tried("on SIGUSR1")
                with pytest.raises(EndsEarly):
                    tried(EndsEarly())
        for _ in range(2):
            tried("to go on without node 10.0.0.b")
        with pytest.raises(ClusterError):
            tried("to go on without node 10.0.0.b")

    @pytest.mark.parametrize(("left_s", "counts"), [(1700, True), (1900, True), (1980, False)])
    def test_one_that_is_told_of_its_time_limit_long_before_is_not_preempted(
        self,
        tried: Callable[..., None],
        run: RunDirectory,
        submission_id: str,
        monkeypatch: pytest.MonkeyPatch,
        left_s: int,
        counts: bool,
    ) -> None:
        """The scheduler may send the signal a minute before it is due."""
        monkeypatch.setenv("LAUNCHER_JOB_NOTICE_S", "1860")
        monkeypatch.setenv("LAUNCHER_JOB_ENDS_AT", str(int(time.time()) + left_s))
        tried("on SIGUSR1")
        assert run.submissions.read_tries(submission_id, 0) == counts

    def test_one_that_ends_in_another_way_is_not_counted(self, run: RunDirectory, submission_id: str) -> None:
        def refuse() -> dict[str, Any]:
            raise DescriptionError("x")

        for _ in range(5):
            bounded_tries(run, submission_id, lambda: {"status": "stopped", "requeued": None})
            with pytest.raises(DescriptionError):
                bounded_tries(run, submission_id, refuse)
        assert run.submissions.read_tries(submission_id, 0) == 0

    @pytest.mark.parametrize("status", ["completed", "requeued"])
    def test_a_store_that_is_away_afterwards_does_not_change_how_one_ends(
        self, run: RunDirectory, submission_id: str, monkeypatch: pytest.MonkeyPatch, status: str
    ) -> None:
        def fail(*_: Any) -> None:
            raise StorageError("the store is away")

        def goes_away() -> None:
            for name in ("exists", "names", "read", "write"):
                monkeypatch.setattr(Store, name, fail)

        def drive() -> dict[str, Any]:
            goes_away()
            return {"status": status, "requeued": "on SIGUSR1"}

        def end_early() -> dict[str, Any]:
            goes_away()
            raise EndsEarly

        with monkeypatch.context() as monkeypatch:
            assert bounded_tries(run, submission_id, drive)["status"] == status
        with monkeypatch.context() as monkeypatch, pytest.raises(EndsEarly):
            bounded_tries(run, submission_id, end_early)
