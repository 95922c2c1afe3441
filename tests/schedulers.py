"""A cluster that jobs are submitted to, as processes of this machine: without Ray, and shared by all who name it.

What a job is given is what it would have on a host far away: another home, an empty working directory, and of the
submitter nothing but the run directory. It runs the command line without Ray (``tests.launcher_without_ray``).
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.capacity import Capacity, Node
from cluster.errors import ClusterError
from cluster.host import identity
from cluster.inspection.nodes import NEEDS_VARIABLE, needs_from_text, report_from_log
from cluster.inspection.store import answer
from cluster.scheduler import ENDED, ClusterReport, Job, JobRequest, JobStatus, Needs, NodeReport, Scheduler
from cluster.storage.store import Store
from launcher.planning.nodes import own_versions

FOLDER_VARIABLE = "LAUNCHER_TEST_CLUSTER"
"""The environment variable that names the folder of the cluster that ``launcher submit`` means in tests."""
ADDRESS = "10.0.0.1"
URL = "http://test-cluster:8265"
_REPORT_LIMIT_S = 120.0


def a_node(address: str = ADDRESS, **resources: float) -> Node:
    resources = {"CPU": 16.0, "GPU": 0.0, **resources}
    return Node(id=address, address=address, resources=resources, free=resources, drains_at=None, is_here=False)


def a_report(address: str = ADDRESS, **changes: Any) -> NodeReport:
    """Of a node that has all that this machine has."""
    versions = own_versions() | changes.pop("versions", {})
    return NodeReport(
        **({"id": address, "address": address, "versions": versions, "missing": (), "store_error": ""} | changes)
    )


def a_cluster(
    *nodes: Node, reports: tuple[NodeReport, ...] | None = None, silent: tuple[str, ...] = ()
) -> ClusterReport:
    nodes = nodes or (a_node(),)
    reports = tuple(a_report(node.address) for node in nodes) if reports is None else reports
    return ClusterReport(capacity=Capacity(nodes=nodes, limits=None), nodes=reports, silent=silent)


def answered(report: ClusterReport, needs: Needs) -> ClusterReport:
    """What nodes report, which have done their part of the check of the store unless they report an error of it."""
    for node in report.nodes:
        if not node.store_error:
            answer(Store(needs.store), needs.check, node.id)
    return report


@dataclass
class FakeScheduler(Scheduler):
    """A cluster that has what a test gives it, and begins nothing: its jobs stand by for ever."""

    has: ClusterReport = field(default_factory=a_cluster)
    known: dict[str, JobStatus] = field(default_factory=dict)
    metadata: dict[str, Mapping[str, str]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    grace_periods_s: list[int] = field(default_factory=list)
    asked: dict[str, Needs] = field(default_factory=dict)
    breaks: int = 0
    """How many answers to come are lost."""
    began_at: float | None = None
    """When all of its jobs began."""

    def inspect(self, needs: Needs) -> ClusterReport:
        raise NotImplementedError

    def report(self, job_id: str) -> ClusterReport:
        return answered(self.has, self.asked[job_id])

    starts_at_once = True

    def begin(self, request: JobRequest) -> Job:
        assert request.environment.keys() <= {NEEDS_VARIABLE}, "everyone can read it"
        self.grace_periods_s.append(request.stop_grace_s)
        assert request.metadata["run"] in request.command
        assert request.metadata["submission"] in request.command
        if request.id not in self.known:
            self.known[request.id], self.metadata[request.id] = "pending", request.metadata
            self.commands.append(request.command)
            if request.environment:
                self.asked[request.id] = needs_from_text(request.environment[NEEDS_VARIABLE])
        self.breaks -= 1
        if self.breaks >= 0:
            raise ClusterError(f"{URL}: nobody answers")
        job = self.read(request.id)
        assert job is not None
        return job

    def script(self, request: JobRequest) -> str:
        raise NotImplementedError

    def read(self, job_id: str) -> Job | None:
        if job_id not in self.known:
            return None
        metadata = self.metadata.get(job_id, {})
        return Job(
            id=job_id, status=self.known[job_id], message="", exit_code=None, began_at=self.began_at, metadata=metadata
        )

    def jobs(self) -> list[Job]:
        raise NotImplementedError

    def stop(self, job_id: str) -> None:
        self.known[job_id] = "stopped"

    def log(self, job_id: str) -> str:
        raise NotImplementedError


@dataclass
class FakeQueue(FakeScheduler):
    """A cluster whose jobs wait in a queue for nodes of their own: they stay pending, and have no nodes to ask."""

    requests: list[JobRequest] = field(default_factory=list)
    refusal: str = ""
    """Why it refuses every job; empty: it takes them."""
    arrays: list[dict[int, JobRequest]] = field(default_factory=list)

    starts_at_once = False

    def inspect(self, needs: Needs) -> ClusterReport:  # noqa: ARG002  # there is no node to ask
        return replace(self.has, nodes=(), silent=())

    def report(self, job_id: str) -> ClusterReport:
        raise AssertionError(f"{job_id} stands by for days")

    def begin(self, request: JobRequest) -> Job:
        if self.refusal:
            raise ClusterError(self.refusal)
        assert request.places is not None, "nobody knows how many nodes it takes"
        self.requests.append(request)
        return super().begin(request)

    def script(self, request: JobRequest) -> str:
        if self.refusal:
            raise ClusterError(self.refusal)
        assert request.places is not None, "nobody knows how many nodes it takes"
        self.requests.append(request)
        return f"#!/bin/bash\n#SBATCH --job-name={request.id}\n{request.command}\n"

    def begin_array(self, requests: Mapping[int, JobRequest]) -> dict[int, Job]:
        self.arrays.append(dict(requests))
        breaks, self.breaks = self.breaks, 0
        jobs = {number: self.begin(request) for number, request in requests.items()}
        self.breaks = breaks - 1
        if self.breaks >= 0:
            raise ClusterError(f"{URL}: nobody answers")
        return jobs

    def array_script(self, requests: Mapping[int, JobRequest]) -> str:
        if self.refusal:
            raise ClusterError(self.refusal)
        return "#!/bin/bash\n" + "".join(f"{number}) {request.command}\n" for number, request in requests.items())

    def sbatch(self, request: JobRequest) -> None:
        """What a person does with a script."""
        self.known[request.id], self.metadata[request.id] = "pending", request.metadata


class LocalScheduler(Scheduler):
    """Jobs are processes, and what is known of them lies in a folder, so that several submitters see the same."""

    starts_at_once = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs, self._home, self._work = folder / "jobs", folder / "home", folder / "work"
        for each in (self._jobs, self._home, self._work, folder / "bin"):
            each.mkdir(parents=True, exist_ok=True)
        program = folder / "bin" / "launcher"
        if not program.exists():
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m tests.launcher_without_ray "$@"\n')
            program.chmod(0o755)

    def inspect(self, needs: Needs) -> ClusterReport:
        return answered(a_cluster(), needs)

    def report(self, job_id: str) -> ClusterReport:
        deadline = time.monotonic() + _REPORT_LIMIT_S
        while True:
            job = self._known(job_id)
            if job.status == "pending":  # what it would report if it was not held
                return answered(a_cluster(), needs_from_text((self._jobs / job_id / "needs").read_text()))
            if (found := report_from_log(self.log(job_id))) is not None:
                return found
            assert job.status not in ENDED, f"{job.status} without a report\n{self.log(job_id)}"
            assert time.monotonic() < deadline, f"no report within {_REPORT_LIMIT_S:.0f} s\n{self.log(job_id)}"
            time.sleep(0.05)

    def begin(self, request: JobRequest) -> Job:
        assert re.fullmatch("[A-Za-z0-9_-]+", request.id)
        assert request.stop_grace_s > 0
        new = self.folder / f"new-{uuid.uuid4().hex}"
        new.mkdir()
        (new / "needs").write_text(request.environment.get(NEEDS_VARIABLE, ""))
        (new / "metadata").write_text(json.dumps(dict(request.metadata)))
        try:
            new.rename(self._jobs / request.id)  # with all that others may read of it
        except OSError:  # there is one of this name
            shutil.rmtree(new)
            return self._known(request.id)
        hold = shlex.quote(str(self.folder / "hold"))
        code = shlex.quote(str(self._jobs / request.id / "exit_code"))
        begun = shlex.quote(str(self._jobs / request.id / "begun"))
        wait = f"while [ -e {hold} ]; do sleep 0.05; done; touch {begun}"
        line = f"{wait}; ({request.command}); echo $? > {code}.new; mv {code}.new {code}"
        with (self._jobs / request.id / "log").open("wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", line],
                cwd=self._work,
                env={
                    **{name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"},
                    **request.environment,
                    "HOME": str(self._home),
                    "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                    "RAY_ADDRESS": "local",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        began = {"pid": process.pid, "started": identity.started(process.pid), "at": time.time()}
        (self._jobs / request.id / "new").write_text(json.dumps(began))
        (self._jobs / request.id / "new").rename(self._jobs / request.id / "process")
        return self._known(request.id)

    def script(self, request: JobRequest) -> str:
        raise ClusterError(f"it takes job {request.id} as a command")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Jobs that are begun meanwhile wait for their command."""
        (self.folder / "hold").touch()
        try:
            yield
        finally:
            (self.folder / "hold").unlink()

    @property
    def is_held(self) -> bool:
        """Jobs that are begun now wait for their command."""
        return (self.folder / "hold").exists()

    def read(self, job_id: str) -> Job | None:
        job = self._jobs / job_id
        if not job.is_dir():
            return None
        status: JobStatus = "pending"
        exit_code, began_at = None, None
        metadata: dict[str, str] = json.loads((job / "metadata").read_text())
        with suppress(FileNotFoundError):
            process = json.loads((job / "process").read_text())
            began_at = process["at"]
            is_alive = identity.started(process["pid"]) == process["started"]
            is_held = self.is_held and not (job / "begun").exists()
            ended: JobStatus = "stopped" if (job / "stopped").exists() else "failed"
            status = ("pending" if is_held else "running") if is_alive else ended
        with suppress(FileNotFoundError):
            exit_code = int((job / "exit_code").read_text())
            status = "failed" if exit_code else "succeeded"
        return Job(id=job_id, status=status, message="", exit_code=exit_code, began_at=began_at, metadata=metadata)

    def _known(self, job_id: str) -> Job:
        job = self.read(job_id)
        assert job is not None
        return job

    def jobs(self) -> list[Job]:
        found = [job for path in self._jobs.iterdir() if (job := self.read(path.name)) is not None]
        return sorted(found, key=lambda job: job.began_at or 0.0)

    def stop(self, job_id: str) -> None:
        (self._jobs / job_id / "stopped").touch()
        self.signal(job_id, signal.SIGINT)

    def log(self, job_id: str) -> str:
        if not (self._jobs / job_id).is_dir():
            raise ClusterError(f"{URL}: does not give the log of job {job_id}: it is not there")
        return (self._jobs / job_id / "log").read_text()

    def signal(self, job_id: str, number: signal.Signals) -> None:
        """What a cluster does to all processes of a job."""
        with suppress(FileNotFoundError, ProcessLookupError):
            os.killpg(json.loads((self._jobs / job_id / "process").read_text())["pid"], number)

    def wait(self, job_id: str, limit_s: float = 300.0) -> Job:
        """A job that has ended."""
        deadline = time.monotonic() + limit_s
        while (job := self.read(job_id)) is None or job.status in ("pending", "running"):
            assert time.monotonic() < deadline, f"no end within {limit_s:.0f} s\n{self.log(job_id)}"
            time.sleep(0.05)
        return job


@contextmanager
def local_scheduler(folder: Path) -> Iterator[LocalScheduler]:
    """A cluster of which nothing is left afterwards."""
    scheduler = LocalScheduler(folder)
    try:
        yield scheduler
    finally:
        for job in scheduler.jobs():
            scheduler.signal(job.id, signal.SIGKILL)
