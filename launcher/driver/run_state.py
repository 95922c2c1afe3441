"""The state of a run, as its status shows it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class RunState:
    """The state of a run, which the driver updates and writes as the run's status."""

    status: str = "running"
    step: int = 0
    saved_step: int | None = None
    """The step of the newest checkpoint, from which ``resume`` goes on; None: there is none."""
    epoch: int = 0
    """Epochs completed."""
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    state_sha256: str | None = None
    attempts: int = 0
    workers: int = 0
    """Number of workers that train now, or trained last."""
    waits_for: str | None = None
    """The resources that the run waits for before it can train; None: it does not wait."""
    worker_hours: float = 0.0
    seconds: float = 0.0
    time: dict[str, float] = field(default_factory=dict)
    """Wall time in seconds, by the parts of ``launcher.driver.goodput``."""
    unsaved: dict[str, float] = field(default_factory=dict)
    """Seconds of ``time`` that no checkpoint covers yet, by part: lost if the driver dies now."""
    images_per_second: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    """Number of failures under this driver, by responsible party."""
    failure: dict[str, Any] | None = None
    """The last failure of a worker; it stays while the run goes on."""
    error: str | None = None
    requeued: str | None = None
    """Why the scheduler of its batch job starts the run again, as the end of a sentence; None: it does not."""
    interrupted: bool = False
    """Whether a signal or the time limit of its job has stopped the run, and nothing else."""
    last_saves_s: list[float] = field(default_factory=list)
    """How long the last three saves took, the newest last; earlier drivers may have made them."""
    validation_s: float = 0.0
    """How long the longest validation of this driver took; before its first one, that of the driver before."""
