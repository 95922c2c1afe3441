"""A failure, and what is to be done about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import Cause, ClusterError, LauncherError

Kind = Literal["machine", "preemption", "code"]
"""Whose doing a failure was; each has a budget of its own."""


_SMALLER = "begin anew with smaller micro-batches: a lower train.global_batch or more train.shards"
_ADVICE: dict[Cause, str] = {
    "out_of_memory": f"give each worker more memory, then resume, or {_SMALLER}",
    "gpu_out_of_memory": f"take GPUs with more memory (workers.accelerator), then resume, or {_SMALLER}",
    "killed": "find out who killed it, then resume",
    "hung": "see where it stood; if it was at work, raise {limit}; then resume",
    "node_lost": "resume on other nodes",
    "fork_server_lost": "find out who killed it, then resume",
    "preempted": "resume on other nodes",
    "exchange_timeout": "see why the workers do not reach each other, or raise workers.timeout_s; then resume",
    "connection_lost": "see why the workers do not reach each other, then resume",
    "not_started": "see /tmp/ray/session_latest/logs there, or raise workers.start_timeout_s; then resume",
    "environment": "give every node the same modules, files and versions, then resume",
}
"""What to do about a failure that is not survived. Other causes say it themselves, or it is for the code's author."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is known of a failure: of the worker that failed first, for the others follow from it.

    Attributes:
        cause: Why it failed.
        message: What happened to it, in a line, for people; not where and when.
        kind: Whose doing it was; None: trying again does not help.
        rank: The worker; None: it is the same for all.
        ranks: All workers of which the same is said, if there are several.
        step: The optimizer steps it had completed; None: it did not say.
        error: What the run ends with, if it does.
        place: The step and line at which the code failed.
        traceback: Of the user's code.
        log_tail: What a process printed last that could not say why it ended.
        hang: What is known of where it stands, if it hung.
        limit: The key of the limit that it exceeded, if it hung.
    """

    cause: Cause
    message: str
    kind: Kind | None = "machine"
    rank: int | None
    step: int | None = None
    error: type[LauncherError] = ClusterError
    ranks: frozenset[int] = frozenset()
    place: str = ""
    traceback: str = ""
    log_tail: str = ""
    hang: Mapping[str, Any] | None = None
    limit: str = "workers.hang_timeout_s"


@dataclass(frozen=True, slots=True)
class TryAgain:
    """All training processes are to be started anew.

    Attributes:
        failure: Why.
        needs_agents: The agents too, for some were lost.
        wait_s: Seconds to wait before that: more and more where agents do not start.
    """

    failure: Failure
    needs_agents: bool
    wait_s: int = 0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The run is to end.

    Attributes:
        failure: Of what.
        why: Why it is not tried again, such as ``and workers.max_failures.code=3 is used up``; or nothing.
    """

    failure: Failure
    why: str = ""

    @property
    def advice(self) -> str:
        """What to do about it, if it can be said."""
        return _ADVICE.get(self.failure.cause, "").format(limit=self.failure.limit)
