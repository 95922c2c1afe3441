"""The Jobs API of a Ray cluster: commands that run on one of its hosts, begun and watched from anywhere.

This speaks the HTTP interface that Ray documents, and needs no Ray. Ray's own client waits without limit, takes its
address from RAY_ADDRESS if that is set, lets ~/.netrc replace the token, and needs packages that a laptop may lack.

Source: Ray Jobs REST API, docs.ray.io, as of Ray 2.60; the names are the same in 2.55.
"""

import shlex
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import requests

from cluster import node_check, ray_check
from cluster.errors import ClusterError, one_line
from cluster.ray_token import TOKEN_ADVICE, find_token
from cluster.scheduler import ENDED, Job, JobStatus, Look, Needs, Scheduler

_CONNECT_S = 10.0
_ANSWER_S = 30.0
"""The head starts an agent of its own for the first job of a session, which takes seconds."""
_LOOK_S = 180.0
"""How long a look may take: to start a job, to join the cluster, and what the nodes have for their answers."""
_POLL_S = 0.3
_NOT_FOUND = (126, 127)
"""Exit codes of a shell that does not find a command, or may not run it."""
_STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"


class _Refused(Exception):  # noqa: N818  # an answer, which callers tell apart
    """The cluster answers, and says no."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class _Bearer(requests.auth.AuthBase):
    """Sends a token, if there is one. A request without an ``auth`` of its own takes what ~/.netrc has for the host."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class RayJobs(Scheduler):
    """The Jobs API at one address. Its commands run on the cluster's head."""

    def __init__(self, url: str, venv: str | None = None) -> None:
        """Keeps the address; the token is looked for when a call is made, and kept nowhere.

        Args:
            url: Such as ``http://HEAD:8265``.
            venv: The folder on the head whose ``bin`` is searched first for commands; none: the head's PATH alone.
        """
        self._url = url.rstrip("/")
        self._venv = venv

    def ray_version(self) -> str:
        """Of the cluster.

        Raises:
            ClusterError: Nobody answers there, it is no Ray cluster, or it does not let this process in.
        """
        try:
            version = self._ask("GET", "/api/version")
        except _Refused as refused:
            raise self._no_jobs_api(f"answers {refused.status}") from refused
        if not isinstance(version, dict) or "ray_version" not in version:
            raise self._no_jobs_api("answers with something else")
        return str(version["ray_version"])

    def look(self, needs: Needs) -> Look:
        """Begins a job that looks at the nodes and waits for it; of one that succeeds only its log on the head stays.

        Raises:
            ClusterError: As of each method; or the head has no launcher, or another than this one.
        """
        self.ray_version()  # tells best what is wrong with an address or a token
        job_id = f"launcher-look-{uuid.uuid4().hex[:12]}"
        environment = {node_check.NEEDS_VARIABLE: node_check.needs_text(needs)}
        self.begin(job_id, ray_check.COMMAND, environment, save_s=1, metadata={"launcher": "look"})
        try:
            job = self._ended(job_id)
            log = self.log(job_id)
        except BaseException:  # also Ctrl-C
            with suppress(ClusterError):
                self.stop(job_id)
            raise
        if job.status != "succeeded":
            raise self._look_failed(job, log)
        try:
            look = node_check.look_in(log)
        except ValueError as error:
            raise ClusterError(
                f"{self._url}: cannot read what job {job_id} has found out: {one_line(error)[:200]}; install the same "
                "version of launcher here and on the cluster"
            ) from error
        with suppress(ClusterError, _Refused):
            self._ask("DELETE", f"/api/jobs/{job_id}")
        return look

    def begin(
        self, job_id: str, command: str, environment: Mapping[str, str], *, save_s: int, metadata: Mapping[str, str]
    ) -> bool:
        """Begins a command on the cluster's head, see ``Scheduler``; refuses values with a ``$``."""
        variables = {**environment, _STOP_WAIT_VARIABLE: str(save_s)}
        # Ray replaces what looks like a variable.
        unsafe = [name for name, value in variables.items() if "$" in value]
        if unsafe:
            raise ClusterError(f"{self._url}: the value of {unsafe[0]} holds a '$', which Ray would replace")
        request = {
            "submission_id": job_id,
            "entrypoint": self._with_path(command),
            "runtime_env": {"env_vars": variables},
            "metadata": dict(metadata),
        }
        try:
            self._ask("POST", "/api/jobs/", request)
        except _Refused as refused:
            if self.read(job_id) is not None:  # Ray says so in words of its own
                return False
            raise self._failed("does not begin a job", refused) from refused
        return True

    def read(self, job_id: str) -> Job | None:
        try:
            return _job(self._ask("GET", f"/api/jobs/{quote(job_id, safe='')}"))
        except _Refused as refused:
            if refused.status == requests.codes.not_found:
                return None
            raise self._failed(f"does not say how job {job_id} is", refused) from refused

    def jobs(self) -> list[Job]:
        try:
            told = self._ask("GET", "/api/jobs/")
        except _Refused as refused:
            raise self._failed("does not say which jobs there are", refused) from refused
        jobs = [_job(each) for each in told if each.get("submission_id")]
        return sorted(jobs, key=lambda job: job.began_at or 0.0)

    def stop(self, job_id: str) -> None:
        try:
            self._ask("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")
        except _Refused as refused:
            raise self._failed(f"does not stop job {job_id}", refused) from refused

    def log(self, job_id: str) -> str:
        try:
            told = self._ask("GET", f"/api/jobs/{quote(job_id, safe='')}/logs")
        except _Refused as refused:
            raise self._failed(f"does not give the log of job {job_id}", refused) from refused
        return str(told.get("logs") or "")

    def _with_path(self, command: str) -> str:
        """A command with the venv's first on its PATH: Ray gives it the PATH that the head was started with."""
        return command if self._venv is None else f'export PATH={shlex.quote(self._venv)}/bin:"$PATH"; {command}'

    def _ended(self, job_id: str) -> Job:
        """A job that has ended.

        Raises:
            ClusterError: It does not end in time, or the cluster does not say.
        """
        deadline = time.monotonic() + _LOOK_S
        while True:
            job = self.read(job_id)
            if job is None:
                raise ClusterError(f"{self._url}: knows no more of job {job_id}, which was begun there; try again")
            if job.status in ENDED:
                return job
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"{self._url}: job {job_id}, which looks at the nodes, is {job.status} after {_LOOK_S:g} s: "
                    f"{job.message[:200] or 'no reason given'}; see its dashboard"
                )
            time.sleep(_POLL_S)

    def _look_failed(self, job: Job, log: str) -> ClusterError:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        last = lines[-1][:300] if lines else "nothing in its log"
        if job.exit_code in _NOT_FOUND:
            where = "the PATH of Ray on its head" if self._venv is None else f"{self._venv}/bin on its head"
            return ClusterError(
                f"{self._url}: there is no launcher, or no python, in {where}; install launcher there, or give the "
                "folder that it is in as venv of the cluster's description"
            )
        if job.exit_code is not None and "No module named" in last:
            return ClusterError(
                f"{self._url}: python on its head does not have this launcher: {last}; install the same version of "
                "launcher there, or give the folder that it is in as venv of the cluster's description"
            )
        if job.exit_code is None:
            return ClusterError(
                f"{self._url}: job {job.id}, which looks at the nodes, {job.status}: "
                f"{job.message[:300] or last}; see its dashboard"
            )
        return ClusterError(
            f"{self._url}: job {job.id}, which looks at the nodes, ended with exit code {job.exit_code}: {last}; its "
            "log on the dashboard has more"
        )

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        """One request; what the cluster answers.

        Raises:
            ClusterError: Nobody answers, it is no Ray cluster, or it does not let this process in.
            _Refused: It says no.
        """
        token = find_token()
        try:
            answer = requests.request(
                method, self._url + path, json=content, auth=_Bearer(token), timeout=(_CONNECT_S, _ANSWER_S)
            )
        except requests.RequestException as error:
            raise ClusterError(
                f"{self._url}: nobody answers there: {_innermost(error)}; is the cluster up, started with "
                "--dashboard-host, and the address that of its Jobs API?"
            ) from error
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            what = "does not take this token" if token else "asks for a token"
            raise ClusterError(f"{self._url}: {what}; {TOKEN_ADVICE}")
        if answer.status_code != requests.codes.ok:
            raise _Refused(answer.status_code, answer.text)
        try:
            return answer.json()
        except requests.JSONDecodeError as error:
            raise self._no_jobs_api("answers with something else") from error

    def _no_jobs_api(self, what: str) -> ClusterError:
        return ClusterError(
            f"{self._url}: {what}, and not as the Jobs API does; give the address of Ray's dashboard, port 8265 unless "
            "told otherwise, on a head that has ray[default]"
        )

    def _failed(self, what: str, refused: _Refused) -> ClusterError:
        lines = [line.strip() for line in str(refused).splitlines() if line.strip()]
        return ClusterError(f"{self._url}: {what}: {lines[-1][:300] if lines else refused.status}; see its dashboard")


def _job(told: Mapping[str, Any]) -> Job:
    status: JobStatus = told["status"].lower()
    began_ms = told.get("start_time")
    return Job(
        id=told["submission_id"],
        status=status,
        message=" ".join((told.get("message") or "").split()),
        exit_code=told.get("driver_exit_code"),
        began_at=None if began_ms is None else began_ms / 1000,
        metadata=told.get("metadata") or {},
    )


def _innermost(error: BaseException) -> str:
    """What went wrong below the layers of libraries."""
    while True:
        inner = error.__cause__ or error.__context__
        if inner is None:
            return one_line(error)
        error = inner
