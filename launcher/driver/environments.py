"""Compare the environments of workers, and leave out nodes whose environments do not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.process.messages import EnvironmentsCompared
from jobs.environment import changes, unlike
from launcher.driver.membership import Membership
from launcher.driver.run_log import RunLog
from launcher.driver.verdicts import Failure


class Environments:
    """Tracks the environments of the workers from attempt to attempt."""

    def __init__(
        self,
        run_url: str,
        membership: Membership,
        run_log: RunLog,
        first_workers: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        """Only assigns.

        Args:
            run_url: The run.
            membership: Its workers.
            run_log: Records events and shows warnings.
            first_workers: The environments of the workers that the run began on; None: not known yet.
        """
        self._run_url = run_url
        self._membership = membership
        self._run_log = run_log
        self._first_workers = first_workers
        self._last_workers: Sequence[Mapping[str, Any]] = ()
        """Environments of the workers that completed a step last."""
        self._workers: Sequence[Mapping[str, Any]] = ()
        """Environments of the workers of the current attempt."""
        self._refused: EnvironmentsCompared | None = None
        """The comparison of the current attempt, if its workers refuse to train because they differ."""
        self._warned_of: set[str] = set()
        """Differences that were already shown as a warning."""

    def attempt_ended(self) -> None:
        """Forget the comparison of the attempt that ended."""
        self._refused = None

    def compared(self, compared: EnvironmentsCompared) -> None:
        """Record the environments of this attempt, and warn once of differences that may change the bits."""
        if compared.is_refused:  # the workers end, and report why
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
        """Record that the current workers have completed a step, so that later nodes are compared with them."""
        if self._workers is not self._last_workers and changes(self._last_workers, self._workers):
            self._membership.clear_proven()
        self._membership.mark_proven()
        self._last_workers = self._workers

    def leave_out_unfit(self, failure: Failure) -> bool:
        """Leave out the nodes that joined a training run and caused this failure, because their environment is unfit.

        Returns:
            Whether nodes were left out. None are if nodes that trained before are unfit too, or if no usable node would
            remain: then the failure ends the run.
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
        """Return the ids of the nodes to leave out; empty: none."""
        membership = self._membership
        newcomers = membership.newcomers()
        if failure.cause != "environment":
            return frozenset()
        if self._refused is not None:
            groups = self._refused.workers
            odd = unlike(self._last_workers, groups)
            if odd or len(groups) == 1:  # all are alike, and have other data than the plan
                unfit = membership.nodes_of(rank for group in odd or groups for rank in group["ranks"])
            else:  # they differ in what earlier workers did not report, such as a module that prepares data
                unfit = newcomers
        elif failure.rank is not None:
            unfit = membership.nodes_of(failure.ranks or [failure.rank])
        else:  # Ray does not say which worker it was
            unfit = newcomers if len(newcomers) == 1 else frozenset()
        return unfit if unfit <= newcomers and membership.goes_on_without(unfit) else frozenset()
