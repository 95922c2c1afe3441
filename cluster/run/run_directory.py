"""The directory of one run: every name in it, and how each object is written and read.

No other module knows a path below a run's URL. The contents of the documents are their writers' business.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.errors import StorageError
from cluster.run.bundle import check_digest
from cluster.run.checkpoints import CONCURRENT_REQUESTS, Checkpoints
from cluster.run.lease import Lease, newest_status
from cluster.run.row_log import RowLog
from cluster.run.submissions import Submissions
from cluster.storage.documents import read_document, write_document
from cluster.storage.store import MissingObject, Store

_JOB = "job.yaml"
_ENVIRONMENT = "environment.json"
_BEFORE = "before"
"""Key in the environment document: the digest of the previous description, and the environment that belongs to it."""
_SUBMISSIONS = "submissions"
_CODE = "code"
_INDEXES = "indexes"
_OLD_STATUS = "status.json"
"""Where drivers wrote the status before leases held it."""
_TRACKER = "tracker.json"
_STOP = "stop.json"
_CHECKPOINTS = "checkpoints"
_LOGS = "logs"
_MATRICES = "matrices"
_METRICS = "metrics"
_EVENTS = "events"


class RunDirectory:
    """One run in a store; it need not exist yet.

    Args:
        place: Its URL or its store.
    """

    def __init__(self, place: str | Store) -> None:
        self.store = place if isinstance(place, Store) else Store(place)
        self.checkpoints = Checkpoints(self.store.at(_CHECKPOINTS))
        self.submissions = Submissions(self.store.at(_SUBMISSIONS))
        self._lease: Lease | None = None

    def __repr__(self) -> str:
        return f"RunDirectory({self.url!r})"

    @property
    def url(self) -> str:
        """The URL of the run."""
        return self.store.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def exists(self) -> bool:
        """Returns whether a run was ever begun here."""
        return self.store.exists(_JOB)

    def is_known(self) -> bool:
        """Returns whether a run was ever begun here or submitted."""
        return self.exists() or self.submissions.newest() is not None

    def take_lease(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes over the run, to resume from its newest checkpoint. Only the holder writes logs, checkpoints and
        status.

        Whatever an earlier driver writes beyond that checkpoint from then on does not count.

        Args:
            clock: A monotonic clock, in seconds.

        Raises:
            SupersededError: Another process took over the run at the same moment.
        """
        with contextlib.suppress(StorageError):  # it only makes room: a later write reports a full store
            self.store.sweep()
        self._lease = Lease(self.store, self.read_status(), self._newest_writer, clock)
        self.checkpoints = Checkpoints(self.store.at(_CHECKPOINTS), self._lease.id)
        # After the lease is written: until then the earlier driver commits newer checkpoints and removes older ones.
        # Before the logs are taken over: they then have the rows up to this step.
        self.checkpoints.fence(max(self.checkpoints.steps(), default=0))

    def check_lease(self) -> None:
        """Checks that this process still holds the lease; required before any write. One listing as a rule.

        Raises:
            SupersededError: Another driver has taken over the run.
        """
        self._held_lease().check()

    def delete_begun(self, code: str | None) -> None:
        """Deletes what the driver that holds the lease has written to an empty directory, except for a submission.

        The description is deleted first, so that a run which is deleted in part does not begin again, at step 0.

        Args:
            code: The digest of the code bundle that the driver has written; a submission needs that too.
        """
        names = self.store.names()
        kept = {name for name in names if name.startswith(f"{_CODE}/")}
        if code is not None and not any(name.startswith(f"{_SUBMISSIONS}/") for name in names):
            kept.discard(_code_object(code))
        own = [name for name in names if name not in kept and not name.startswith(f"{_SUBMISSIONS}/")]
        self.store.delete(sorted(own, key=lambda name: name != _JOB))

    def metrics(self) -> RowLog:
        """Opens the metrics: one row per logged step. The driver keeps the log it got."""
        return self._log(_METRICS, key="step")

    def events(self) -> RowLog:
        """Opens the events of the run, in order. The driver keeps the log it got."""
        return self._log(_EVENTS, key="seq")

    def write_description(self, text: str, environment: Mapping[str, Any]) -> None:
        """Writes the resolved description and its environment; from then on the run exists.

        The description is written last. If the process is killed before that, the run keeps the previous description,
        and ``read_environment`` returns the environment that belongs to it.

        Args:
            text: The description.
            environment: What belongs to the description, such as the code it runs with.
        """
        before = self._read_job_bytes()
        if before != text.encode():
            pair = {"job_sha256": _digest(before), "environment": self.read_environment()}
            environment = {**environment, _BEFORE: pair}
        self.write_environment(environment)
        self.write_job(text)

    def write_job(self, text: str) -> None:
        """Writes the resolved description if it differs from the stored one."""
        if self._read_job_bytes() != text.encode():
            self.store.write(_JOB, text.encode())

    def read_job(self) -> str:
        """Returns the resolved description.

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
        write_document(self.store, _ENVIRONMENT, environment)

    def read_environment(self) -> dict[str, Any]:
        """Returns the environment of the stored description, see ``write_description``; empty if there is none.

        Raises:
            StorageError: The environment is torn although there is a description, as after a kill on a store without
                renames.
        """
        environment = read_document(self.store, _ENVIRONMENT)
        if environment is None and self.exists():
            environment = read_document(self.store, _ENVIRONMENT)  # again: it is written before a first description
            if environment is None and self.store.exists(_ENVIRONMENT):
                raise StorageError(
                    f"{self.url}/{_ENVIRONMENT}: is torn, and nothing else tells the code and the data that the run "
                    "began with; restore it, or delete it and submit the run again with the same code"
                )
        environment = environment or {}
        before = environment.pop(_BEFORE, None)
        if before is not None and before["job_sha256"] == _digest(self._read_job_bytes()):
            return dict(before["environment"])  # the description that this environment belongs to was never written
        return environment

    def write_code(self, sha256: str, bundle: bytes) -> None:
        """Writes the user's code, unless the store already has it whole: without renames, the store may hold a torn
        object.

        A bundle is named by its digest, so the bytes under a name never change.
        """
        with contextlib.suppress(MissingObject):
            if hashlib.sha256(self.store.read(_code_object(sha256))).hexdigest() == sha256:
                return
        self.store.write(_code_object(sha256), bundle)

    def read_code(self, sha256: str) -> bytes:
        """Returns the zip file of the user's code with this digest.

        Raises:
            StorageError: It is missing or damaged.
        """
        try:
            data = self.store.read(_code_object(sha256))
        except MissingObject as error:
            raise StorageError(
                f"{self.url}: {_code_object(sha256)}, the code of the run, is missing; restore it, or submit the run "
                "again"
            ) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                f"{self.url}: {_code_object(sha256)}, the code of the run, is damaged; submit the run again, which "
                "mends it"
            )
        return data

    def write_index(self, digest: str, content: bytes) -> None:
        """Writes an index of the data, compressed, unless the same bytes are there: what is damaged is mended."""
        name = _index_object(digest)
        with contextlib.suppress(MissingObject):
            if self.store.read(name) == content:
                return
        self.store.write(name, content)

    def read_index(self, digest: str) -> bytes:
        """Returns an index of the data.

        Raises:
            MissingObject: There is none with this digest.
        """
        return self.store.read(_index_object(digest))

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Overwrites the status of the run, which is also the driver's heartbeat."""
        self._held_lease().write(status)

    def stay_alive(self) -> None:
        """Renews the driver's heartbeat if it is due; for long work between two writes of the status.

        It repeats the last status, so it never reports anything early.
        """
        self._held_lease().renew()

    def read_status(self) -> dict[str, Any] | None:
        """Returns the last status of the run, or None. Before a run has begun, its status has no step."""
        return newest_status(self.store) or read_document(self.store, _OLD_STATUS)

    def request_stop(self) -> None:
        """Asks the run's driver to save and stop; works from anywhere that reaches the store."""
        write_document(self.store, _STOP, {"time": round(time.time(), 3)})

    def is_stop_requested(self) -> bool:
        """Returns whether a request to stop is waiting for the driver."""
        return self.store.exists(_STOP)

    def clear_stop(self) -> None:
        """Deletes the request to stop, if there is one."""
        self.store.delete([_STOP])

    def write_tracker_id(self, tracker_id: str) -> None:
        """Writes the tracker's id of the run, for later attempts to continue the same tracker run."""
        write_document(self.store, _TRACKER, {"id": tracker_id})

    def read_tracker_id(self) -> str | None:
        """Returns the tracker's id of the run, or None before its first attempt."""
        tracker_id = (read_document(self.store, _TRACKER) or {}).get("id")
        return tracker_id if isinstance(tracker_id, str) else None

    def write_picture(self, name: str, png: bytes) -> str:
        """Writes a PNG picture and returns its URL."""
        self.store.write(f"{name}.png", png)
        return f"{self.url}/{name}.png"

    def write_matrix(self, name: str, matrix: Mapping[str, Any]) -> None:
        """Overwrites a matrix that a validation produced, such as a confusion matrix."""
        write_document(self.store, f"{_MATRICES}/{name}.json", matrix, indent=None)

    def read_matrices(self) -> dict[str, dict[str, Any]]:
        """Returns the newest of each matrix by name, without those torn on a store without renames."""
        names = [name.removeprefix(f"{_MATRICES}/") for name in self.store.names(_MATRICES) if name.endswith(".json")]
        found = {name.removesuffix(".json"): read_document(self.store, f"{_MATRICES}/{name}") for name in sorted(names)}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    def write_log(self, attempt: int, rank: int, data: bytes) -> str:
        """Writes a worker's log and returns its name, for ``read_log``."""
        name = f"attempt-{attempt:03d}-worker-{rank:03d}.log"
        self.store.write(f"{_LOGS}/{name}", data)
        return name

    def log_names(self, attempt: int | None = None, rank: int | None = None) -> list[str]:
        """Returns the names of the logs, oldest attempt first: all, or those of one attempt or one worker."""
        found = []
        for name in self.store.names(_LOGS):
            match = re.fullmatch(rf"{_LOGS}/(attempt-(\d+)-worker-(\d+)\.log)", name)
            if match and attempt in (None, int(match[2])) and rank in (None, int(match[3])):
                found.append((int(match[2]), int(match[3]), match[1]))
        return [name for _, _, name in sorted(found)]

    def read_log(self, name: str) -> bytes:
        """Returns a log by its name."""
        return self.store.read(f"{_LOGS}/{name}")

    def _read_job_bytes(self) -> bytes | None:
        """Returns the stored description, or None if there is no run here."""
        try:
            return self.store.read(_JOB)
        except MissingObject:
            return None

    def _newest_writer(self) -> str:
        """Returns the greatest fencing token in the name of any object but a lease, or ''."""
        return max(self.events().newest_writer(), self.checkpoints.newest_token())

    def _held_lease(self) -> Lease:
        assert self._lease is not None, "only the driver that holds the lease writes here"
        return self._lease

    def _log(self, name: str, key: str) -> RowLog:
        return RowLog(self.store, name, key=key, writer=None if self._lease is None else self._lease.id)


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _code_object(sha256: str) -> str:
    check_digest(sha256)
    return f"{_CODE}/{sha256}.zip"


def _index_object(digest: str) -> str:
    return f"{_INDEXES}/{digest}.arrow.zst"


def is_run(names: Collection[str]) -> bool:
    """Returns whether a folder with these entries is a run directory; a ``job.yaml`` alone may be a user's own."""
    return {_JOB, _ENVIRONMENT} <= {*names} or {_SUBMISSIONS, _CODE} <= {*names}


def list_runs(store: Store) -> list[RunDirectory]:
    """Returns the runs directly in a store, begun or submitted, by name."""
    runs = [RunDirectory(store.at(folder)) for folder in store.folders()]
    with ThreadPoolExecutor(CONCURRENT_REQUESTS, thread_name_prefix="list") as pool:
        return [run for run, is_known in zip(runs, pool.map(RunDirectory.is_known, runs)) if is_known]
