"""The Jobs API of a Ray cluster as a scheduler: starts jobs on the head, watches them and stops them, from anywhere.

``cluster.kinds.jobs_http`` makes the requests. This module knows the paths and the fields of the API.
"""

import shlex
import time
import uuid
from contextlib import suppress
from types import NoneType
from typing import Any, get_args
from urllib.parse import quote

import requests

from cluster.errors import ClusterError, one_line
from cluster.inspection import nodes
from cluster.kinds.jobs_http import JobsHttp, OtherShape, Refused, field
from cluster.ray import inspection
from cluster.scheduler import ENDED, ClusterReport, Job, JobRequest, JobStatus, Needs, Scheduler

_INSPECT_TIMEOUT_S = 180.0
"""Time limit of an inspection: start a job, join the cluster and wait for the nodes' answers."""
_INSPECTION_KEPT_S = 2 * _INSPECT_TIMEOUT_S
"""Age up to which the owner of an inspection may still read its log: the time limit, and some slow requests."""
_POLL_INTERVAL_S = 0.3
_PATIENCE_S = 10.0
"""How long requests may fail while the report is polled."""
_NOT_FOUND = (126, 127)
"""Exit codes of a shell that may not execute a command, or cannot find it."""
_OTHER_LAUNCHER = ("No module named", "No such option")
"""Words of errors that mean that the launcher on the head is another version."""
_ERROR = "error: "
"""How the line begins in which the launcher reports its error."""
_INSPECTION = ("launcher", "inspect")
"""Key and value of the metadata that mark the job of an inspection."""
_STOP_GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_STOP_SIGNAL = {"RAY_JOB_STOP_SIGNAL": "SIGINT"}
"""The signal with which Ray stops a job: it goes to the driver and all its descendants.

Those include the training processes on the driver's host. They ignore SIGINT, as at a terminal; Ray's default, SIGTERM,
would kill them, and the steps since the newest checkpoint would be lost.
"""


class RayJobs(Scheduler):
    """The Jobs API at one address. Jobs run on the cluster's head."""

    starts_at_once = True

    def __init__(self, url: str, venv: str | None = None) -> None:
        """Make no connection.

        Args:
            url: Such as ``http://HEAD:8265``.
            venv: The environment on the head whose ``bin`` comes first on the PATH of commands; None: commands get
                the PATH that the head was started with.
        """
        self._url = url.rstrip("/")
        self._api = JobsHttp(self._url)
        self._venv = venv

    def ray_version(self) -> str:
        """Return the version of Ray on the cluster.

        Raises:
            ClusterError: Nothing answers at the address, it is no Ray cluster, or it refuses access.
        """
        try:
            version = self._api.request("GET", "/api/version")
        except Refused as refused:
            raise self._api.no_jobs_api(f"answers {refused.status}") from refused
        return self._api.decoded(_ray_version, version)

    def inspect(self, needs: Needs) -> ClusterReport:
        """Start a job that inspects the nodes, wait for its report, and delete the jobs of old inspections.

        Raises:
            ClusterError: As for every method; or the head has no launcher, or another version of it.
        """
        self.ray_version()  # gives the clearest error for a wrong address or token
        job_id = f"launcher-inspect-{uuid.uuid4().hex[:12]}"
        try:
            job = self.begin(
                JobRequest(
                    id=job_id,
                    command=inspection.COMMAND,
                    environment={nodes.NEEDS_VARIABLE: nodes.needs_to_text(needs)},
                    stop_grace_s=1,
                    metadata=dict([_INSPECTION]),
                )
            )
            report = self.report(job_id)
        except BaseException:  # also Ctrl-C
            with suppress(ClusterError):
                self.stop(job_id)
            raise
        self._delete_inspections_before(job)
        return report

    def report(self, job_id: str) -> ClusterReport:
        """Poll the log of a job until it holds the report, and return that.

        Raises:
            ClusterError: As for every method; or the job ends without a report, or prints none in time.
        """
        answered_at = time.monotonic()
        deadline = answered_at + _INSPECT_TIMEOUT_S
        while True:
            try:
                job = self.read(job_id)  # before its log, so that the log of an ended job is complete
                log = "" if job is None else self.log(job_id)
            except ClusterError:
                if time.monotonic() - answered_at > _PATIENCE_S:
                    raise
                time.sleep(_POLL_INTERVAL_S)
                continue
            answered_at = time.monotonic()
            if job is None:
                raise ClusterError(f"{self._url}: knows no more of job {job_id}, which was begun there; try again")
            try:
                report = nodes.report_from_log(log)
            except ValueError as error:
                raise ClusterError(
                    f"{self._url}: cannot read what job {job_id} has found out: {one_line(error)[:200]}; install the "
                    "same version of launcher here and on the cluster"
                ) from error
            if report is not None:
                return report
            if job.status in ENDED:
                raise self._inspect_failed(job, log)
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"{self._url}: job {job_id}, which inspects the nodes, is {job.status} after "
                    f"{_INSPECT_TIMEOUT_S:g} s: {job.message[:200] or 'no reason given'}; see its dashboard"
                )
            time.sleep(_POLL_INTERVAL_S)

    def begin(self, request: JobRequest) -> Job:
        """Start a job on the cluster's head, see ``Scheduler``.

        Raises:
            ClusterError: As for every method; or a value contains ``$``, because Ray expands variables in values.
        """
        variables = {**request.environment, **_STOP_SIGNAL, _STOP_GRACE_VARIABLE: str(request.stop_grace_s)}
        unsafe = [name for name, value in variables.items() if "$" in value]
        if unsafe:
            raise ClusterError(f"{self._url}: the value of {unsafe[0]} holds a '$', which Ray would replace")
        content = {
            "submission_id": request.id,
            "entrypoint": self._with_path(request.command),
            "runtime_env": {"env_vars": variables},
            "metadata": dict(request.metadata),
        }
        refused: Refused | None = None
        try:
            self._api.request("POST", "/api/jobs/", content)
        except Refused as error:  # Ray reports a duplicate id as an internal error
            refused = error
        job = self.read(request.id)
        if job is not None:
            return job
        if refused is None:
            raise self._api.no_jobs_api(f"has begun job {request.id}, and knows no such job")
        raise self._api.failed("does not begin a job", refused) from refused

    def script(self, request: JobRequest) -> str:
        raise ClusterError(f"{self._url}: takes job {request.id} as a command, and no script; use launcher submit")

    def read(self, job_id: str) -> Job | None:
        try:
            answer = self._api.request("GET", f"/api/jobs/{quote(job_id, safe='')}")
        except Refused as refused:
            if refused.status == requests.codes.not_found:
                return None
            raise self._api.failed(f"does not say how job {job_id} is", refused) from refused
        job = self._api.decoded(_job, answer)
        if job.id != job_id:
            raise self._api.no_jobs_api("answers with something else")
        return job

    def jobs(self) -> list[Job]:
        try:
            answer = self._api.request("GET", "/api/jobs/")
        except Refused as refused:
            raise self._api.failed("does not say which jobs there are", refused) from refused
        return sorted(self._api.decoded(_jobs, answer), key=lambda job: job.began_at or 0.0)

    def stop(self, job_id: str) -> None:
        try:
            answer = self._api.request("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")
        except Refused as refused:
            raise self._api.failed(f"does not stop job {job_id}", refused) from refused
        self._api.decoded(_is_stopped, answer)

    def log(self, job_id: str) -> str:
        try:
            answer = self._api.request("GET", f"/api/jobs/{quote(job_id, safe='')}/logs")
        except Refused as refused:
            raise self._api.failed(f"does not give the log of job {job_id}", refused) from refused
        return self._api.decoded(_log, answer)

    def _delete_inspections_before(self, own: Job) -> None:
        """Delete the inspections that succeeded and began long before this one.

        Newer ones stay: others may still have to read the log of theirs. Ray also watches a job for a moment after its
        end, and records a job that is deleted in that moment again, as failed. Both start times come from the
        cluster's clock.
        """
        if own.began_at is None:
            return
        with suppress(ClusterError, Refused):  # a job that stays only clutters the dashboard
            for job in self.jobs():
                is_inspection = job.metadata.get(_INSPECTION[0]) == _INSPECTION[1]
                is_old = job.began_at is not None and own.began_at - job.began_at > _INSPECTION_KEPT_S
                if is_inspection and job.status == "succeeded" and is_old:
                    self._api.request("DELETE", f"/api/jobs/{quote(job.id, safe='')}")

    def _with_path(self, command: str) -> str:
        """Put the venv first on the PATH of a command; Ray gives commands the PATH that the head was started with."""
        return command if self._venv is None else f'export PATH={shlex.quote(self._venv)}/bin:"$PATH"; {command}'

    def _inspect_failed(self, job: Job, log: str) -> ClusterError:
        """Return the error for an inspection that ended without a report."""
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        last = (errors or lines or ["nothing in its log"])[-1][:300]
        if job.exit_code in _NOT_FOUND:
            where = "the PATH of Ray on its head" if self._venv is None else f"{self._venv}/bin on its head"
            return ClusterError(
                f"{self._url}: there is no launcher, or no python, in {where}; install launcher there, or give the "
                "folder that it is in as venv of the cluster's description"
            )
        if job.exit_code is not None and any(sign in last for sign in _OTHER_LAUNCHER):
            return ClusterError(
                f"{self._url}: python on its head does not have this launcher: {last}; install the same version of "
                "launcher there, or give the folder that it is in as venv of the cluster's description"
            )
        if job.exit_code is None:
            return ClusterError(
                f"{self._url}: job {job.id}, which inspects the nodes, {job.status}: "
                f"{job.message[:300] or last}; see its dashboard"
            )
        return ClusterError(
            f"{self._url}: job {job.id}, which inspects the nodes, ended with exit code {job.exit_code}: {last}; its "
            "log on the dashboard has more"
        )


def _ray_version(answer: Any) -> str:
    version: str = field(answer, "ray_version", str)
    return version


def _job(answer: Any) -> Job:
    status = field(answer, "status", str).lower()
    if status not in get_args(JobStatus):
        raise OtherShape("status")
    began_ms = field(answer, "start_time", int, float, NoneType)
    return Job(
        id=field(answer, "submission_id", str),
        status=status,
        message=" ".join((field(answer, "message", str, NoneType) or "").split()),
        exit_code=field(answer, "driver_exit_code", int, NoneType),
        began_at=None if began_ms is None else began_ms / 1000,
        metadata=field(answer, "metadata", dict, NoneType) or {},
    )


def _jobs(answer: Any) -> list[Job]:
    """Return the submitted jobs, without drivers that run on the cluster by themselves: those have no id."""
    if not isinstance(answer, list):
        raise OtherShape("list of jobs")
    return [_job(each) for each in answer if field(each, "submission_id", str, NoneType)]


def _is_stopped(answer: Any) -> bool:
    stopped: bool = field(answer, "stopped", bool)
    return stopped


def _log(answer: Any) -> str:
    if "logs" not in (answer if isinstance(answer, dict) else {}):
        raise OtherShape("logs")
    return field(answer, "logs", str, NoneType) or ""
