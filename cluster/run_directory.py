"""The directory of one run: every name in it, and how each thing there is written and read.

Nothing else in the program knows a path below a run's URL. What the documents hold is their writers' business.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any

from cluster.checkpoints import Checkpoints
from cluster.row_log import RowLog
from cluster.storage import MissingObject, Store

_JOB = "job.yaml"
_ENVIRONMENT = "environment.json"
_STATUS = "status.json"
_TRACKER = "tracker.json"
_STOP = "stop.json"
_CHECKPOINTS = "checkpoints"
_LOGS = "logs"
_MATRICES = "matrices"
_METRICS = "metrics"
_EVENTS = "events"

# A document that is being overwritten is torn for a moment, on a store with folders.
_READS = 4
_SECONDS_BETWEEN_READS = 0.05


class RunDirectory:
    """One run in a store; it need not exist yet.

    Args:
        place: Its URL, or its store.
    """

    def __init__(self, place: str | Store) -> None:
        self.store = place if isinstance(place, Store) else Store(place)
        self.checkpoints = Checkpoints(self.store.at(_CHECKPOINTS))

    def __repr__(self) -> str:
        return f"RunDirectory({self.url!r})"

    @property
    def url(self) -> str:
        """Where the run lies."""
        return self.store.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def exists(self) -> bool:
        """Whether a run was ever written here."""
        return self.store.exists(_JOB)

    def metrics(self) -> RowLog:
        """The metrics: one row per logged step. A log has one writer: the driver keeps the one it got."""
        return RowLog(self.store, _METRICS, key="step")

    def events(self) -> RowLog:
        """What happened to the run, in order. A log has one writer: the driver keeps the one it got."""
        return RowLog(self.store, _EVENTS)

    def write_job(self, text: str) -> None:
        """Writes the resolved description."""
        self.store.write(_JOB, text.encode())

    def read_job(self) -> str:
        """The resolved description.

        Raises:
            MissingObject: There is no run here.
        """
        try:
            return self.store.read(_JOB).decode()
        except MissingObject as error:
            parent = self.url.rpartition("/")[0]
            raise MissingObject(f"{self.url}: is no run, it has no {_JOB}; see `launcher list {parent}`") from error

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Writes versions, hardware and whatever else may explain the bits."""
        self._write_document(_ENVIRONMENT, environment)

    def read_environment(self) -> dict[str, Any]:
        """What ``write_environment`` wrote; empty if it never did, or was killed while it did."""
        return self._read_document(_ENVIRONMENT) or {}

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Overwrites how the run stands."""
        self._write_document(_STATUS, status)

    def read_status(self) -> dict[str, Any] | None:
        """How the run stood last; none if that is not known."""
        return self._read_document(_STATUS)

    def request_stop(self) -> None:
        """Asks whoever drives the run to save and stop; from anywhere that reaches the store."""
        self._write_document(_STOP, {"time": round(time.time(), 3)})

    def is_stop_requested(self) -> bool:
        """Whether somebody asked for a stop that has not been answered."""
        return self.store.exists(_STOP)

    def clear_stop(self) -> None:
        """Answers the request to stop; no harm if there is none."""
        self.store.delete([_STOP])

    def write_tracker_id(self, tracker_id: str) -> None:
        """Writes by which name the tracker knows the run, for later attempts to go on with."""
        self._write_document(_TRACKER, {"id": tracker_id})

    def read_tracker_id(self) -> str | None:
        """The tracker's name of the run; none before its first attempt."""
        tracker_id = (self._read_document(_TRACKER) or {}).get("id")
        return tracker_id if isinstance(tracker_id, str) else None

    def write_picture(self, name: str, png: bytes) -> str:
        """Writes a picture; returns its URL."""
        self.store.write(f"{name}.png", png)
        return f"{self.url}/{name}.png"

    def write_matrix(self, name: str, matrix: Mapping[str, Any]) -> None:
        """Overwrites what a validation came to in a table, such as a confusion matrix."""
        self._write_document(f"{_MATRICES}/{name}.json", matrix, indent=None)

    def read_matrices(self) -> dict[str, dict[str, Any]]:
        """The newest of each matrix, by name; one whose writer was killed while it wrote is not there."""
        names = [name.removeprefix(f"{_MATRICES}/") for name in self.store.names(_MATRICES) if name.endswith(".json")]
        found = {name.removesuffix(".json"): self._read_document(f"{_MATRICES}/{name}") for name in sorted(names)}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    def write_log(self, attempt: int, rank: int, data: bytes) -> str:
        """Writes a worker's log; returns its name, for ``read_log``."""
        name = f"attempt-{attempt:03d}-worker-{rank:03d}.log"
        self.store.write(f"{_LOGS}/{name}", data)
        return name

    def log_names(self, attempt: int | None = None, rank: int | None = None) -> list[str]:
        """The names of the logs, oldest attempt first: all, or those of one attempt or one worker."""
        found = []
        for name in self.store.names(_LOGS):
            match = re.fullmatch(rf"{_LOGS}/(attempt-(\d+)-worker-(\d+)\.log)", name)
            if match and attempt in (None, int(match[2])) and rank in (None, int(match[3])):
                found.append((int(match[2]), int(match[3]), match[1]))
        return [name for _, _, name in sorted(found)]

    def read_log(self, name: str) -> bytes:
        """A log by its name."""
        return self.store.read(f"{_LOGS}/{name}")

    def _write_document(self, name: str, document: Mapping[str, Any], indent: int | None = 1) -> None:
        self.store.write(name, (json.dumps(document, indent=indent) + "\n").encode())

    def _read_document(self, name: str) -> dict[str, Any] | None:
        """A JSON document; none if it is missing, or stays torn: its writer was killed while it wrote."""
        for attempt in range(_READS):
            if attempt:
                time.sleep(_SECONDS_BETWEEN_READS)
            try:
                document = json.loads(self.store.read(name))
            except MissingObject:
                return None
            except ValueError:
                continue
            return document if isinstance(document, dict) else None
        return None


def list_runs(store: Store) -> list[RunDirectory]:
    """The runs directly in a store, by name."""
    runs = (RunDirectory(store.at(folder)) for folder in store.folders())
    return [run for run in runs if run.exists()]
