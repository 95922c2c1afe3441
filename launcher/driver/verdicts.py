"""A failure, and the verdict on it: try again or give up."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import Cause, ClusterError, LauncherError

Kind = Literal["machine", "preemption", "code"]
"""Who is responsible for a failure; each kind has its own limit in ``workers.max_failures``."""


_SMALLER = "start a new run with smaller micro-batches: a lower train.global_batch or more train.shards"
ADVICE: dict[Cause, str] = {
    "out_of_memory": f"give each worker more memory, then resume, or {_SMALLER}",
    "gpu_out_of_memory": f"take GPUs with more memory (workers.accelerator), then resume, or {_SMALLER}",
    "gpu_lost": "look at the GPU there (nvidia-smi, and Xid in dmesg) and reset or replace it, then resume",
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
"""Advice by cause, for a failure that ends the run. Messages of other causes include theirs, or the code is wrong."""
LACKS_ADVICE: tuple[Cause, ...] = ("code", "crash", "storage", "checkpoint")
"""The other causes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failure of the worker that failed first; the failures of the others follow from it.

    Attributes:
        cause: Why it failed.
        message: What happened, in one line, without where and when.
        kind: Who is responsible; None: trying again does not help.
        rank: The worker; None: it concerns all workers.
        ranks: All workers with the same cause, if there are several.
        is_common: Whether other workers report the same, so that the node of ``rank`` need not be the cause.
        is_silent: Whether the worker hung and does not even send heartbeats, so that its node may be the cause.
        is_unkillable: Whether its former process does not end.
        step: The optimizer steps that the worker had completed; None: not known.
        error: The type of the error if the failure ends the run.
        place: The step and line at which the code failed; empty: not known, or not the code's failure.
        traceback: The traceback of the user's code.
        log_tail: The last output of a process that ended without a report.
        hang: The event of a hang; None: it did not hang.
        limit: The key of the time limit that a hang exceeded.
        advice: What the user can do; empty: what one does about the cause.
    """

    cause: Cause
    message: str
    kind: Kind | None = "machine"
    rank: int | None
    step: int | None = None
    error: type[LauncherError] = ClusterError
    ranks: frozenset[int] = frozenset()
    is_common: bool = False
    is_silent: bool = False
    is_unkillable: bool = False
    place: str = ""
    traceback: str = ""
    log_tail: str = ""
    hang: Mapping[str, Any] | None = None
    limit: str = "workers.hang_timeout_s"
    advice: str = ""


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Restart all training processes.

    Attributes:
        failure: The failure.
        needs_agents: Whether to restart the agents too, because some were lost, or their GPUs.
        wait_s: Seconds to wait first; it doubles while agents fail to start, or GPUs are lost one after the other.
    """

    failure: Failure
    needs_agents: bool
    wait_s: int = 0


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run.

    Attributes:
        failure: The failure.
        why: Why it is not tried again, such as ``and workers.max_failures.code=3 is used up``; empty: see the failure.
    """

    failure: Failure
    why: str = ""

    @property
    def advice(self) -> str:
        """What the user can do; empty: not known."""
        return self.failure.advice or ADVICE.get(self.failure.cause, "").format(limit=self.failure.limit)
