"""From what workers say of their ends to what is to be done: whose fault it was, and whether to try again.

One failure has many messages: workers that lose a peer fail too, and those that wait for a hung one make no progress
either. Here they become one verdict. Nothing here starts, stops or writes anything; the time comes in as a number.
"""

import signal
from dataclasses import dataclass
from typing import Any

from cluster.errors import (
    CheckpointError,
    ClusterError,
    DescriptionError,
    LauncherError,
    StorageError,
    TrainingError,
)
from cluster.link import DOING

Message = dict[str, Any]

_CAUSE_WAIT_S = 5.0
"""How long the last words of workers are waited for once one has failed: the cause, if it lost a peer, or a save."""
_CAUSES: dict[str, type[LauncherError]] = {
    error.__name__: error for error in (TrainingError, DescriptionError, CheckpointError, StorageError, ClusterError)
}


@dataclass(frozen=True, slots=True)
class TryAgain:
    """All training processes are to be started anew, because of one worker.

    Attributes:
        rank: The worker.
        reason: What happened to it, for people.
        hang: What is known of where it stands, if it hung.
        needs_agents: Its agent is gone, and with it the others' use.
    """

    rank: int
    reason: str
    hang: Message | None = None
    needs_agents: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The run is to end with this error; ``rank``: the worker whose log says more than the error does."""

    error: LauncherError
    rank: int | None = None


class Failures:
    """What the workers of the present attempt have said, and the failures of all attempts before it."""

    def __init__(self, num_workers: int, max_failures: int) -> None:
        self._num_workers = num_workers
        self._max_failures = max_failures
        self._count = 0
        self._places: set[str] = set()
        self.attempt_started()

    @property
    def are_too_many(self) -> bool:
        """More was to be tried again than the description allows."""
        return self._count > self._max_failures

    def attempt_started(self) -> None:
        """What was said before is of processes that are gone."""
        self._fatal: Message | None = None
        self._lost_peer: Message | None = None
        self._exits: list[Message] = []
        self._lost: dict[int, str] = {}
        self._hung: dict[int, Message] = {}
        self._first_at: float | None = None

    def failed(self, message: Message, now: float) -> None:
        """A worker says why it ends. Of a lost peer that is a consequence; the cause is on its way."""
        self._first_at = now if self._first_at is None else self._first_at
        if _CAUSES[message["cause"]] is ClusterError:
            self._lost_peer = self._lost_peer or message
        elif self._fatal is None:
            self._fatal, self._first_at = message, now

    def exited(self, message: Message) -> None:
        """An agent says how its training process ended."""
        self._exits.append(message)

    def hung(self, message: Message) -> None:
        """A worker makes no progress; nor do the others, which wait for it."""
        self._hung[message["rank"]] = message

    def lost(self, message: Message) -> None:
        """Ray has lost agents, and their training processes with them."""
        self._lost = message["lost"]

    def goes_on(self, message: Message) -> None:
        """A worker that made no progress does again."""
        self._hung.pop(message["rank"], None)

    def verdict(self, now: float) -> TryAgain | GiveUp | None:
        """What is to be done by now; None while nothing is, or last words are waited for."""
        verdict = self._verdict(now)
        if isinstance(verdict, TryAgain):
            self._count += 1
        return verdict

    def _verdict(self, now: float) -> TryAgain | GiveUp | None:
        has_waited = self._first_at is not None and now - self._first_at > _CAUSE_WAIT_S
        if self._fatal is not None:
            all_ended = len({message["rank"] for message in self._exits}) == self._num_workers
            return self._of_exception(self._fatal) if all_ended or has_waited else None
        if self._lost:
            rank, reason = min(self._lost.items())
            return TryAgain(rank, reason, needs_agents=True)
        for message in self._exits:
            code = message["exit_code"]
            if code < 0:
                return TryAgain(message["rank"], f"killed by {signal.Signals(-code).name}")
            if code > 0 and self._lost_peer is None:
                return GiveUp(TrainingError(f"ended with exit code {code}", message["log_tail"]), message["rank"])
        if any(message["is_silent"] for message in self._hung.values()) or len(self._hung) == self._num_workers:
            return self._of_hang()  # one that has not said so works, and the others wait for it
        if self._lost_peer is not None and has_waited:
            return TryAgain(self._lost_peer["rank"], f"no worker says more than: {self._lost_peer['message']}")
        return None

    def _of_exception(self, message: Message) -> TryAgain | GiveUp:
        """An exception of the training code may be bad luck; a second one at the same step and line is the code's."""
        place = message["place"]
        if place and place not in self._places and self._count < self._max_failures:
            self._places.add(place)
            return TryAgain(message["rank"], message["message"])
        cause = _CAUSES[message["cause"]]
        if cause is TrainingError:
            return GiveUp(TrainingError(message["message"], message["traceback"]))
        return GiveUp(cause(message["message"]))

    def _of_hang(self) -> TryAgain:
        """The worker that the others wait for: one that is silent, or else one that is behind them."""
        hung = sorted(self._hung.values(), key=lambda message: (message["step"], DOING.index(message["doing"])))
        silent = [message for message in hung if message["is_silent"]]
        found = (silent or hung)[0]
        place = _innermost(found["stack"])
        reason = f"no progress for {found['for_s']:.0f} s in {found['doing']}" + (f", {place}" if place else "")
        if not silent and len(hung) > 1 and len({(message["step"], message["doing"]) for message in hung}) == 1:
            reason += ", and so for all: what they exchange is stuck"
        hang = {name: found[name] for name in ("rank", "step", "doing", "for_s", "stack")}
        return TryAgain(found["rank"], reason, hang | {"waiting": sorted(self._hung.keys() - {found["rank"]})})


def _innermost(stack: str) -> str:
    """The innermost call of a stack as ``faulthandler`` prints it, or what else is known."""
    lines = [line.strip() for line in stack.splitlines()]
    return next((line for line in lines if line.startswith(("File ", "State"))), "")
