"""Two drivers and one run: refuse a run that a live driver has, and notice one that took it during planning."""

import contextlib
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError
from cluster.host.batch_job import batch_job_id
from cluster.run.lease import DRIVER_KEYS
from cluster.run.run_directory import RunDirectory
from cluster.storage.store import MissingObject
from launcher.display.progress import Progress
from launcher.watching.status import is_driven


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedRun:
    """The state of a run when this process looked at it.

    Attributes:
        status: The status that its last driver wrote; None: it never had a driver.
        text: Its description; None: the run has not begun.
        code: The digest of its code bundle; None: it has no bundle.
    """

    status: dict[str, Any] | None
    text: str | None
    code: str | None

    @property
    def identity(self) -> tuple[object, ...]:
        """The last driver, the description and the code; two observations with equal ones saw the same driver."""
        return *((self.status or {}).get(key) for key in DRIVER_KEYS), self.text, self.code

    @property
    def is_running(self) -> bool:
        """Whether the status says ``running``: the last driver did not write that it ended, so it may be alive."""
        return self.status is not None and self.status["status"] == "running"


def observe(run: RunDirectory) -> ObservedRun:
    """Read who drives a run, and with what. Call it before anything else of the run is read."""
    status, text = run.read_status(), None  # the status first: a driver takes the lease before it writes job.yaml
    with contextlib.suppress(MissingObject):
        text = run.read_job()
    return ObservedRun(status=status, text=text, code=run.read_environment().get("code"))


def meet_other_driver(run: RunDirectory, display: Progress, *, take_over: bool) -> None:
    """Refuse a run that a live driver has, unless ``take_over``; tell the user which driver is replaced.

    Raises:
        ClusterError: Another driver is running it.
    """
    status = run.read_status()
    if status is None or status["status"] != "running":
        return
    driver = f"process {status['pid']} on {status['host']}"
    if take_over:
        display.message(f"taking {run.url} over from {driver}")
    elif _is_earlier_try(status):
        display.message(f"{driver} ran {run.url} in an earlier try of this job: going on in its place")
    elif is_driven(run, status):
        raise ClusterError(
            f"{run.url}: {driver} is running it; stop it with `launcher stop {run.url}`, or add --take-over to go on "
            "here in its place"
        )
    else:
        display.message(f"{driver} ran {run.url} and is gone: going on in its place")


def check_not_driven_since(run: RunDirectory, observed: ObservedRun, *, take_over: bool) -> None:
    """Check, just before this process takes the lease, that no other driver has had the run since ``observed``.

    Planning waits until there is room for the dry run, so the observation may be an hour old.

    Args:
        run: The run.
        observed: What ``observe`` returned at the beginning.
        take_over: Whether the driver that was seen may still be alive.

    Raises:
        ClusterError: Another process drives the run, or has driven it since.
    """
    now = observe(run)
    has_written = observed.is_running and now.status != observed.status  # the driver that seemed dead is alive
    take_over = take_over or (now.status is not None and _is_earlier_try(now.status))
    if now.identity == observed.identity and (take_over or not has_written):
        return
    who = "somebody" if now.status is None else f"process {now.status['pid']} on {now.status['host']}"
    raise ClusterError(
        f"{run.url}: {who} has driven it since this process looked at it; nothing was changed here: look at "
        f"`launcher status {run.url}`, then give the command again"
    )


def _is_earlier_try(status: dict[str, Any]) -> bool:
    """Return whether a driver is an earlier try of this process's batch job; it may be cut off and write on.

    The scheduler holds it for dead, and the lease keeps it from writing once this process has taken that.
    """
    return batch_job_id() is not None and status.get("batch_job") == batch_job_id()
