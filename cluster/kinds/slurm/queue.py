"""Jobs in Slurm's queue, as ``squeue`` shows them.

Sources: squeue(1), JOB STATE CODES and JOB REASON CODES, of Slurm 22.05.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import parse_qsl

from cluster.scheduler import STOPPED_CODES, Job, JobStatus
from cluster.spec.durations import seconds_from

_WIDTHS: Mapping[str, int] = {
    "JobID": 24, "JobArrayID": 32, "State": 24, "Reason": 128, "StartTime": 32, "exit_code": 16, "RestartCnt": 16,
    "TimeUsed": 24, "NodeList": 64, "Name": 256, "Comment": 1100,
}  # fmt: skip
"""The fields that are asked for, and their width: Slurm cuts longer ones, and a comment has at most 1024 characters.

``RestartCnt`` and ``exit_code`` are only in ``--Format``, and ``--json`` has another schema in each release.
"""
FORMAT = ",".join(f"{name}:{width}" for name, width in _WIDTHS.items())
"""For ``squeue --array --Format``."""

_STATUSES: Mapping[str, JobStatus] = {
    "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending", "RESV_DEL_HOLD": "pending", "SPECIAL_EXIT": "pending", "SUSPENDED": "pending",
    "POWER_UP_NODE": "pending",
    "RUNNING": "running", "COMPLETING": "running", "SIGNALING": "running", "STAGE_OUT": "running",
    "RESIZING": "running", "STOPPED": "running", "UPDATE_DB": "running", "EXPEDITING": "running",
    "COMPLETED": "succeeded",
    "CANCELLED": "stopped",
    "FAILED": "failed", "TIMEOUT": "failed", "NODE_FAIL": "failed", "PREEMPTED": "failed", "BOOT_FAIL": "failed",
    "DEADLINE": "failed", "OUT_OF_MEMORY": "failed", "LAUNCH_FAILED": "failed", "RECONFIG_FAIL": "failed",
    "REVOKED": "failed",
}  # fmt: skip
_SIGNAL_CODES = 128
"""What a shell adds to the number of the signal that ends a command."""
_NOT_SET = ("", "N/A", "NONE", "Unknown", "None", "(null)")
_REASONS = (
    ("Priority", "others are before it"),
    ("DependencyNeverSatisfied", "the job that it waits for has failed; stop it"),
    ("Dependency", "another job must end first"),
    ("PartitionConfig", "the partition gives no job what it asks for; stop it"),
    ("PartitionNodeLimit", "the partition gives no job that many nodes; stop it"),
    ("PartitionTimeLimit", "the partition gives no job that much time; stop it"),
    ("PartitionDown", "the partition starts no jobs now"),
    ("PartitionInactive", "the partition starts no jobs now"),
    ("ReqNodeNotAvail", "nodes that it needs are down or reserved"),
    ("BadConstraints", "no nodes have what it asks for; stop it"),
    ("JobHeld", "it is held; scontrol release lets it start"),
    ("job_requeued_in_held_state", "it is held; scontrol release lets it start"),
    ("Assoc", "its account or user has the most that it may have"),
    ("QOS", "its quality of service has the most that it may have"),
)
"""How reasons begin that do not explain themselves, and what they mean; the first that fits counts."""
SUBMISSION = "submission"
"""Key in the metadata of every job of the launcher."""
WITHDRAWN = "withdrawn"
"""The comment of a job that was submitted while another of its name was there, and never started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedJob:
    """A job as Slurm knows it.

    Attributes:
        number: Slurm's number. One task of an array has that of the array, and so have all that are still one job.
        id: What Slurm's commands take for this job alone: the number, or ``ARRAY_TASK``.
        name: Its name, which is the id that it was requested with. Several jobs may have one name.
        state: Slurm's word.
        reason: Slurm's word for why it is in this state; empty: none.
        starts_at: The Unix time at which it started or may start; None: unknown.
        used_s: Seconds since it started, in this try.
        restarts: How often it was requeued.
        exit_code: The exit code of its script; None: unknown.
        was_placed: It has nodes, or had them.
        metadata: What it was requested with; empty for jobs of others.
    """

    number: int
    id: str
    name: str
    state: str
    reason: str
    starts_at: float | None
    used_s: float
    restarts: int
    exit_code: int | None
    was_placed: bool
    metadata: Mapping[str, str]

    @property
    def has_ended(self) -> bool:
        """Whether Slurm runs it no more, nor starts it again."""
        return _STATUSES.get(self.state) in ("succeeded", "failed", "stopped")

    @property
    def is_ours(self) -> bool:
        """Whether the launcher has submitted it."""
        return "run" in self.metadata and SUBMISSION in self.metadata

    @property
    def task(self) -> str:
        """Its number in its array; empty: it is no task of an array."""
        return self.id.partition("_")[2]

    def as_job(self) -> Job:
        """Return the job as a scheduler reports it.

        Raises:
            ValueError: Its state is a word that this module does not know.
        """
        status = _STATUSES.get(self.state)
        if status is None:
            raise ValueError(f"job {self.number} ({self.name}) is {self.state!r}, which is no state that is known here")
        if status == "failed" and self.exit_code in STOPPED_CODES:
            status = "stopped"
        return Job(
            id=self.name,
            status=status,
            message=self._message(status),
            exit_code=self.exit_code if self.has_ended else None,
            began_at=self.starts_at if status != "pending" and self.was_placed else None,
            metadata=self.metadata,
        )

    def _message(self, status: JobStatus) -> str:
        attempt = f"try {self.restarts + 1}" if self.restarts else ""
        if status == "succeeded":
            return ""
        if status == "running":
            return attempt
        if status == "stopped" and self.state != "CANCELLED":
            return "ended after a signal"
        if status != "pending":
            return self.state.lower() + (f": {self.reason}" if self.reason else "")
        if self.state == "SUSPENDED":
            return "is suspended: others use its nodes"
        if self.state == "CONFIGURING":
            return "its nodes are starting"
        means = next((text for word, text in _REASONS if self.reason.startswith(word)), None)
        reason = self.reason if means is None else f"{self.reason} ({means})"
        if attempt:
            reason = f"requeued, {attempt}{f': {reason}' if reason else ''}"
        else:
            reason = f"waits for {reason}" if reason else "waits"
        if self.starts_at is None:
            return reason
        return f"{reason}; may start at {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.starts_at))}"


def jobs_from(text: str) -> list[QueuedJob]:
    """Return the jobs in what ``squeue`` with ``FORMAT`` prints, the oldest first.

    Withdrawn ones are left out. Lines that begin with no number are parts of comments of others.

    Raises:
        ValueError: A line has another form.
    """
    lines = [line for line in text.splitlines() if line[: _WIDTHS["JobID"]].strip().isdecimal()]
    return sorted((_job(line) for line in lines if line.split()[-1] != WITHDRAWN), key=lambda job: job.number)


def _job(line: str) -> QueuedJob:
    fields, begin = {}, 0
    for name, width in _WIDTHS.items():
        fields[name] = line[begin : begin + width].strip()
        begin += width
    if not fields["State"] or not fields["Name"]:
        raise ValueError(f"squeue prints {line.strip()[:100]!r}, where --Format={FORMAT} was asked for")
    state, reason = fields["State"], fields["Reason"]
    return QueuedJob(
        number=int(fields["JobID"]),
        id=fields["JobArrayID"],
        name=fields["Name"],
        state=state,
        reason="" if reason in _NOT_SET else reason,
        starts_at=_unix_time(fields["StartTime"]),
        used_s=0.0 if fields["TimeUsed"] in (*_NOT_SET, "INVALID") else seconds_from(fields["TimeUsed"]),
        restarts=int(fields["RestartCnt"] or 0),
        exit_code=_exit_code(fields["exit_code"], state),
        was_placed=fields["NodeList"] not in _NOT_SET,
        metadata=_metadata(fields["Comment"]),
    )


def _exit_code(text: str, state: str) -> int | None:
    """Return the exit code of a script; None if it has ended without one.

    Slurm prints the status of wait(2), such as 768 for the exit code 3, or the code and the signal, such as ``3:0``.
    """
    if ":" in text:
        code, number = map(int, text.split(":"))
    else:
        status = int(text)
        code, number = os.waitstatus_to_exitcode(status) if not status & 0x7F else 0, status & 0x7F
    if number:
        return _SIGNAL_CODES + number
    return code if code or state == "COMPLETED" else None


def _unix_time(text: str) -> float | None:
    return None if text in _NOT_SET else datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def _metadata(comment: str) -> dict[str, str]:
    """Return what the script of a job has as its comment; empty for a comment of another form."""
    try:
        return dict(parse_qsl(comment, keep_blank_values=True, strict_parsing=True))
    except ValueError:
        return {}
