"""What the driver knows of its run, as the status tells it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class RunState:
    """What the driver knows of the run, and its status tells."""

    status: str = "running"
    step: int = 0
    epoch: int = 0
    """Epochs completed."""
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    state_sha256: str | None = None
    attempts: int = 0
    workers: int = 0
    """Workers that train now, or did last."""
    waits_for: str | None = None
    """What has to be waited for before training can go on."""
    worker_hours: float = 0.0
    seconds: float = 0.0
    time: dict[str, float] = field(default_factory=dict)
    """Seconds by what they went into, as ``launcher.driver.goodput`` tells them apart."""
    unsaved: dict[str, float] = field(default_factory=dict)
    """Of these, what is lost if the driver dies now."""
    images_per_second: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    """The failures of this invocation, by whose doing they were."""
    failure: dict[str, Any] | None = None
    """The last failure of a worker, also while the run goes on again."""
    error: str | None = None
