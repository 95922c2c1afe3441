"""What the workers of a run are like, and what to do about nodes whose workers do not fit the others."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.process.messages import EnvironmentsCompared
from jobs.environment import changes, unlike
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.verdicts import Failure


class Environments:
    """The environments of the workers, attempt by attempt."""

    def __init__(
        self,
        run_url: str,
        membership: Membership,
        run_log: RunLog,
        first_workers: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        """Only assigns. ``first_workers``: of those that the run began with; None: nobody has told of them yet."""
        self._run_url = run_url
        self._membership = membership
        self._run_log = run_log
        self._first_workers = first_workers
        self._last_workers: Sequence[Mapping[str, Any]] = ()
        """Of the workers that did a step last."""
        self._workers: Sequence[Mapping[str, Any]] = ()
        """Of the present attempt's workers."""
        self._refused: EnvironmentsCompared | None = None
        """What was told of the workers of the present attempt, if they differ so that they do not train."""
        self._warned_of: set[str] = set()
        """The differences between workers that a person knows of."""

    def attempt_ended(self) -> None:
        """What was told was of workers that are gone."""
        self._refused = None

    def compared(self, compared: EnvironmentsCompared) -> None:
        """Records what the bits of this attempt depend on, and warns, once, of differences that may change them."""
        if compared.is_refused:  # the workers end, and say why
            self._refused = compared
            return
        self._workers = compared.workers
        self._run_log.event("environment", workers=compared.workers)
        if self._first_workers is None:
            self._first_workers = compared.workers
        news = {
            "workers differ": compared.differences,
            "the run began on other workers": changes(self._first_workers, compared.workers),
        }
        for what, how in news.items():
            if how and how not in self._warned_of:
                self._warned_of.add(how)
                self._run_log.display.warn(f"{what}: {how}; the bits may differ from an undisturbed run's")

    def step_done(self) -> None:
        """The workers that are there have done a step: they are what others have to be like."""
        if self._workers is not self._last_workers and changes(self._last_workers, self._workers):
            self._membership.forget()
        self._membership.trains()
        self._last_workers = self._workers

    def leave_out_unfit(self, failure: Failure) -> bool:
        """Does without the nodes that have joined a run that trained without them, and on which it does not train.

        Returns:
            Whether there are any. None are left out if others are in the way too, or if nobody is left without them:
            then the run is to end, and to say why.
        """
        unfit = self._unfit_newcomers(failure)
        if not unfit:
            return False
        run_log, why = self._run_log, failure.message
        if self._refused is not None:
            why = f"workers differ: {self._refused.differences}"
        step, named = run_log.state.step, self._membership.leave_out(unfit, why)
        run_log.event("nodes_left_out", step=step, nodes=sorted(unfit), reason=why)
        run_log.display.warn(
            f"step {step}: going on without {named}, which cannot be used until Ray is started there anew: {why}"
        )
        if self._membership.takes_no_others:
            run_log.display.warn(
                f"too many nodes have not fitted: no others are taken until launcher resume {self._run_url}"
            )
        return True

    def _unfit_newcomers(self, failure: Failure) -> frozenset[str]:
        """The ids of these nodes."""
        membership = self._membership
        newcomers = membership.newcomers()
        if failure.cause != "environment":
            return frozenset()
        if self._refused is not None:
            groups = self._refused.workers
            odd = unlike(self._last_workers, groups)
            if odd or len(groups) == 1:  # all are alike, and have other data than was planned with
                unfit = membership.nodes_of(rank for group in odd or groups for rank in group["ranks"])
            else:  # they differ in what those before did not have, such as a module that prepares data
                unfit = newcomers
        elif failure.rank is not None:
            unfit = membership.nodes_of(failure.ranks or [failure.rank])
        else:  # Ray does not say which it was
            unfit = newcomers if len(newcomers) == 1 else frozenset()
        return unfit if unfit <= newcomers and membership.goes_on_without(unfit) else frozenset()
