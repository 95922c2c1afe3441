"""The signals that ask a run to stop, from before its cluster starts until nothing of it is left to do."""

import contextlib
import signal
from collections.abc import Collection, Iterator

from cluster.host.batch_job import ENDING_EARLY, interruption
from cluster.host.signals import ABANDONING, ASKING, stop_signals


class StopSignals:
    """Counts signals, on which the driver acts between two steps of its loop.

    Thread: the main thread, as for every change of a signal handler.
    """

    def __init__(self) -> None:
        """Only assigns."""
        self.first: signal.Signals | None = None
        """The signal that came first; None: none has come."""
        self.is_on_purpose = False
        """Whether one has come that says more than that a batch job has to end early: the run should not go on."""
        self.interrupting: Collection[int] = ()
        """The signals that raise ``KeyboardInterrupt`` too, while the driver's loop does not run.

        Once one has, only those that are sent on purpose raise again: a closed terminal sends more than one SIGHUP, and
        the second must not interrupt the clean-up.
        """
        self.raises_if_abandoned = False
        """Whether a second Ctrl-C or SIGTERM raises ``KeyboardInterrupt``, for while nobody reads ``is_abandoned``."""
        self.has_begun = False
        """Whether the run is driven: how it ends then decides the exit code, and no signal that comes after that."""
        self._num_abandoning = 0

    @property
    def is_abandoned(self) -> bool:
        """Whether a second Ctrl-C or SIGTERM has come: somebody does not want to wait for the last save."""
        return self._num_abandoning > 1

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Count the signals that come inside the block.

        If one has come, or the run has begun, those that only ask are ignored afterwards.
        """
        before = {number: signal.signal(number, self.count) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                is_late = (self.has_begun or self.first is not None) and number in ASKING
                signal.signal(number, signal.SIG_IGN if is_late else handler)

    def count(self, number: int, _: object = None) -> None:
        """Count a signal; a handler of signals."""
        self.first = self.first or signal.Signals(number)
        self.is_on_purpose |= number != ENDING_EARLY
        self._num_abandoning += number in ABANDONING
        if number in self.interrupting:
            self.interrupting = [each for each in self.interrupting if each in ABANDONING]
            raise interruption(number)
        if self.raises_if_abandoned and self.is_abandoned and number in ABANDONING:
            raise KeyboardInterrupt
